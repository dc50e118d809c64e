"""Launches of rotation, packing and decode attention; those of a prefill are in prefill.py, plans in plans.py.

Every function returns a `Launch`, whose arrays are contiguous, on the device, with shapes as the kernel's file says. A
quantized cache is, per layer: pages uint8 [blocks, kv_heads, 2, page_bytes] · norms float32 [blocks, 128] ·
sink_keys, sink_values bf16 [batch, kv_heads, sinks, d] · window_keys, window_values bf16 [batch, kv_heads, ring, d];
and table int32 [batch, blocks of a row], one for all layers: which blocks a row has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..oscar import Scheme
from ..pages import PAGE_TOKENS, layout_defines
from ..plans import DecodePlan, Heads, feedback_bytes, shared_bytes
from .launch import Launch

Array = Any
ROTATED_DIMS = (64, 128)  # of heads that decode_merge.cuh rotates
HEADS_PER_BLOCK = 16  # of rotate_scale.cu


# --- rotate, scale, append; pack


@dataclass(frozen=True)
class Rotation:
    """What a layer does to its queries and keys: QK-norm, RoPE, and H where `rotate` says so; H to its values."""

    heads: Heads
    cos: Array  # float32 [positions, d/2]
    sin: Array
    rotate: bool
    q_weight: Array | None = None  # of the QK-norm, bf16 [d]; None: there is none
    k_weight: Array | None = None
    eps: float = 0.0
    rotate_values: bool = False
    shifts: Array | None = None  # int32 [tokens]: row of the tables minus position; None: of all 0
    keys: tuple[int, Any] | None = None  # `Config.shared_keys`


@dataclass(frozen=True)
class KeyOutputs:
    """Where `rotate_scale` writes keys, values and norms; what is None is not written."""

    k_out: Array | None = None  # bf16 [tokens, kv_heads, d]
    keys: Array | None = None  # of a cache, bf16 [rows, kv_heads, capacity, d]: to slot position % capacity
    values: Array | None = None  # of the cache, or [tokens, kv_heads, d] beside k_out
    norms: Array | None = None  # float32 [blocks, 128]
    table: Array | None = None  # int32 [rows, blocks of a row], where there are norms
    slots: Array | None = None  # int32 [tokens], the row of each token; None: row t, as in a decode step


def rotate_scale(rotation: Rotation, qkv: Array, positions: Array, q_out: Array, to: KeyOutputs) -> Launch:
    """qkv [tokens, config.qkv_size] -> q_out [tokens, q_heads, d]; K', V and norms go where `to` says."""
    r, lanes_per_head = rotation, rotation.heads.head_dim // 16
    capacity, stride = 1 if to.keys is None else to.keys.shape[2], 0 if to.table is None else to.table.shape[1]
    sizes = map(np.int32, (r.heads.q_heads, r.heads.kv_heads, capacity, stride, r.rotate + 2 * r.rotate_values))
    outputs = q_out, to.k_out, to.keys, to.values, to.norms, to.table
    args = qkv, r.q_weight, r.k_weight, r.cos, r.sin, positions, to.slots, *outputs, *sizes, np.float32(r.eps)
    grid = positions.shape[0], 1 + -(-r.heads.q_heads // HEADS_PER_BLOCK)
    defines = (f"HEAD_DIM={r.heads.head_dim}",)
    if r.keys is not None:
        args, defines = (*args, np.int32(r.keys[0]), r.keys[1]), (*defines, "SHARED_KEYS=1")
    if r.shifts is not None:
        args, defines = (*args, r.shifts), (*defines, "SHIFTED=1")
    return Launch("rotate_scale.cu", "rotate_scale", defines, grid, HEADS_PER_BLOCK * lanes_per_head, args)


def rotate_heads(x: Array, head_dim: int, axis: int) -> Launch:
    """x bf16 [rows, columns] or [rows], in place: every head_dim numbers along `axis`, a head, times H."""
    inner, columns = math.prod(x.shape[axis + 1 :]), x.size // head_dim
    defines = (f"HEAD_DIM={head_dim}",)
    if inner == 1:  # a head's numbers are neighbours
        grid, block = (-(-columns // HEADS_PER_BLOCK),), HEADS_PER_BLOCK * head_dim // 16
        return Launch("rotate_scale.cu", "rotate_heads", defines, grid, block, (x, np.int32(columns)))
    args = x, np.int32(columns), np.int32(inner)
    return Launch("rotate_weights.cu", "rotate_weights", defines, (-(-columns // 32),), 256, args)


@dataclass(frozen=True)
class PrefillTokens:
    """Tokens of a prefill on their way into the cache: row slots[s] has starts[s] tokens, packed[s] of them packed, and
    gets counts[s]."""

    keys: Array  # bf16 [tokens, kv_heads, d]
    values: Array
    key_stride: int  # numbers from one token to the next
    value_stride: int
    first_rows: Array  # int32 [sequences]: index of each sequence's first token
    slots: Array | None  # int32 [sequences]; None: row s
    starts: Array
    counts: Array
    max_count: int
    packed: Array | None = None  # int32 [sequences]; None: as many as in rows that were not cut


def pack_step(
    heads: Heads, scheme: Scheme, lengths: Array, cache: dict[str, Array], layers: int = 1,
    feedback: Array | None = None
) -> Launch:
    """After the attention of a decode step: packs the oldest tokens of every window that the row's new token (number
    lengths[b]) filled. With layers > 1 every array of the cache has one more axis in front and this one launch packs
    all layers. feedback: float32 [layers, kv_heads, d, d] (`Weights.key_feedback`), for a shaped scheme."""
    sizes = map(np.int32, (lengths.shape[0], cache["pages"].shape[-4]))
    args = lengths, *_packed(cache), *sizes, *_packing(heads, scheme, cache, feedback)
    grid = 2 * (scheme.flush // PAGE_TOKENS), layers * heads.kv_heads
    return _pack_launch("pack_step", heads, scheme, grid, args)


def pack_bulk(
    heads: Heads, scheme: Scheme, new: PrefillTokens, cache: dict[str, Array], feedback: Array | None = None
) -> Launch:
    """After a prefill: packs what is to be packed now, from the window and from the new tokens. feedback: float32
    [kv_heads, d, d], for a shaped scheme."""
    tokens = new.keys, new.values, new.first_rows, new.slots, new.starts, new.counts, new.packed
    strides = map(np.int32, (new.key_stride, new.value_stride))
    args = *tokens, *_packed(cache), *strides, *_packing(heads, scheme, cache, feedback)
    pages = max((scheme.flush - 1 + new.max_count) // scheme.flush, 1) * (scheme.flush // PAGE_TOKENS)
    grid = 2 * pages, heads.kv_heads, new.starts.shape[0]
    return _pack_launch("pack", heads, scheme, grid, args)


def _pack_launch(name: str, heads: Heads, scheme: Scheme, grid: tuple[int, ...], args: tuple[Any, ...]) -> Launch:
    shared = feedback_bytes(scheme, heads.head_dim) if scheme.shaped else 0
    return Launch("pack.cu", name, pack_defines(scheme, heads.head_dim), grid, heads.head_dim, args, shared)


def pack_defines(scheme: Scheme, head_dim: int) -> tuple[str, ...]:
    """Of pack.cu."""
    return *layout_defines(scheme, head_dim), f"SHAPED={scheme.shaped:d}", f"DITHERED={scheme.dithered:d}"


def _packed(cache: dict[str, Array]) -> tuple[Array | None, ...]:
    names = "window_keys", "window_values", "sink_keys", "sink_values", "norms", "pages", "table"
    return tuple(map(cache.get, names))


def _packing(heads: Heads, scheme: Scheme, cache: dict[str, Array], feedback: Array | None) -> tuple[Any, ...]:
    if scheme.shaped and feedback is None:
        raise ValueError(f"{scheme.name} needs the feedback matrices of its layers; key_shaping puts them there")
    sizes = heads.kv_heads, cache["table"].shape[1], scheme.sinks
    of_values = scheme.shrink_of_values / ((2**scheme.value_bits - 1) / 2 if scheme.symmetric_values else 1)
    return *map(np.int32, sizes), np.float32(scheme.shrink), np.float32(of_values), feedback


def fill_window(heads: Heads, scheme: Scheme, new: PrefillTokens, cache: dict[str, Array]) -> Launch:
    """After `pack_bulk`: the tokens that are not packed."""
    sizes = map(np.int32, (new.key_stride, new.value_stride, heads.kv_heads))
    window = cache["window_keys"], cache["window_values"]
    args = (new.keys, new.values, new.first_rows, new.slots, new.starts, new.counts, *window, *sizes)
    grid = heads.kv_heads, new.starts.shape[0]
    return Launch("pack.cu", "fill_window", pack_defines(scheme, heads.head_dim), grid, 256, args)


# --- decode attention


@dataclass(frozen=True)
class DecodeState:
    """The same for all layers and steps. Row b of a step is row b of the cache, and of the table."""

    heads: Heads
    scheme: Scheme
    plan: DecodePlan
    lengths: Array  # int32 [batch]: tokens of each row before `added` new ones; -1: the row is not in use
    tasks: Array  # int32 [plan.task_shape]
    workspace: Array  # float32 [plan.workspace_floats(d)]
    split_counter: Array  # int32 [plan.counters(d)], zero between launches
    table: Array | None = None  # the cache's, if it is quantized
    added: int = 1
    rotated: bool = False  # heads of the result times H

    @classmethod
    def allocate(
        cls, xp: Any, heads: Heads, scheme: Scheme, plan: DecodePlan, lengths: Array, table: Array | None = None,
        rotated: bool = False,
    ) -> DecodeState:
        floats, counters = plan.workspace_floats(heads.head_dim), plan.counters(heads.head_dim)
        tasks, workspace = xp.empty(plan.task_shape, np.int32), xp.empty(floats, np.float32)
        made = tasks, workspace, xp.zeros(counters, np.int32)
        return cls(heads, scheme, plan, lengths, *made, table, rotated=rotated)

    def source(self, out_bf16: bool) -> tuple[str, tuple[str, ...]]:
        """File and macros of the kernels."""
        p, dim = self.plan, self.heads.head_dim
        config = f"Q_PER_KV={p.q_per_kv}", f"Q_GROUPS={p.q_groups}", f"BLOCK_WARPS={p.warps}", f"STAGES={p.stages}"
        config = *config, f"OUT_BF16={out_bf16:d}"
        config = (*config, "ROTATED=1") if self.rotated else config
        if self.scheme.quantized:
            return "decode_attention.cu", (*layout_defines(self.scheme, dim), *config)
        return "decode_attention_bf16.cu", (f"HEAD_DIM={dim}", *config)


def schedule(state: DecodeState) -> Launch:
    """Which warp attends to what: lengths and table -> tasks, for every layer of one step. Before it every launch of
    `decode_attention` with this workspace must have ended; after it the first one has parity 0."""
    (file, defines), p, batch = state.source(True), state.plan, state.lengths.shape[0]
    sizes = batch, state.heads.kv_heads, state.scheme.sinks, state.added, *_blocks_of_row(state)
    args = state.lengths, *_table(state), state.tasks, state.workspace, *map(np.int32, sizes)
    return Launch(file, "schedule", defines, (p.blocks,), p.warps * 32, args, 4 * (2 * batch + 1))


def decode_attention(
    state: DecodeState, q: Array, cache: dict[str, Array], out: Array, *, parity: int, lse: Array | None = None
) -> Launch:
    """q [batch, q_heads, d] bf16 -> out, bf16 or float32, over lengths[b] + added tokens of each row, split as
    `schedule` says.

    The launch directly before may write q and the newest token of each row; all else must come from launches before
    that one. parity: 0 for the first launch with this workspace after `schedule`, then 1, 0, 1 ...; with another one
    the results are wrong. lse: float32 [batch, q_heads] or None, not written for a row without tokens.
    """
    s, batch = state, state.lengths.shape[0]
    results = s.lengths, s.tasks, out, lse, s.workspace, s.split_counter
    if s.scheme.quantized:
        names = "pages", "norms", "sink_keys", "sink_values", "window_keys", "window_values"
        sizes = batch, s.heads.kv_heads, *_blocks_of_row(s), s.scheme.sinks, s.added, parity
    else:
        names = "keys", "values"
        sizes = batch, s.heads.kv_heads, cache["keys"].shape[-2], s.added, parity
    args = q, *map(cache.get, names), *_table(s), *results, *map(np.int32, sizes), log2_scale(s.heads.head_dim)
    file, defines = s.source(out.dtype.itemsize == 2)
    shared = shared_bytes(s.heads.head_dim, s.scheme, s.plan, batch)
    return Launch(file, file.removesuffix(".cu"), defines, (s.plan.blocks,), s.plan.warps * 32, args, shared)


def _table(state: DecodeState) -> tuple[Array, ...]:
    return (state.table,) if state.scheme.quantized else ()


def _blocks_of_row(state: DecodeState) -> tuple[int, ...]:
    return tuple(table.shape[1] for table in _table(state))


def log2_scale(head_dim: int, scale: float | None = None) -> np.float32:
    """Of the logits (None: 1 / sqrt(d)) as the kernels take it, whose exponential is 2^x."""
    return np.float32((scale or 1 / math.sqrt(head_dim)) * math.log2(math.e))
