"""What a layer keeps on a card: caches that kernels fill and read, packed blocks as pages (kernels/LAYOUT.md).

A pass over new tokens (a `Batch`) is a prefill: rotate, attend to the packed past and to each other, pack. One token a row (a
`StepBatch`) is a decode step: rotation puts it into its slot at once, and all layers are packed together behind the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import oscar
from ..cache import Batch, LayerCache, Layout, NewTokens, PackedCache, PlainCache
from ..config import Config
from ..oscar import WINDOW, Scheme
from . import attention, layout, prefill
from .decode import StepBatch
from .layout import PAGE_TOKENS

if TYPE_CHECKING:
    from ..weights import Layer

Array = Any
IN_CACHE = NewTokens()


def kernel_cache(config: Config, scheme: Scheme) -> type[KernelCache] | None:
    """The kind of cache that has kernels for this scheme and head size; None: there are none."""
    if scheme.quantized:
        return PagedCache if attention.unsupported(scheme, config.head_dim) is None else None
    return KernelPlainCache if config.head_dim in attention.HEAD_DIMS else None


class KernelCache(LayerCache):
    """What plain and packed ones have in common. slots: where a decode step puts the newest token of each row."""

    @property
    def slots(self) -> tuple[Array, Array]:
        """Keys and values, bf16 [batch, kv_heads, slots, d]; the token at position p goes to slot p % slots."""
        raise NotImplementedError

    @property
    def past_arrays(self) -> tuple[Array, Array] | None:
        """Keys and values that a prefill reads where they are; None: they are unpacked for it."""
        raise NotImplementedError

    def unpack(self, to: prefill.Past, batch: Batch) -> None:
        """Packed tokens, back in BF16, for the time of a layer."""

    def rotate_scale(
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], config: Config, batch: Batch | StepBatch
    ) -> tuple[Array, NewTokens]:
        """`Reference.rotate_scale`; the norms of the new tokens go into the cache at once, and so does all of a decode step's."""
        ops, heads = self.ops, attention.Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        q, norms = ops.xp.empty((len(qkv), heads.q_heads, heads.head_dim), ops.dtype), self.arrays.get("norms")
        options = {"norms": norms, "norm_stride": 0 if norms is None else norms.shape[1], "eps": config.rms_norm_eps}
        options |= {"rotate": self.scheme.rotate, "q_weight": layer.q_norm, "k_weight": layer.k_norm}
        if isinstance(batch, StepBatch):
            keys, values = self.slots
            options |= {"keys": keys, "values": values, "capacity": keys.shape[2]}
            ops.run(attention.rotate_scale(heads, qkv, batch.lengths, *tables, q, **options))
            return q, IN_CACHE
        at, k = ops.indices_of(batch), ops.xp.empty((len(qkv), heads.kv_heads, heads.head_dim), ops.dtype)
        ops.run(attention.rotate_scale(heads, qkv, at.positions, *tables, q, slots=at.rows, k_out=k, **options))
        return q, NewTokens(k, qkv.reshape(len(qkv), -1, heads.head_dim)[:, heads.q_heads + heads.kv_heads :])

    def attend(self, q: Array, new: NewTokens, batch: Batch | StepBatch) -> Array:
        if isinstance(batch, StepBatch):
            return batch.attend(q, self)
        ops, at, (kv_heads, dim) = self.ops, self.ops.indices_of(batch), new.k.shape[1:]
        xp, heads, longest = ops.xp, attention.Heads(q.shape[1], kv_heads, dim), max(batch.starts)
        past = plain = self.past_arrays if longest else None
        if tiled := prefill.tiled(dim, ops.capability):
            shape = at.tiles, kv_heads, prefill.TILE_TOKENS, dim
            past = prefill.Tiles(xp.empty(shape, ops.dtype), xp.empty(shape, ops.dtype), at.first_tiles)
        elif longest and plain is None:
            shape = len(batch.slots), kv_heads, -(-longest // PAGE_TOKENS) * PAGE_TOKENS, dim
            past = xp.empty(shape, ops.dtype), xp.empty(shape, ops.dtype)
        if longest:
            self.unpack(past, batch)
        tokens = self._tokens(new, batch, at.slots if plain else None)
        if tiled:
            ops.run(prefill.fill_tiles(heads, tokens, plain, batch.end, past))
        out, card = xp.empty_like(q), (ops.multiprocessors, ops.capability)
        split = plan = prefill.split_plan(heads, tokens.max_count, len(batch.slots), longest, *card)
        if plan is not None:
            split = plan, xp.empty(plan.workspace_floats(dim), np.float32), xp.zeros(plan.blocks, np.int32)
        options = {"split": split, "multiprocessors": ops.multiprocessors}
        ops.run(prefill.prefill_attention(heads, q, tokens, past, out, ops.capability, **options))
        return out

    def _tokens(self, new: NewTokens, batch: Batch, slots: Array | None) -> attention.PrefillTokens:
        at, strides = self.ops.indices_of(batch), (new.k.strides[0] // 2, new.v.strides[0] // 2)
        return attention.PrefillTokens(new.k, new.v, *strides, at.firsts, slots, at.starts, at.counts, max(batch.counts))


class KernelPlainCache(KernelCache, PlainCache):
    @property
    def slots(self) -> tuple[Array, Array]:
        return self["keys"], self["values"]

    past_arrays = slots

    def append(self, new: NewTokens, batch: Batch | StepBatch) -> None:
        if new is not IN_CACHE:
            super().append(new, batch)


class PagedCache(KernelCache, PackedCache):
    past_arrays = None

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int) -> Layout:
        packed = scheme.packed_layout(context // WINDOW * WINDOW, config.head_dim)
        others = {name: of for name, of in super().layout(config, scheme, batch, context).items() if name not in packed}
        page = batch, config.num_kv_heads, context // WINDOW * WINDOW // PAGE_TOKENS, attention.page_bytes(scheme, config.head_dim)
        return {"pages": (page, np.dtype(np.uint8)), **others}

    @property
    def slots(self) -> tuple[Array, Array]:
        return self["window_keys"], self["window_values"]

    def unpack(self, to: prefill.Past, batch: Batch) -> None:
        at, (_, kv_heads, _, dim) = self.ops.indices_of(batch), self["window_keys"].shape
        heads = attention.Heads(kv_heads, kv_heads, dim)  # q heads play no part here
        self.ops.run(prefill.unpack(heads, self.scheme, at.slots, at.starts, max(batch.starts), self.arrays, to))

    def append(self, new: NewTokens, batch: Batch | StepBatch) -> None:
        if new is IN_CACHE:
            return
        heads, tokens = attention.Heads(new.k.shape[1], *new.k.shape[1:]), self._tokens(new, batch, self.ops.indices_of(batch).slots)
        if new.norms is not None:  # else rotate_scale has put them there
            for slot, start, span in batch.spans():
                room = self["norms"].shape[1] - start  # a last partial block has none, nor needs it
                self["norms"][slot, start : start + span.stop - span.start] = new.norms[span][: max(room, 0)]
        self.ops.run(attention.pack_bulk(heads, self.scheme, tokens, self.arrays))
        self.ops.run(attention.fill_window(heads, self.scheme, tokens, self.arrays))

    def packed(self, slot: int, tokens: int) -> tuple[Array, Array]:
        scheme, dim, xp = self.scheme, self["window_keys"].shape[3], self.xp
        found = layout.unpack(self["pages"][slot, :, : tokens // PAGE_TOKENS], scheme, dim, xp)
        norms = self["norms"][slot, :tokens] if scheme.scale else None
        keys = oscar.dequantize_keys(found["key_codes"], found["key_step"], found["key_min"], norms, scheme, xp)
        return keys, oscar.dequantize_values(found["value_codes"], found["value_step"], found["value_min"], scheme, xp)

    def export_row(self, slot: int, length: int, config: Config) -> dict[str, np.ndarray]:
        rows = self["pages"][slot, :, : length // WINDOW * WINDOW // PAGE_TOKENS]
        plain = layout.plain(rows, self.scheme, config.head_dim, self.xp) if rows.shape[1] else {}
        whole = {name: array[slot : slot + 1] for name, array in self.arrays.items()} | {name: x[None] for name, x in plain.items()}
        return PackedCache(whole, self.scheme, self.ops).export_row(0, length, config)

    def import_row(self, slot: int, row: dict[str, np.ndarray]) -> None:
        if "key_codes" in row:
            packed = {name: self.xp.asarray(row[name]) for name in row if name in layout.NAMES}
            found = layout.pages(packed, self.scheme, self["pages"].shape[-1], self.xp)
            self["pages"][slot, :, : found.shape[1]] = found
        super().import_row(slot, {name: array for name, array in row.items() if name not in layout.NAMES})
