"""Launches of the attention of a prefill: a packed past back to BF16, and the attention itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cache import BF16
from ..machine import Card
from ..oscar import Scheme
from ..pages import PAGE_TOKENS, layout_defines
from ..plans import Heads, prefill_plan
from ..sm90 import prefill_attention as sm90
from ..sm90.prefill_attention import KeySplits, Tiles
from .attention import PrefillTokens, log2_scale
from .launch import Launch

Array = Any
Past = tuple[Array, Array] | Tiles


def unpack(
    heads: Heads, scheme: Scheme, slots: Array | None, starts: Array, max_start: int, cache: dict[str, Array], to: Past,
    packed: Array | None = None,
) -> Launch:
    """The first starts[s] tokens, at most `max_start`, of row slots[s] (None: s) -> tiles, or row s of `to`. packed: as
    `PrefillTokens` has it."""
    tiles = isinstance(to, Tiles)
    keys, values, first = (to.keys, to.values, to.first) if tiles else (*to, None)
    sizes = heads.kv_heads, cache["table"].shape[1], scheme.sinks, 0 if tiles else keys.shape[2]
    names = "pages", "norms", "table", "sink_keys", "sink_values", "window_keys", "window_values"
    arrays = map(cache.get, names)
    args = (*arrays, slots, starts, packed, first, keys, values, *map(np.int32, sizes))
    grid = -(-max_start // PAGE_TOKENS), heads.kv_heads, starts.shape[0]
    defines = (*layout_defines(scheme, heads.head_dim), f"TILED={tiles:d}")
    return Launch("unpack.cu", "unpack", defines, grid, 2 * heads.head_dim, args)


def prefill_attention(
    heads: Heads, q: Array, new: PrefillTokens, past: Past | None, out: Array, card: Card, *,
    scale: float | None = None, splits: KeySplits | None = None,
) -> Launch:
    """q [tokens, q_heads, d] -> out, both bf16: each new token over those before it and itself. scale: as
    `log2_scale` has it.

    past: keys and values of the older tokens, bf16 [rows, kv_heads, capacity, d], row new.slots[s] (None: s) of
    sequence s; None where new.starts are all 0. Where `sm90.tiled` says so, the tiles of all tokens instead, and
    splits of keys by `sm90.split_plan`.
    """
    scale_log2 = log2_scale(heads.head_dim, scale)
    if isinstance(past, Tiles):
        return sm90.attend_to_tiles(heads, q, new, past, out, card, scale_log2, splits or sm90.WHOLE)
    d, q_per_kv, plan = heads.head_dim, heads.q_heads // heads.kv_heads, prefill_plan(heads.head_dim, card)
    names = "BLOCK_WARPS", "ROW_TILES", "TILE", "BLOCKS_PER_SM"
    defines = f"HEAD_DIM={d}", f"Q_PER_KV={q_per_kv}", *(f"{name}={n}" for name, n in zip(names, plan, strict=True))
    grid = -(-new.max_count * q_per_kv // (plan.warps * plan.row_tiles * 16)), heads.kv_heads, new.starts.shape[0]
    keys, values = past if past else (None, None)
    indices = new.first_rows, new.slots, new.starts, new.counts
    q_stride = q.strides[0] // BF16.itemsize  # of a slice of the qkv projection more than its own numbers
    sizes = q_stride, new.key_stride, new.value_stride, heads.kv_heads, keys.shape[2] if past else 0
    args = (q, new.keys, new.values, keys, values, *indices, out, *map(np.int32, sizes), scale_log2)
    return Launch("prefill_attention.cu", "prefill_attention", defines, grid, 32 * plan.warps, args, plan.shared(d))
