"""What one layer keeps of a token; allocated once, nothing grows.

A row of L tokens keeps its first P(L) tokens packed (`Scheme.packed_tokens`) and the others in BF16, token t in slot
t % ring of its window. Only between a cut and the pass that feeds the rest again may more be packed. What the
arithmetic of a block is stands in oscar.py. These classes are array code and run on NumPy and CuPy; ops/paged.py has
the ones that kernels fill.

Packed tokens and norms lie in blocks of 128 tokens, under one number in all layers: those of token t of a row in block
table[row, t // 128].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .backend import Backend
from .batch import Batch
from .causal_attention import QUERIES, causal_attention
from .config import Config
from .oscar import Scheme

Array = Any
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> (shape, dtype)
BF16 = np.dtype(ml_dtypes.bfloat16)
BLOCK_TOKENS = 128
WINDOW_ARRAYS = "window_keys", "window_values"
SINK_ARRAYS = "sink_keys", "sink_values"


class NewTokens(NamedTuple):
    """New tokens on their way into the cache; without arrays where they are in it already (a decode step on a card)."""

    k: Array | None = None  # [tokens, kv_heads, d], rotated if the scheme does
    v: Array | None = None
    norms: Array | None = None  # float32 [tokens], of k as BF16 keeps it, over all kv heads and channels
    feedback: Array | None = None  # Layer.key_feedback, for a shaped scheme


class LayerCache:
    """One layer's keys and values of every row. arrays: those that `layout` names, on the back end of `ops`. table: the
    blocks of each row, int32 [rows, blocks] on the host."""

    row_arrays: tuple[str, ...]  # the arrays whose first axis are rows; of the others it are blocks

    def __init__(self, arrays: dict[str, Array], scheme: Scheme, ops: Backend, table: np.ndarray, index: int = 0):
        self.arrays, self.scheme, self.ops, self.xp = arrays, scheme, ops, ops.xp
        self.table, self.index = table, index

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int, blocks: int) -> Layout:
        """The arrays of one layer. Axes: batch or blocks, kv_heads, tokens (or groups of them), channels (or groups, or
        bytes)."""
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


class PlainCache(LayerCache):
    """Keys and values in BF16: nothing is quantized, and nothing is in blocks."""

    row_arrays = "keys", "values"

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int, blocks: int) -> Layout:
        return dict.fromkeys(("keys", "values"), ((batch, config.num_kv_heads, context, config.head_dim), BF16))

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

    row_arrays = *WINDOW_ARRAYS, *SINK_ARRAYS

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int, blocks: int) -> Layout:
        heads, dim = config.num_kv_heads, config.head_dim
        packed = scheme.packed_layout(BLOCK_TOKENS, dim)
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            name: ((blocks, heads, *shape), dtype) for name, (shape, dtype) in packed.items()
        }
        arrays |= dict.fromkeys(WINDOW_ARRAYS, ((batch, heads, scheme.ring, dim), BF16))
        if scheme.scale:  # of the window's tokens, too
            arrays["norms"] = (blocks, BLOCK_TOKENS), np.float32
        if scheme.sinks:
            arrays |= dict.fromkeys(SINK_ARRAYS, ((batch, heads, scheme.sinks, dim), BF16))
        return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}

    def append(self, new: NewTokens, batch: Batch) -> None:
        """Packs what is to be packed of the window and the new tokens; the rest of these goes into the window."""
        for (slot, start, span), packed in zip(batch.spans(), batch.packed, strict=True):
            rows = [x[span].astype(BF16).swapaxes(0, 1) for x in (new.k, new.v)]  # [heads, n, d]
            end = start + span.stop - span.start
            if new.norms is not None:
                self.put_norms(slot, start, new.norms[span])
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
        norms = self.norms(slot, tokens.stop)[first:] if scheme.scale else None
        packed = scheme.pack(keys, values, norms, self.xp, feedback)
        for begin in range(first - first % BLOCK_TOKENS, tokens.stop, BLOCK_TOKENS):  # of each block
            block = self.table[slot, begin // BLOCK_TOKENS]
            low, high = max(first, begin), min(begin + BLOCK_TOKENS, tokens.stop)
            for name, array in packed.items():
                of, at = slice(low - first, high - first), slice(low - begin, high - begin)
                of, at = (self.scaled(tokens_of, array.shape[1], keys.shape[1]) for tokens_of in (of, at))
                self[name][block][:, at] = array[:, of]

    @staticmethod
    def scaled(tokens: slice, groups: int, of: int) -> slice:
        """Tokens as indices of an array that has `groups` entries for `of` tokens."""
        return slice(tokens.start * groups // of, tokens.stop * groups // of)

    def put_norms(self, slot: int, start: int, norms: Array) -> None:
        at = np.arange(start, start + len(norms))
        blocks, offsets = map(self.xp.asarray, (self.table[slot, at // BLOCK_TOKENS], at % BLOCK_TOKENS))
        self["norms"][blocks, offsets] = norms

    def norms(self, slot: int, tokens: int) -> Array:
        """Of a row's first tokens; float32 [tokens]."""
        return self["norms"][self.block_ids(slot, tokens)].reshape(-1)[:tokens]

    def block_ids(self, slot: int, tokens: int) -> Array:
        """Where a row's first tokens are; int32 [blocks]."""
        return self.xp.asarray(self.table[slot, : blocks_of(tokens)])

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
        norms = self.norms(slot, tokens) if self.scheme.scale else None
        return self.scheme.unpack(self.packed_row(slot, tokens), norms, self.xp)

    def packed_row(self, slot: int, tokens: int) -> dict[str, Array]:
        """The packed tokens of a row: the arrays of `Scheme.packed_layout`, each with kv heads in front."""
        ids, row = self.block_ids(slot, tokens), {}
        for name, (shape, _) in self.scheme.packed_layout(tokens, self["window_keys"].shape[3]).items():
            of_blocks = self[name][ids].swapaxes(0, 1)  # [heads, blocks, of a block, ...]
            row[name] = of_blocks.reshape(len(of_blocks), -1, *of_blocks.shape[3:])[:, : shape[0]]
        return row

    def import_packed(self, slot: int, row: dict[str, np.ndarray], packed: int) -> None:
        """The inverse of `packed_row`."""
        for name, (shape, _) in self.scheme.packed_layout(BLOCK_TOKENS, self["window_keys"].shape[3]).items():
            for i, block in enumerate(self.table[slot, : blocks_of(packed)]):
                part = row[name][:, i * shape[0] : (i + 1) * shape[0]]
                self[name][block, :, : part.shape[1]] = self.xp.asarray(part)


def widen(x: Array) -> Array:
    """BF16 -> float32, exactly: the upper half of the word. (NumPy's own conversion of ml_dtypes takes three times as
    long.)"""
    return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def blocks_of(tokens: int) -> int:
    """Blocks that so many tokens of a row lie in."""
    return -(-tokens // BLOCK_TOKENS)


def array_cache(scheme: Scheme) -> type[LayerCache]:
    """The kind of cache, in array code, that a scheme wants."""
    return PackedCache if scheme.quantized else PlainCache
