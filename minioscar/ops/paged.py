"""A layer's cache on a card: kernels fill and read it, packed blocks as pages (kernels/LAYOUT.md).

A pass over new tokens (a `Batch`) is a prefill: rotate, attend to the packed past and to each other, pack. One token a
row (a `StepBatch`) is a decode step: rotation puts it into its slot, one launch after the last layer packs all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import pages
from ..batch import Batch
from ..config import Config
from ..layer_cache import BLOCK_TOKENS, LayerCache, Layout, NewTokens, PackedCache, PlainCache
from ..oscar import Scheme
from ..pages import NAMES, PAGE_TOKENS, page_bytes, unsupported
from ..plans import Heads
from ..sm90 import prefill_attention as sm90
from ..sm90.prefill_attention import TILE_TOKENS
from . import attention, prefill
from .attention import KeyOutputs, PrefillTokens, Rotation
from .decode import StepBatch

if TYPE_CHECKING:
    from ..weights import Layer

Array = Any
IN_CACHE = NewTokens()


def kernel_cache(config: Config, scheme: Scheme) -> type[KernelCache] | None:
    """The kind of cache that has kernels for this scheme and head size; None: there are none."""
    if unsupported(scheme, config.head_dim):
        return None
    return PagedCache if scheme.quantized else KernelPlainCache


@dataclass(frozen=True)
class Indices:
    """A batch of new tokens as the kernels of a prefill take it: int32 arrays on the device."""

    batch: Batch
    positions: Array  # [tokens]
    rows: Array  # [tokens]: the cache row of each
    slots: Array  # [sequences]
    starts: Array
    counts: Array
    packed: Array
    firsts: Array  # [sequences]: index of each sequence's first token
    first_tiles: Array  # [sequences]: of sm90's Tiles
    tiles: int  # of sm90's Tiles, of all sequences
    shifts: Array | None  # [tokens]: what a token's row of the tables of RoPE is more than its position; None: all 0

    @classmethod
    def of(cls, batch: Batch, xp: Any) -> Indices:
        rows, firsts = np.repeat(batch.slots, batch.counts), np.cumsum(batch.counts) - batch.counts
        tiles = -(-np.add(batch.starts, batch.counts) // TILE_TOKENS)
        fields = batch.positions, rows, batch.slots, batch.starts, batch.counts, batch.packed, firsts
        fields = *fields, np.cumsum(tiles) - tiles
        arrays = (xp.asarray(np.asarray(x, np.int32)) for x in fields)
        shifts = batch.table_rows - batch.positions
        shifts = xp.asarray(shifts.astype(np.int32)) if batch.inputs is not None or shifts.any() else None
        return cls(batch, *arrays, int(tiles.sum()), shifts)


class KernelCache(LayerCache):
    """What plain and packed ones have in common.

    ring: keys and values, bf16 [batch, kv_heads, slots, d], into which a decode step puts the newest token of each row:
    position p is in slot p % slots. past_arrays: keys and values that a prefill reads in place; None: it unpacks them.
    """

    ring: tuple[Array, Array]
    past_arrays: tuple[Array, Array] | None

    def unpack(self, to: prefill.Past, batch: Batch) -> None:
        """Packed tokens, back in BF16, for the time of a layer."""

    def rotate_scale(
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], config: Config, batch: Batch | StepBatch,
        rotate_values: bool = False,
    ) -> tuple[Array, NewTokens]:
        """`Reference.rotate_scale`; norms go into the cache at once, and so do a decode step's keys and values."""
        ops, heads, norms = self.ops, Heads.of(config), (self.arrays.get("norms"), self["table"])
        norm = layer.q_norm, layer.k_norm, config.rms_norm_eps
        at = None if isinstance(batch, StepBatch) else ops.indices_of(batch)
        shifts = batch.shifts if at is None else at.shifts
        rotation = Rotation(heads, *tables, self.scheme.rotate, *norm, rotate_values, shifts, config.shared_keys)
        q = ops.xp.empty((len(qkv), heads.q_heads, heads.head_dim), ops.dtype)
        if at is None:
            keys, values = self.ring
            ops.run(attention.rotate_scale(rotation, qkv, batch.lengths, q, KeyOutputs(None, keys, values, *norms)))
            return q, IN_CACHE
        k = ops.xp.empty((len(qkv), heads.kv_heads, heads.head_dim), ops.dtype)
        v = ops.xp.empty_like(k) if rotate_values else None  # else it is read where the projection has put it
        to = KeyOutputs(k, None, v, *norms, at.rows)
        ops.run(attention.rotate_scale(rotation, qkv, at.positions, q, to))
        if v is None:
            v = qkv.reshape(len(qkv), -1, heads.head_dim)[:, -heads.kv_heads :]
        return q, NewTokens(k, v, feedback=layer.key_feedback if self.scheme.shaped else None)

    def attend(self, q: Array, new: NewTokens, batch: Batch | StepBatch) -> Array:
        if isinstance(batch, StepBatch):
            return batch.attend(q, self)
        ops, at, longest = self.ops, self.ops.indices_of(batch), max(batch.starts)
        xp, heads = ops.xp, Heads(q.shape[1], *new.k.shape[1:])
        past = plain = self.past_arrays if longest else None
        if tiled := sm90.tiled(heads.head_dim, ops.card):
            past = sm90.Tiles.allocate(xp, heads, at.tiles, at.first_tiles)
        elif longest and plain is None:
            shape = len(batch.slots), heads.kv_heads, -(-longest // PAGE_TOKENS) * PAGE_TOKENS, heads.head_dim
            past = xp.empty(shape, ops.dtype), xp.empty(shape, ops.dtype)
        if longest:
            self.unpack(past, batch)
        tokens = self._tokens(new, batch, at.slots if plain else None)
        if tiled:
            ops.run(sm90.fill_tiles(heads, tokens, plain, batch.end, past))
        out, plan = xp.empty_like(q), sm90.split_plan(heads, tokens.max_count, len(batch.slots), longest, ops.card)
        splits = None if plan is None else sm90.KeySplits.allocate(xp, plan, heads.head_dim)
        ops.run(prefill.prefill_attention(heads, q, tokens, past, out, ops.card, splits=splits))
        return out

    def _tokens(self, new: NewTokens, batch: Batch, slots: Array | None) -> PrefillTokens:
        at, strides = self.ops.indices_of(batch), (new.k.strides[0] // 2, new.v.strides[0] // 2)
        rows = at.firsts, slots, at.starts, at.counts
        return PrefillTokens(new.k, new.v, *strides, *rows, max(batch.counts), at.packed)


class KernelPlainCache(KernelCache, PlainCache):
    @property
    def ring(self) -> tuple[Array, Array]:
        return self["keys"], self["values"]

    past_arrays = ring

    def append(self, new: NewTokens, batch: Batch | StepBatch) -> None:
        if new is not IN_CACHE:
            super().append(new, batch)


class PagedCache(KernelCache, PackedCache):
    past_arrays = None

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int, blocks: int) -> Layout:
        arrays = super().layout(config, scheme, batch, context, blocks)
        shape = blocks, config.num_kv_heads, BLOCK_TOKENS // PAGE_TOKENS, page_bytes(scheme, config.head_dim)
        others = {name: of for name, of in arrays.items() if name not in NAMES}
        return {"pages": (shape, np.dtype(np.uint8)), **others}

    @property
    def ring(self) -> tuple[Array, Array]:
        return self["window_keys"], self["window_values"]

    def unpack(self, to: prefill.Past, batch: Batch) -> None:
        at, (_, kv_heads, _, dim) = self.ops.indices_of(batch), self["window_keys"].shape
        heads = Heads(kv_heads, kv_heads, dim)  # q heads do not matter here
        rows = at.slots, at.starts, max(batch.starts)
        self.ops.run(prefill.unpack(heads, self.scheme, *rows, self.arrays, to, at.packed))

    def append(self, new: NewTokens, batch: Batch | StepBatch) -> None:
        if new is IN_CACHE:
            return
        heads = Heads(new.k.shape[1], *new.k.shape[1:])
        tokens = self._tokens(new, batch, self.ops.indices_of(batch).slots)
        if new.norms is not None:  # else rotate_scale has put them there
            for slot, start, span in batch.spans():
                self.put_norms(slot, start, new.norms[span])
        self.ops.run(attention.pack_bulk(heads, self.scheme, tokens, self.arrays, new.feedback))
        self.ops.run(attention.fill_window(heads, self.scheme, tokens, self.arrays))

    packed_row, import_packed = pages.packed_row, pages.import_packed
