"""The KV cache: what one layer keeps of a token, and the rows of a batch; allocated once, nothing grows.

A row of L tokens keeps its first P(L) tokens packed (`Scheme.packed_tokens`) and the others in BF16, token t in slot
t % ring of its window. Only between a cut and the pass that feeds the rest again may more be packed. What the
arithmetic of a block is stands in oscar.py. These classes are array code and run on NumPy and CuPy; ops/paged.py has
the ones that kernels fill.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from .batch import Batch
from .causal_attention import QUERIES, causal_attention
from .config import Config
from .oscar import Scheme

Array = Any
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> (shape, dtype)
BF16 = np.dtype(ml_dtypes.bfloat16)
WINDOW_ARRAYS = "window_keys", "window_values"


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


# --- one layer


class LayerCache:
    """One layer's keys and values of every row. arrays: those that `layout` names, on the back end of `ops`."""

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
    def row_layout(cls, config: Config, scheme: Scheme, length: int, packed: int) -> Layout:
        """What one layer of a row of `length` tokens, `packed` of them packed, holds: what a saved cache consists of.
        On every back end the same; nothing empty is in it."""
        raise NotImplementedError

    def append(self, new: NewTokens, batch: Batch) -> None:
        """Writes new tokens after those of their rows. Everything passes through BF16 first."""
        raise NotImplementedError

    def past(self, slot: int, length: int, packed: int, room: int = 0) -> tuple[Array, Array]:
        """What attention takes the first `length` tokens of a row, `packed` of them packed, to be: keys, values,
        float32 [kv_heads, length + room, d].

        The last `room` tokens are left for the caller to fill.
        """
        raise NotImplementedError

    def attend(self, q: Array, new: NewTokens, batch: Batch) -> Array:
        """Causal grouped-query attention over the cache, which does not hold the new tokens yet, and the new tokens.

        q [tokens, q_heads, d]. softmax(q.k / sqrt(d)).v in float32 -> [tokens, q_heads, d] in q's dtype.
        """
        xp = self.xp
        out, scale = xp.empty(q.shape, q.dtype), xp.float32(1 / math.sqrt(q.shape[-1]))
        for (slot, start, span), packed in zip(batch.spans(), batch.packed, strict=True):
            keys, values = self.past(slot, start, packed, room=span.stop - span.start)
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
            for name, (shape, _) in row_layout(config, self.scheme, length).items()
        }

    def import_row(self, slot: int, row: dict[str, np.ndarray], packed: int) -> None:
        """The inverse of `export_row`, bit for bit, into a row that has room for it. packed: its packed tokens."""
        for name, array in row.items():  # norms may lack room for the last ones
            fitting = tuple(map(slice, map(min, array.shape, self.arrays[name].shape[1:])))
            self.arrays[name][(slot, *fitting)] = self.xp.asarray(array[fitting])

    def copy_row(self, source: int, target: int) -> None:
        for array in self.arrays.values():
            array[target] = array[source]

    def swap_rows(self, one: int, other: int) -> None:
        for array in self.arrays.values():
            kept = array[one].copy()
            array[one] = array[other]
            array[other] = kept


class PlainCache(LayerCache):
    """Keys and values in BF16: nothing is quantized."""

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int) -> Layout:
        return dict.fromkeys(("keys", "values"), ((batch, config.num_kv_heads, context, config.head_dim), BF16))

    @classmethod
    def row_layout(cls, config: Config, scheme: Scheme, length: int, packed: int) -> Layout:
        return {name: (shape[1:], dtype) for name, (shape, dtype) in cls.layout(config, scheme, 1, length).items()}

    def append(self, new: NewTokens, batch: Batch) -> None:
        for slot, start, span in batch.spans():
            for name, x in (("keys", new.k), ("values", new.v)):
                self[name][slot, :, start : start + span.stop - span.start] = x[span].astype(BF16).swapaxes(0, 1)

    def past(self, slot: int, length: int, packed: int, room: int = 0) -> tuple[Array, Array]:
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
        heads, dim, tokens = config.num_kv_heads, config.head_dim, scheme.packed_tokens(context)
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            name: ((batch, heads, *shape), dtype) for name, (shape, dtype) in scheme.packed_layout(tokens, dim).items()
        }
        arrays |= dict.fromkeys(WINDOW_ARRAYS, ((batch, heads, scheme.ring, dim), BF16))
        if scheme.scale:  # of tokens that a longer context packs, too: the row can go on there
            arrays["norms"] = (batch, context // scheme.flush * scheme.flush), np.float32
        if scheme.sinks:
            arrays |= dict.fromkeys(("sink_keys", "sink_values"), ((batch, heads, scheme.sinks, dim), BF16))
        return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}

    @classmethod
    def row_layout(cls, config: Config, scheme: Scheme, length: int, packed: int) -> Layout:
        layout = {}
        for name, (shape, dtype) in PackedCache.layout(config, scheme, 1, packed + scheme.keep).items():
            shape = shape[1:]  # [kv_heads, tokens or groups, ...]; norms are [tokens]
            if name == "norms":
                shape = (min(length, config.max_context // scheme.flush * scheme.flush),)
            elif name in WINDOW_ARRAYS:
                shape = shape[0], length - packed, *shape[2:]
            elif name.startswith("sink"):
                shape = shape[0], min(packed, scheme.sinks), *shape[2:]
            if math.prod(shape):
                layout[name] = shape, dtype
        return layout

    def append(self, new: NewTokens, batch: Batch) -> None:
        """Packs what is to be packed of the window and the new tokens; the rest of these goes into the window."""
        for (slot, start, span), packed in zip(batch.spans(), batch.packed, strict=True):
            rows = [x[span].astype(BF16).swapaxes(0, 1) for x in (new.k, new.v)]  # [heads, n, d]
            end = start + span.stop - span.start
            if new.norms is not None:  # the context's last tokens have no room, nor need it
                fitting = max(min(end, self["norms"].shape[1]) - start, 0)
                self["norms"][slot, start : start + fitting] = new.norms[span][:fitting]
            flushed = max(packed, self.scheme.packed_tokens(end))
            if flushed > packed:
                old = [self[name][slot][:, self.slots(packed, min(start, flushed))] for name in WINDOW_ARRAYS]
                new_rows = [x[:, : max(flushed - start, 0)] for x in rows]
                blocks = (self.xp.concatenate(both, axis=1) for both in zip(old, new_rows, strict=True))
                self.pack(slot, packed, *blocks, new.feedback)
            first = max(start, flushed)
            for name, x in zip(WINDOW_ARRAYS, rows, strict=True):
                self[name][slot][:, self.slots(first, end)] = x[:, first - start :]

    def slots(self, first: int, end: int) -> Array:
        """Where the window has tokens first ... end - 1."""
        return self.xp.arange(first, end) % self.scheme.ring

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
        end = min(self.scheme.sinks, first + keys.shape[1])
        if first < end:
            for name, x in (("sink_keys", keys), ("sink_values", values)):
                self[name][slot, :, first:end] = x[:, : end - first]

    def past(self, slot: int, length: int, packed: int, room: int = 0) -> tuple[Array, Array]:
        past, sinks = [], min(self.scheme.sinks, packed)
        unpacked = self.packed(slot, packed) if packed else (None, None)
        for kind, old in zip(("keys", "values"), unpacked, strict=True):
            window = self[f"window_{kind}"][slot][:, self.slots(packed, length)]
            x = self.xp.empty((window.shape[0], length + room, window.shape[2]), self.xp.float32)
            if packed:
                x[:, :packed] = old
                if sinks:
                    x[:, :sinks] = widen(self[f"sink_{kind}"][slot, :, :sinks])
            x[:, packed:length] = widen(window)
            past.append(x)
        return past[0], past[1]

    def packed(self, slot: int, tokens: int) -> tuple[Array, Array]:
        """The packed tokens of a row, dequantized: keys, values, float32 [kv_heads, tokens, d]; without the sinks."""
        scheme, xp = self.scheme, self.xp
        dim = self["window_keys"].shape[3]
        row = {name: self[name][slot, :, : shape[0]] for name, (shape, _) in scheme.packed_layout(tokens, dim).items()}
        return scheme.unpack(row, self["norms"][slot, :tokens] if scheme.scale else None, xp)

    def export_row(self, slot: int, length: int, config: Config) -> dict[str, np.ndarray]:
        """The window in the order of its tokens."""
        row = {name: array[slot : slot + 1] for name, array in self.arrays.items()}
        slots = self.slots(self.scheme.packed_tokens(length), length)
        row |= {name: row[name][:, :, slots] for name in WINDOW_ARRAYS}
        return super(PackedCache, PackedCache(row, self.scheme, self.ops)).export_row(0, length, config)

    def import_row(self, slot: int, row: dict[str, np.ndarray], packed: int) -> None:
        for name in row.keys() & set(WINDOW_ARRAYS):
            self[name][slot][:, self.slots(packed, packed + row[name].shape[1])] = self.xp.asarray(row[name])
        super().import_row(slot, {name: row[name] for name in row.keys() - set(WINDOW_ARRAYS)}, packed)


def widen(x: Array) -> Array:
    """BF16 -> float32, exactly: the upper half of the word. (NumPy's own conversion of ml_dtypes takes three times as
    long.)"""
    return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


# --- the rows of a batch


class Cache:
    """Keys and values of `batch` sequences of at most `context` tokens, in the given scheme.

    layers[i] is layer i's cache; its arrays are slices of `arrays`, which have one more axis in front: what is done for
    all layers at once takes those. lengths[b] counts the tokens of row b; cuts[b] of them are packed at least, which
    are more than P(lengths[b]) until a row that was cut is fed again; shifts[b]: position minus place of what follows
    row b, where media have positions of their own (host, int64).
    """

    def __init__(self, config: Config, scheme: Scheme, batch: int, context: int, ops: Backend):
        self.config, self.scheme, self.context, self.ops = config, scheme, context, ops
        self.lengths, self.cuts, self.shifts = np.zeros((3, batch), np.int64)
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
        starts, packed = tuple(int(self.lengths[s]) for s in slots), tuple(map(self.packed_tokens, slots))
        for slot, start, count in zip(slots, starts, counts, strict=True):
            if count < 1 or start + count > self.context:
                raise ValueError(f"row {slot} holds {start} of {self.context} tokens; {count} more do not fit")
        shifts = tuple(int(self.shifts[s]) for s in slots)
        return Batch(slots, starts, packed, counts, shifts if any(shifts) else None)

    def packed_tokens(self, slot: int) -> int:
        """How many tokens of a row are packed."""
        return max(self.scheme.packed_tokens(int(self.lengths[slot])), int(self.cuts[slot]))

    def advance(self, batch: Batch) -> None:
        """The new tokens of `batch` are now part of their rows."""
        for slot, start, count in zip(batch.slots, batch.starts, batch.counts, strict=True):
            self.lengths[slot] = start + count
        if batch.inputs is not None:
            self.shifts[list(batch.slots)] = batch.inputs.shifts

    def rollback(self, batch: Batch) -> None:
        """After a pass that ended midway: some layers have its tokens, others not."""
        for slot, start, count in zip(batch.slots, batch.starts, batch.counts, strict=True):
            self.restore(slot, start, count)

    def restore(self, slot: int, start: int, count: int) -> None:
        """A row of `start` tokens after up to `count` more were written: without its window if these overwrote it."""
        self.lengths[slot] = start
        self.cuts[slot], self.lengths[slot] = self.packed_tokens(slot), self._intact(slot, count)

    def _intact(self, slot: int, unread: int) -> int:
        """How many tokens of a row are left where up to `unread` more were written: those of a window whose oldest slot
        was overwritten are not."""
        packed, length = self.packed_tokens(slot), int(self.lengths[slot])
        return packed if self.scheme.quantized and length + unread > packed + self.scheme.ring else length

    def left_after_cut(self, slot: int, length: int, unread: int = 0) -> int:
        """How many tokens of a row are left when it is cut to `length`; unread: more may be written behind them.

        All, if the window has those after the first P(length). Else P(length) packed ones, so that the caller feeds up
        to flush + keep - 1 tokens again: then the row is as if it had never been longer.
        """
        whole = self.scheme.packed_tokens(length)
        return whole if whole < self.packed_tokens(slot) else min(length, self._intact(slot, unread))

    def truncate(self, slot: int, length: int, unread: int = 0) -> int:
        """Forgets the tokens of a row from `length` on; returns how many are left (`left_after_cut`). The caller feeds
        the rest again, up to `length` at least, before the row is stepped or exported."""
        left, packed = self.left_after_cut(slot, length, unread), self.packed_tokens(slot)
        self.shifts[slot] = 0  # that of text; a pass over a row with media says what is true
        self.lengths[slot], self.cuts[slot] = left, min(self.scheme.packed_tokens(length), packed)
        return left

    def check_whole(self, slot: int) -> None:
        """Raises ValueError for a row whose tokens up to where it was cut were not fed again."""
        if self.cuts[slot] > self.scheme.packed_tokens(int(self.lengths[slot])):
            raise ValueError(f"row {slot} was cut to {self.lengths[slot]} tokens; feed those that followed first")

    def export_row(self, slot: int) -> list[dict[str, np.ndarray]]:
        """Each layer's part of a row, on the host (`LayerCache.export_row`). Raises ValueError as `check_whole`."""
        self.check_whole(slot)
        return [layer_cache.export_row(slot, int(self.lengths[slot]), self.config) for layer_cache in self.layers]

    def import_row(self, slot: int, rows: Iterable[dict[str, np.ndarray]], tokens: int, length: int) -> None:
        """What `export_row` gave for a row of `tokens`, cut to `length` as by `truncate`."""
        self.lengths[slot], self.cuts[slot] = tokens, 0
        self.truncate(slot, length)
        shapes = row_layout(self.config, self.scheme, int(self.lengths[slot]), int(self.cuts[slot]))
        for layer_cache, row in zip(self.layers, rows, strict=True):
            parts = {name: row[name][tuple(map(slice, shape))] for name, (shape, _) in shapes.items()}
            layer_cache.import_row(slot, parts, int(self.cuts[slot]))

    def copy(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        for layer_cache in self.layers:
            layer_cache.copy_row(source, target)
        for of_rows in (self.lengths, self.cuts, self.shifts):
            of_rows[target] = of_rows[source]

    def swap(self, one: int, other: int) -> None:
        """Two rows change places."""
        if one == other:
            return
        for layer_cache in self.layers:
            layer_cache.swap_rows(one, other)
        for counts in (self.lengths, self.cuts):
            counts[[one, other]] = counts[[other, one]]

    def reset(self, slot: int) -> None:
        """Row `slot` is empty again. What its arrays hold is never read: every read is bounded by the length."""
        self.lengths[slot] = self.cuts[slot] = self.shifts[slot] = 0

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)


def array_cache(scheme: Scheme) -> type[LayerCache]:
    """The kind of cache, in array code, that a scheme wants."""
    return PackedCache if scheme.quantized else PlainCache


def row_layout(config: Config, scheme: Scheme, length: int, packed: int | None = None) -> Layout:
    """What one layer of a row of `length` tokens holds, whatever the back end. packed: None: P(length) of them are."""
    packed = scheme.packed_tokens(length) if packed is None else packed
    return array_cache(scheme).row_layout(config, scheme, length, packed)


def row_bytes(config: Config, scheme: Scheme, length: int) -> int:
    """Bytes of what all layers hold of a row of `length` tokens."""
    arrays = row_layout(config, scheme, length).values()
    return config.num_layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)


def cache_bytes(config: Config, scheme: Scheme, batch: int, context: int) -> int:
    """Bytes of a whole cache, before it is made; equal to the `nbytes` that it will have."""
    arrays = array_cache(scheme).layout(config, scheme, batch, context).values()
    return config.num_layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)
