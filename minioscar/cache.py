"""The KV cache: what one layer keeps of a token, and the rows of a batch; allocated once, nothing grows.

A sequence of length L keeps its first L - L % WINDOW tokens packed and the newest L % WINDOW in BF16. What the
arithmetic of a block is stands in oscar.py. These classes are array code and run on NumPy and CuPy; ops/paged.py has
the ones that kernels fill.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from .config import Config
from .oscar import WINDOW, Scheme

Array = Any
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> (shape, dtype)
BF16 = np.dtype(ml_dtypes.bfloat16)
QUERIES = 256  # queries of one sequence whose scores are in memory at once


class Backend(Protocol):
    """What a cache asks of a back end."""

    xp: Any  # NumPy or CuPy

    def numpy(self, x: Array) -> np.ndarray: ...

    def cache_type(self, config: Config, scheme: Scheme) -> type[LayerCache]: ...


class NewTokens(NamedTuple):
    """New tokens on their way into the cache; without arrays where they are in it already (a decode step on a card)."""

    k: Array | None = None  # [tokens, kv_heads, d], rotated if the scheme does
    v: Array | None = None
    norms: Array | None = None  # float32 [tokens], of k as BF16 keeps it, over all kv heads and channels
    feedback: Array | None = None  # Layer.key_feedback, for a shaped scheme


@dataclass(frozen=True)
class Batch:
    """The new tokens of one forward pass, sequence after sequence, without padding.

    slots[i] is the cache row of sequence i, starts[i] its length before this pass, counts[i] its new tokens.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def positions(self) -> np.ndarray:
        """The position of every new token; int64 [tokens]."""
        return np.concatenate([np.arange(s, s + n) for s, n in zip(self.starts, self.counts, strict=True)])

    @property
    def last(self) -> np.ndarray | None:
        """Where each sequence's last new token stands among the tokens, int64 [sequences]; None: every token is one."""
        return None if set(self.counts) == {1} else np.cumsum(self.counts) - 1

    @property
    def end(self) -> int:
        """The longest a row becomes: so many positions are needed."""
        return int(np.add(self.starts, self.counts).max())

    def spans(self) -> list[tuple[int, int, slice]]:
        """(slot, start, where its tokens stand) of each sequence."""
        ends = np.cumsum(self.counts).tolist()
        return [(s, p, slice(e - n, e)) for s, p, n, e in zip(self.slots, self.starts, self.counts, ends, strict=True)]


# --- one layer


class LayerCache:
    """One layer's keys and values of every row. arrays: those that `layout` names, on the back end of `ops`. index: of
    the layer."""

    def __init__(self, arrays: dict[str, Array], scheme: Scheme, ops: Backend, index: int = 0):
        self.arrays, self.scheme, self.ops, self.xp, self.index = arrays, scheme, ops, ops.xp, index

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int) -> Layout:
        """The arrays of one layer. Axes: batch, kv_heads, tokens (or groups, or blocks' worth of them), channels (or
        groups, or bytes)."""
        raise NotImplementedError

    @classmethod
    def row_layout(cls, config: Config, scheme: Scheme, length: int) -> Layout:
        """What one layer of a row of `length` tokens holds: what a saved cache consists of, on every back end. Nothing
        empty is in it."""
        raise NotImplementedError

    def append(self, new: NewTokens, batch: Batch) -> None:
        """Writes new tokens after those of their rows. Everything passes through BF16 first."""
        raise NotImplementedError

    def past(self, slot: int, length: int, room: int = 0) -> tuple[Array, Array]:
        """What attention takes the first `length` tokens of a row to be: keys, values, float32 [kv_heads, length +
        room, d].

        The last `room` tokens are left for the caller to fill.
        """
        raise NotImplementedError

    def attend(self, q: Array, new: NewTokens, batch: Batch) -> Array:
        """Causal grouped-query attention over the cache, which does not hold the new tokens yet, and the new tokens.

        q [tokens, q_heads, d]. softmax(q.k / sqrt(d)).v in float32 -> [tokens, q_heads, d] in q's dtype.
        """
        xp = self.xp
        out, scale = xp.empty(q.shape, q.dtype), xp.float32(1 / math.sqrt(q.shape[-1]))
        for slot, start, span in batch.spans():
            keys, values = self.past(slot, start, room=span.stop - span.start)
            for past, x in ((keys, new.k), (values, new.v)):
                past[:, start:] = x[span].astype(xp.float32).swapaxes(0, 1)
            for first in range(span.start, span.stop, QUERIES):
                queries = slice(first, min(first + QUERIES, span.stop))
                seen = start + queries.stop - span.start  # tokens that the last of these queries sees
                x = q[queries].astype(xp.float32) * scale
                out[queries] = causal_attention(x, keys[:, :seen], values[:, :seen], xp)
        return out

    def export_row(self, slot: int, length: int, config: Config) -> dict[str, np.ndarray]:
        """The first `length` tokens of a row as the cache has them, in the form of `row_layout`: copies on the host."""
        return {
            name: np.array(self.ops.numpy(self.arrays[name][(slot, *map(slice, shape))]), order="C")
            for name, (shape, _) in self.row_layout(config, self.scheme, length).items()
        }

    def import_row(self, slot: int, row: dict[str, np.ndarray]) -> None:
        """The inverse of `export_row`, bit for bit, into a row of any capacity that holds so many tokens."""
        for name, array in row.items():
            # norms lack room in a last partial block
            fitting = tuple(map(slice, map(min, array.shape, self.arrays[name].shape[1:])))
            self.arrays[name][(slot, *fitting)] = self.xp.asarray(array[fitting])

    def copy_row(self, source: int, target: int) -> None:
        for array in self.arrays.values():
            array[target] = array[source]


class PlainCache(LayerCache):
    """Keys and values in BF16: nothing is quantized."""

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int) -> Layout:
        return dict.fromkeys(("keys", "values"), ((batch, config.num_kv_heads, context, config.head_dim), BF16))

    @classmethod
    def row_layout(cls, config: Config, scheme: Scheme, length: int) -> Layout:
        return {name: (shape[1:], dtype) for name, (shape, dtype) in cls.layout(config, scheme, 1, length).items()}

    def append(self, new: NewTokens, batch: Batch) -> None:
        for slot, start, span in batch.spans():
            for name, x in (("keys", new.k), ("values", new.v)):
                self[name][slot, :, start : start + span.stop - span.start] = x[span].astype(BF16).swapaxes(0, 1)

    def past(self, slot: int, length: int, room: int = 0) -> tuple[Array, Array]:
        past = []
        for name in ("keys", "values"):
            _, heads, _, dim = self[name].shape
            past.append(self.xp.empty((heads, length + room, dim), self.xp.float32))
            past[-1][:, :length] = widen(self[name][slot, :, :length])
        return past[0], past[1]


class PackedCache(LayerCache):
    """Whole blocks quantized as the scheme says, the newest tokens in a BF16 window, the first ones (sinks) in BF16
    beside them."""

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int) -> Layout:
        heads, dim = config.num_kv_heads, config.head_dim
        tokens = context // WINDOW * WINDOW  # a partial block at the end of the context never leaves the window
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            name: ((batch, heads, *shape), dtype) for name, (shape, dtype) in scheme.packed_layout(tokens, dim).items()
        }
        arrays |= dict.fromkeys(("window_keys", "window_values"), ((batch, heads, WINDOW, dim), BF16))
        if scheme.scale:
            arrays["norms"] = (batch, tokens), np.float32
        if scheme.sinks:
            arrays |= dict.fromkeys(("sink_keys", "sink_values"), ((batch, heads, scheme.sinks, dim), BF16))
        return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}

    @classmethod
    def row_layout(cls, config: Config, scheme: Scheme, length: int) -> Layout:
        packed = length - length % WINDOW
        layout = {}
        for name, (shape, dtype) in PackedCache.layout(config, scheme, 1, packed or WINDOW).items():
            shape = shape[1:]  # [kv_heads, tokens or groups, ...]; norms are [tokens]
            if name == "norms":
                capacity = min(-(-length // WINDOW) * WINDOW, config.max_context) // WINDOW * WINDOW
                shape = (min(length, capacity),)
            elif name in ("window_keys", "window_values"):
                shape = shape[0], length - packed, *shape[2:]
            elif not packed:
                continue
            if math.prod(shape):
                layout[name] = shape, dtype
        return layout

    def append(self, new: NewTokens, batch: Batch) -> None:
        """Into the window, and every full block of WINDOW tokens from there into packed form."""
        for slot, start, span in batch.spans():
            # [heads, n, d]
            rows = {"keys": new.k[span].astype(BF16).swapaxes(0, 1), "values": new.v[span].astype(BF16).swapaxes(0, 1)}
            count, in_window = span.stop - span.start, start % WINDOW
            if new.norms is not None:
                # a last partial block has no room, nor needs it
                fitting = max(min(count, self["norms"].shape[1] - start), 0)
                self["norms"][slot, start : start + fitting] = new.norms[span][:fitting]
            full, left = divmod(in_window + count, WINDOW)
            if full:
                blocks = {
                    name: self.xp.concatenate([self[f"window_{name}"][slot, :, :in_window], x], axis=1)
                    for name, x in rows.items()
                }
                packed = (block[:, : full * WINDOW] for block in blocks.values())
                self.pack(slot, start - in_window, *packed, new.feedback)
                rows, in_window = {name: block[:, full * WINDOW :] for name, block in blocks.items()}, 0
            for name, x in rows.items():
                self[f"window_{name}"][slot, :, in_window:left] = x

    def pack(self, slot: int, first: int, keys: Array, values: Array, feedback: Array | None = None) -> None:
        """Quantizes whole blocks, BF16 [kv_heads, n, d], as tokens first ... first + n - 1; copies a row's sinks."""
        scheme, tokens = self.scheme, slice(first, first + keys.shape[1])
        self.copy_sinks(slot, first, keys, values)
        norms = self["norms"][slot, tokens] if scheme.scale else None
        for name, array in scheme.pack(keys, values, norms, self.xp, feedback).items():
            begin = first * array.shape[1] // keys.shape[1]  # of groups of tokens there are fewer
            self[name][slot, :, begin : begin + array.shape[1]] = array

    def copy_sinks(self, slot: int, first: int, keys: Array, values: Array) -> None:
        """The first tokens of a row stay in BF16 beside the cache; their packed slots are not read."""
        if self.scheme.sinks and first == 0:
            for name, x in (("sink_keys", keys), ("sink_values", values)):
                self[name][slot] = x[:, : self.scheme.sinks]

    def past(self, slot: int, length: int, room: int = 0) -> tuple[Array, Array]:
        packed, past = length - length % WINDOW, []
        unpacked = self.packed(slot, packed) if packed else (None, None)
        for kind, old in zip(("keys", "values"), unpacked, strict=True):
            window = self[f"window_{kind}"][slot, :, : length - packed]
            x = self.xp.empty((window.shape[0], length + room, window.shape[2]), self.xp.float32)
            if packed:
                x[:, :packed] = old
                if self.scheme.sinks:
                    x[:, : self.scheme.sinks] = widen(self[f"sink_{kind}"][slot])
            x[:, packed:length] = widen(window)
            past.append(x)
        return past[0], past[1]

    def packed(self, slot: int, tokens: int) -> tuple[Array, Array]:
        """The packed tokens of a row, dequantized: keys, values, float32 [kv_heads, tokens, d]; without the sinks."""
        scheme, xp = self.scheme, self.xp
        dim = self["window_keys"].shape[3]
        row = {name: self[name][slot, :, : shape[0]] for name, (shape, _) in scheme.packed_layout(tokens, dim).items()}
        return scheme.unpack(row, self["norms"][slot, :tokens] if scheme.scale else None, xp)


def causal_attention(q: Array, keys: Array, values: Array, xp: Any) -> Array:
    """The last queries of a sequence over all its tokens: q [n, q_heads, d], already times 1 / sqrt(d); keys, values
    [kv_heads, seen, d].

    float32 [n, q_heads, d]. Query i of n sees the first seen - n + i + 1 tokens.
    """
    (n, q_heads, dim), (kv_heads, seen, _) = q.shape, keys.shape
    x = q.reshape(n, kv_heads, -1, dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, dim)  # [kv_heads, group * n, d]
    scores = (x @ keys.swapaxes(1, 2)).reshape(kv_heads, -1, n, seen)
    if n > 1:
        scores[..., seen - n :] += xp.triu(xp.full((n, n), -xp.inf, xp.float32), 1)
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    y = (scores.reshape(kv_heads, -1, seen) @ values).reshape(kv_heads, -1, n, dim) / total
    return y.transpose(2, 0, 1, 3).reshape(n, q_heads, dim)


def widen(x: Array) -> Array:
    """BF16 -> float32, exactly: the upper half of the word. (NumPy's own conversion of ml_dtypes takes three times as
    long.)"""
    return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


# --- the rows of a batch


class Cache:
    """Keys and values of `batch` sequences of at most `context` tokens, in the given scheme.

    layers[i] is layer i's cache; its arrays are slices of `arrays`, which have one more axis in front: what is done for
    all layers at once takes those. lengths[b] counts the tokens of row b (host, int64).
    """

    def __init__(self, config: Config, scheme: Scheme, batch: int, context: int, ops: Backend):
        self.config, self.scheme, self.context, self.ops = config, scheme, context, ops
        self.lengths = np.zeros(batch, np.int64)
        kind = ops.cache_type(config, scheme)
        shapes = kind.layout(config, scheme, batch, context)
        self.arrays = {
            name: ops.xp.zeros((config.num_layers, *shape), dtype) for name, (shape, dtype) in shapes.items()
        }
        arrays = ({name: array[i] for name, array in self.arrays.items()} for i in range(config.num_layers))
        self.layers = [kind(of_layer, scheme, ops, i) for i, of_layer in enumerate(arrays)]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def batch_for(self, slots: Iterable[int], counts: Iterable[int]) -> Batch:
        """Room for counts[i] new tokens in row slots[i]. Raises ValueError if a row would grow past the context."""
        slots, counts = tuple(slots), tuple(counts)
        starts = tuple(int(self.lengths[s]) for s in slots)
        for slot, start, count in zip(slots, starts, counts, strict=True):
            if count < 1 or start + count > self.context:
                raise ValueError(f"row {slot} holds {start} of {self.context} tokens; {count} more do not fit")
        return Batch(slots, starts, counts)

    def advance(self, batch: Batch) -> None:
        """The new tokens of `batch` are now part of their rows."""
        for slot, start, count in zip(batch.slots, batch.starts, batch.counts, strict=True):
            self.lengths[slot] = start + count

    def rollback(self, batch: Batch) -> None:
        """After a pass that ended midway: some layers have its tokens, others not, and windows may be overwritten."""
        for slot, start in zip(batch.slots, batch.starts, strict=True):
            self.lengths[slot] = start - start % WINDOW if self.scheme.quantized else start

    def truncate(self, slot: int, length: int) -> int:
        """Forgets the tokens of a row from `length` on; returns how many are left (`left_after_cut`). The caller feeds
        the rest again."""
        self.lengths[slot] = left_after_cut(self.scheme, int(self.lengths[slot]), length)
        return int(self.lengths[slot])

    def export_row(self, slot: int) -> list[dict[str, np.ndarray]]:
        """Each layer's part of a row, on the host (`LayerCache.export_row`)."""
        return [layer_cache.export_row(slot, int(self.lengths[slot]), self.config) for layer_cache in self.layers]

    def import_row(self, slot: int, rows: Iterable[dict[str, np.ndarray]], length: int) -> None:
        """The first `length` tokens of what `export_row` gave for a row that is as long or longer and can be cut
        there."""
        shapes = row_layout(self.config, self.scheme, length)
        for layer_cache, row in zip(self.layers, rows, strict=True):
            layer_cache.import_row(
                slot, {name: row[name][tuple(map(slice, shape))] for name, (shape, _) in shapes.items()}
            )
        self.lengths[slot] = length

    def copy(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        for layer_cache in self.layers:
            layer_cache.copy_row(source, target)
        self.lengths[target] = self.lengths[source]

    def reset(self, slot: int) -> None:
        """Row `slot` is empty again. What its arrays hold is never read: every read is bounded by the length."""
        self.lengths[slot] = 0

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)


def array_cache(scheme: Scheme) -> type[LayerCache]:
    """The kind of cache, in array code, that a scheme wants."""
    return PackedCache if scheme.quantized else PlainCache


def row_layout(config: Config, scheme: Scheme, length: int) -> Layout:
    """What one layer of a row of `length` tokens holds, whatever the back end."""
    return array_cache(scheme).row_layout(config, scheme, length)


def cache_bytes(config: Config, scheme: Scheme, batch: int, context: int) -> int:
    """Bytes of a whole cache, before it is made; equal to the `nbytes` that it will have."""
    arrays = array_cache(scheme).layout(config, scheme, batch, context).values()
    return config.num_layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)


def left_after_cut(scheme: Scheme, tokens: int, length: int) -> int:
    """How many tokens of a row of `tokens` are left when it is cut to `length`.

    The window can be cut anywhere. A packed block cannot be taken apart, so a cut within one keeps the blocks before
    it: up to WINDOW - 1 tokens fewer than asked for.
    """
    if length >= tokens:
        return tokens
    inside = not scheme.quantized or length >= tokens - tokens % WINDOW
    return length if inside else length - length % WINDOW
