"""Launches of the raw kernels: which file, which macros, which grid, in which order the arguments go. No arithmetic here.

Every function returns a `Launch`; `card.run` sends it to the card. Arrays are CuPy arrays (or what else the caller runs them on),
contiguous, with shapes as the kernel's file says. A cache of the quantized kind is, per layer (all in device memory):
pages uint8 [batch, kv_heads, pages, page_bytes] · norms float32 [batch, tokens] · sink_keys, sink_values bf16 [batch, kv_heads, sinks, d] ·
window_keys, window_values bf16 [batch, kv_heads, WINDOW, d]. `lengths` int32 [batch] counts the tokens before this step; -1 marks a row
that is not in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..oscar import WINDOW, Scheme

Array = Any
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
PAGE_TOKENS = 64
HEAD_DIMS = (64, 96, 128, 256)
SHARED_BYTES = {80: 163, 86: 99, 89: 99, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}  # KiB a block may have


def room(capability: int) -> int:
    """Dynamic shared memory of a block in bytes: a kibibyte is for what a kernel declares itself."""
    return SHARED_BYTES.get(capability, 99) * 1024 - 1024


@dataclass(frozen=True)
class Heads:
    """Of one attention layer."""

    q_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Launch:
    source: str
    name: str
    defines: tuple[str, ...]
    grid: tuple[int, ...]
    block: int
    args: tuple[Any, ...]
    shared: int = 0


@dataclass(frozen=True)
class TensorMap:
    """An argument: a matrix [rows, columns] of 16-bit numbers as the copy engine takes it in boxes of 64 columns (device.cuh, box_copy)."""

    array: Array
    box_rows: int


# --- the packed layout


def unsupported(scheme: Scheme, head_dim: int) -> str | None:
    """Why the packed kernels cannot hold this scheme, or None."""
    if scheme.shaped or type(scheme) is not Scheme:
        return f"{scheme.name}: pack.cu does not know how to choose its codes"
    if scheme.key_axis != "token":
        return f"{scheme.name}: key groups run along the channels of a token; the packed layout wants them along tokens"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if scheme.bits not in (2, 4) or scheme.group not in (32, 64) or scheme.value_group(head_dim) not in (32, 64):
        return f"{scheme.name}: {scheme.bits} bits in groups of {scheme.group} have no packed layout"
    return None


def page_bytes(scheme: Scheme, head_dim: int) -> int:
    """Bytes of 64 tokens of one kv head, keys and values."""
    codes = 2 * PAGE_TOKENS * head_dim * scheme.bits // 8
    keys = 2 * 2 * PAGE_TOKENS // scheme.group * head_dim
    return codes + keys + (1 if scheme.symmetric_values else 2) * 2 * PAGE_TOKENS * head_dim // scheme.value_group(head_dim)


def layout_defines(scheme: Scheme, head_dim: int) -> tuple[str, ...]:
    """Macros of layout.cuh. Raises ValueError where `unsupported` has a reason."""
    if reason := unsupported(scheme, head_dim):
        raise ValueError(reason)
    group = scheme.value_group(head_dim)
    flags = f"SYMMETRIC={scheme.symmetric_values:d}", f"SCALED={scheme.scale:d}"
    return f"HEAD_DIM={head_dim}", f"BITS={scheme.bits}", f"KEY_GROUP={scheme.group}", f"VALUE_GROUP={group}", *flags


# --- rotate, scale, append; pack


def rotate_scale(
    heads: Heads, qkv: Array, positions: Array, cos: Array, sin: Array, q_out: Array, *, rotate: bool, k_out: Array | None = None,
    keys: Array | None = None, values: Array | None = None, places: int = WINDOW, slots: Array | None = None,
    norms: Array | None = None, norm_stride: int = 0, q_weight: Array | None = None, k_weight: Array | None = None, eps: float = 0.0,
) -> Launch:
    """qkv [tokens, (q_heads + 2 kv_heads) * d] -> q_out, and K' to k_out, or K' and V to their place in keys, values."""
    tokens = positions.shape[0]
    together, lanes = (16, heads.head_dim // 16) if heads.head_dim in (64, 128, 256) else (8, 32)  # heads of a block, lanes of a head
    sizes = map(np.int32, (heads.q_heads, heads.kv_heads, places, norm_stride, rotate))
    args = (qkv, q_weight, k_weight, cos, sin, positions, slots, q_out, k_out, keys, values, norms, *sizes, np.float32(eps))
    grid = tokens, 1 + -(-heads.q_heads // together)
    return Launch("rotate_scale.cu", "rotate_scale", (f"HEAD_DIM={heads.head_dim}",), grid, together * lanes, args)


def rotate_weights(x: Array, head_dim: int, axis: int) -> Launch:
    """x bf16 [rows, columns] or [rows], in place: every head_dim numbers along `axis`, a head, times H."""
    inner = math.prod(x.shape[axis + 1 :])
    columns = x.size // head_dim
    args = x, np.int32(columns), np.int32(inner)
    return Launch("rotate_weights.cu", "rotate_weights", (f"HEAD_DIM={head_dim}",), (-(-columns // 32),), 256, args)


@dataclass(frozen=True)
class Arrivals:
    """Tokens of a prefill on their way into the cache. Row slots[s] held starts[s] tokens and gets counts[s], at most `most`.

    They are rows first_rows[s] ... of keys and values, bf16 [rows, kv_heads, d] whose rows are key_stride, value_stride numbers apart.
    first_rows, slots (None: row s), starts and counts are int32 [sequences] on the device.
    """

    keys: Array
    values: Array
    key_stride: int
    value_stride: int
    first_rows: Array
    slots: Array | None
    starts: Array
    counts: Array
    most: int


def pack_step(heads: Heads, scheme: Scheme, lengths: Array, cache: dict[str, Array], layers: int = 1) -> Launch:
    """After the attention of a decode step: packs the window of every row whose new token (number lengths[b]) filled it.

    With layers > 1 every array of the cache has one more axis in front and all layers are packed in this one launch.
    """
    args = lengths, *_packed(cache), np.int32(lengths.shape[0]), *_packing(heads, scheme, cache)
    grid = 2 * (WINDOW // PAGE_TOKENS), layers * heads.kv_heads
    return Launch("pack.cu", "pack_step", layout_defines(scheme, heads.head_dim), grid, heads.head_dim, args)


def pack_bulk(heads: Heads, scheme: Scheme, new: Arrivals, cache: dict[str, Array]) -> Launch:
    """After a prefill: packs every block that is full now, from the window and from the new tokens."""
    where = new.keys, new.values, new.first_rows, new.slots, new.starts, new.counts
    args = *where, *_packed(cache), *map(np.int32, (new.key_stride, new.value_stride)), *_packing(heads, scheme, cache)
    pages = max((WINDOW - 1 + new.most) // WINDOW, 1) * (WINDOW // PAGE_TOKENS)
    grid = 2 * pages, heads.kv_heads, new.starts.shape[0]
    return Launch("pack.cu", "pack", layout_defines(scheme, heads.head_dim), grid, heads.head_dim, args)


def _packed(cache: dict[str, Array]) -> tuple[Array | None, ...]:
    return tuple(cache.get(name) for name in ("window_keys", "window_values", "sink_keys", "sink_values", "norms", "pages"))


def _packing(heads: Heads, scheme: Scheme, cache: dict[str, Array]) -> tuple[np.generic, ...]:
    norms = cache.get("norms")
    sizes = heads.kv_heads, 0 if norms is None else norms.shape[-1], cache["pages"].shape[-2], scheme.sinks
    return *map(np.int32, sizes), np.float32(scheme.shrink), np.float32(scheme.shrink / ((2**scheme.bits - 1) / 2))


def fill_window(heads: Heads, scheme: Scheme, new: Arrivals, cache: dict[str, Array]) -> Launch:
    """After `pack_bulk`: the tokens behind the last full block."""
    sizes = map(np.int32, (new.key_stride, new.value_stride, heads.kv_heads))
    window = cache["window_keys"], cache["window_values"]
    args = (new.keys, new.values, new.first_rows, new.slots, new.starts, new.counts, *window, *sizes)
    return Launch("pack.cu", "fill_window", layout_defines(scheme, heads.head_dim), (heads.kv_heads, new.starts.shape[0]), 256, args)


# --- decode attention


# (warps, stages), best first
CUTS, BF16_CUTS = ((12, 2), (8, 2), (4, 2), (2, 2), (1, 2)), ((8, 2), (4, 3), (4, 2), (2, 2), (1, 2))


@dataclass(frozen=True)
class Plan:
    """How a decode kernel is cut: fixed for a model, a scheme, a batch and a card, so that one graph serves every step."""

    q_per_kv: int  # q heads of one unit of work; more than 8 that share a kv head are two such
    share: int
    warps: int
    stages: int
    blocks: int

    def workspace_floats(self, head_dim: int) -> int:
        """Two halves of two places a block; for 32 channels of a head their sums, and four numbers for all of them (merge.cuh)."""
        return 2 * 2 * self.blocks * self.q_per_kv * head_dim * 9 // 8

    def counters(self, head_dim: int) -> int:
        """Of what blocks merge together: one for every 64 channels of the q heads of a block."""
        return self.blocks * -(-self.q_per_kv * head_dim // 64)

    @property
    def task_shape(self) -> tuple[int, int, int]:
        """Of the schedule, int32, rows of four: two for each warp of a block, one for each of the two heads it shares (schedule.cuh)."""
        return self.blocks, 2 * self.warps + 2, 4


def plan(heads: Heads, scheme: Scheme, batch: int, multiprocessors: int, capability: int) -> Plan:
    """The most warps whose rings of copies fit, 8 where they were faster; a grid that cuts as few heads as possible.

    More warps hide more of a page's latency, fewer have fewer parts to merge at the end. On an H200 8 beat 12 with units of 6 KB or more
    (1 x 128K, version 13 of the notebook: oscar 29.4 against 29.9 µs, int2 28.6 against 28.1, int2-compact 27.8 against 26.2).
    """
    together = heads.q_heads // heads.kv_heads
    share = next(s for s in range(1, together + 1) if together % s == 0 and together // s <= 8)
    work = batch * heads.kv_heads * share
    even = (n for n in range(multiprocessors * 15 // 16, multiprocessors + 1) if n % work == 0 or work % n == 0)
    blocks = max(even, default=multiprocessors)
    plans = [Plan(together // share, share, warps, stages, blocks) for warps, stages in (CUTS if scheme.quantized else BF16_CUTS)]
    if heads.head_dim > 128 or _unit_bytes(heads.head_dim, scheme) >= 6 << 10:  # sums of 256 channels leave registers for 8 warps
        plans = [p for p in plans if p.warps <= 8]
    return next((p for p in plans if shared_bytes(heads.head_dim, scheme, p, batch) <= room(capability)), plans[-1])


def _unit_bytes(head_dim: int, scheme: Scheme) -> int:
    return page_bytes(scheme, head_dim) + (256 if scheme.scale else 0) if scheme.quantized else 16 * head_dim * 4


def shared_bytes(head_dim: int, scheme: Scheme, p: Plan, batch: int) -> int:
    """Dynamic shared memory of a decode kernel: merge.cuh, AT_ROWS and what follows."""
    ring = p.stages * _unit_bytes(head_dim, scheme)
    heads = p.warps * (ring + p.q_per_kv * head_dim * 4 + 2 * p.q_per_kv * 8 + 8)
    return -(-heads // 16) * 16 + p.warps * p.stages * 8 + 4 * batch


def schedule(heads: Heads, scheme: Scheme, p: Plan, lengths: Array, tasks: Array, workspace: Array, *, added: int = 1) -> Launch:
    """Which warp attends to what: lengths [batch] -> tasks int32 [p.task_shape], for every layer of one step. Before it every launch of
    `decode_attention` with this workspace must have ended; after it the first one has turn 0."""
    file, defines = _decode_source(heads, scheme, p, True)
    args = (lengths, tasks, workspace, *map(np.int32, (lengths.shape[0], heads.kv_heads, scheme.sinks, added)))
    return Launch(file, "schedule", defines, (p.blocks,), p.warps * 32, args, 4 * (2 * lengths.shape[0] + 1))


def decode_attention(
    heads: Heads, scheme: Scheme, p: Plan, q: Array, cache: dict[str, Array], lengths: Array, tasks: Array, out: Array,
    lse: Array | None, workspace: Array, arrived: Array, *, turn: int, added: int = 1, scale: float | None = None,
) -> Launch:
    """q [batch, q_heads, d] bf16 -> out, bf16 or float32, over lengths[b] + added tokens of each row, as `schedule` has cut them.

    The launch directly before may write q and the newest token of each row; all else must come from launches before that one.
    workspace float32 [p.workspace_floats(d)], arrived int32 [p.counters(d)], zero (and zero again afterwards). turn: 0 for the first launch
    with this workspace behind `schedule`, then 1, 0, 1 ...; with another one the results are wrong. lse float32 [batch, q_heads] or None,
    not written for a row without tokens. scale: of the logits, 1 / sqrt(d) unless given.
    """
    d, batch, norms = heads.head_dim, lengths.shape[0], cache.get("norms")
    scale_log2 = np.float32((scale or 1 / math.sqrt(d)) * math.log2(math.e))
    results = (lengths, tasks, out, lse, workspace, arrived)
    if scheme.quantized:
        sizes = (batch, heads.kv_heads, cache["pages"].shape[-2], 0 if norms is None else norms.shape[-1], scheme.sinks, added, turn)
        named = (cache.get(n) for n in ("sink_keys", "sink_values", "window_keys", "window_values"))
        args = (q, cache["pages"], norms, *named, *results, *map(np.int32, sizes), scale_log2)
    else:
        sizes = (batch, heads.kv_heads, cache["keys"].shape[-2], added, turn)
        args = (q, cache["keys"], cache["values"], *results, *map(np.int32, sizes), scale_log2)
    file, defines = _decode_source(heads, scheme, p, out.dtype.itemsize == 2)
    return Launch(file, file.removesuffix(".cu"), defines, (p.blocks,), p.warps * 32, args, shared_bytes(d, scheme, p, batch))


def _decode_source(heads: Heads, scheme: Scheme, p: Plan, out_bf16: bool) -> tuple[str, tuple[str, ...]]:
    cut = f"Q_PER_KV={p.q_per_kv}", f"SHARE={p.share}", f"BLOCK_WARPS={p.warps}", f"STAGES={p.stages}", f"OUT_BF16={out_bf16:d}"
    if scheme.quantized:
        return "decode_attention.cu", (*layout_defines(scheme, heads.head_dim), *cut)
    return "decode_attention_bf16.cu", (f"HEAD_DIM={heads.head_dim}", *cut)


# --- the attention of a prefill


WGMMA_STAGES = {64: 6, 128: 3}  # head_dim -> tiles of keys, and of values, that a block of prefill_attention_sm90.cu holds
WGMMA_ROWS, TILE_TOKENS = 128, 128


def tiled(head_dim: int, capability: int) -> bool:
    """Whether `prefill_attention` wants keys and values in tiles, not where they are."""
    return capability == 90 and head_dim in WGMMA_STAGES


@dataclass(frozen=True)
class Tiles:
    """All keys and values of a prefill, old and new, in tiles of TILE_TOKENS (tile.cuh).

    keys, values: bf16 [tiles, kv_heads, TILE_TOKENS, d], numbers in an order of their own; first: int32 [sequences] on the device, where
    each sequence's tiles begin, one for every TILE_TOKENS of its tokens.
    """

    keys: Array
    values: Array
    first: Array


Past = tuple[Array, Array] | Tiles


def unpack(heads: Heads, scheme: Scheme, slots: Array | None, starts: Array, most: int, cache: dict[str, Array], to: Past) -> Launch:
    """The first starts[s] tokens, at most `most`, of row slots[s] (None: s) -> tiles, or row s of keys and values."""
    norms, where, tiles = cache.get("norms"), cache["pages"].shape, isinstance(to, Tiles)
    keys, values, first = (to.keys, to.values, to.first) if tiles else (*to, None)
    sizes = heads.kv_heads, where[-2], 0 if norms is None else norms.shape[-1], scheme.sinks, 0 if tiles else keys.shape[2]
    named = (cache.get(n) for n in ("pages", "norms", "sink_keys", "sink_values", "window_keys", "window_values"))
    args = (*named, slots, starts, first, keys, values, *map(np.int32, sizes))
    grid = -(-most // PAGE_TOKENS), heads.kv_heads, starts.shape[0]
    defines = (*layout_defines(scheme, heads.head_dim), f"TILED={tiles:d}")
    return Launch("unpack.cu", "unpack", defines, grid, 2 * heads.head_dim, args)


def fill_tiles(heads: Heads, new: Arrivals, past: tuple[Array, Array] | None, most: int, tiles: Tiles) -> Launch:
    """New tokens, and older ones of a plain cache, into their tiles. most: tokens of a sequence, old and new."""
    keys, values = past if past else (None, None)
    where = new.first_rows, new.slots, new.starts, new.counts, tiles.first
    sizes = new.key_stride, new.value_stride, keys.shape[2] if past else 0
    args = (new.keys, new.values, keys, values, *where, tiles.keys, tiles.values, *map(np.int32, sizes))
    longest = -(-most // TILE_TOKENS) if past else -(-new.most // TILE_TOKENS) + 1
    grid = longest, heads.kv_heads, new.starts.shape[0]
    return Launch("prefill_tiles.cu", "prefill_tiles", (f"HEAD_DIM={heads.head_dim}",), grid, 256, args)


# head_dim -> (warps, row tiles of 16 a warp, keys of a tile, blocks a multiprocessor), best first
PREFILL_CUTS = {64: [(4, 2, 64, 2)], 96: [(4, 2, 64, 2)], 128: [(4, 2, 48, 2)], 256: [(8, 1, 64, 1), (8, 1, 32, 1), (4, 1, 16, 2)]}
L2_BYTES = 64 << 20  # about: so much of keys and values is attended to at a time (131,072 tokens: 209 ms, 237 with all heads)
PART_TILES = 4  # what a part of the keys costs beyond its own tiles: its begin, and its sums written and read


@dataclass(frozen=True)
class Parts:
    """How `prefill_attention` cuts the keys of a block of queries: fixed by shapes, so that one graph serves every length."""

    blocks: int  # of queries, over all kv heads and sequences
    parts: int
    tiles: int  # of keys, of a part

    def workspace_floats(self, head_dim: int) -> int:
        return self.blocks * self.parts * WGMMA_ROWS * (head_dim + 2)


def prefill_parts(heads: Heads, most: int, sequences: int, older: int, multiprocessors: int, capability: int) -> Parts | None:
    """Where a card of this many multiprocessors would have idle ones without, else None. most, older: of new and of older tokens."""
    if not tiled(heads.head_dim, capability):
        return None
    blocks = -(-most * (heads.q_heads // heads.kv_heads) // WGMMA_ROWS) * heads.kv_heads * sequences
    tiles = -(-(older + most) // TILE_TOKENS)
    cuts = {parts: -(-tiles // parts) for parts in range(1, min(tiles, multiprocessors) + 1)}
    parts = min(cuts, key=lambda parts: -(-blocks * parts // multiprocessors) * (cuts[parts] + PART_TILES))
    return Parts(blocks, parts, cuts[parts]) if parts > 1 else None


def prefill_attention(
    heads: Heads, q: Array, new: Arrivals, past: Past | None, out: Array, capability: int, *, scale: float | None = None,
    cut: tuple[Parts, Array, Array] | None = None, multiprocessors: int = 132,
) -> Launch:
    """q [tokens, q_heads, d] -> out, both bf16: each new token over those before it and itself. scale: as in `decode_attention`.

    past: keys and values of the older tokens, bf16 [rows, kv_heads, capacity, d], row new.slots[s] (None: s) of sequence s; None where
    new.starts are all 0. Where `tiled` says so, the tiles of all tokens instead. cut: by `prefill_parts`, with workspace float32
    [workspace_floats(d)] and arrived int32 [blocks], zero before and after. multiprocessors: 132 of an H100 or H200; where there are
    fewer, some blocks have to wait.
    """
    d, group = heads.head_dim, heads.q_heads // heads.kv_heads
    scale_log2, defines = np.float32((scale or 1 / math.sqrt(d)) * math.log2(math.e)), (f"HEAD_DIM={d}", f"Q_PER_KV={group}")
    if isinstance(past, Tiles):
        parts, workspace, arrived = cut or (Parts(0, 1, 2**30), None, None)
        blocks, sequences = -(-new.most * group // WGMMA_ROWS), new.starts.shape[0]
        most = L2_BYTES * heads.kv_heads // max(2 * past.keys.nbytes, 1)  # heads
        together = next((n for n in range(heads.kv_heads, 1, -1) if heads.kv_heads % n == 0 and n <= most), 1)
        sizes = heads.kv_heads, together, sequences, blocks, parts.parts, parts.tiles
        where = past.first, new.first_rows, new.starts, new.counts
        args = (q, past.keys, past.values, *where, out, workspace, arrived, *map(np.int32, sizes), scale_log2)
        stages = WGMMA_STAGES[d]
        shared = (WGMMA_ROWS + 2 * stages * TILE_TOKENS) * 2 * d + 4 * stages * 8 + 8
        items = blocks * parts.parts * heads.kv_heads * sequences
        grid = (min(items, multiprocessors),)
        return Launch("prefill_attention_sm90.cu", "prefill_attention", (*defines, f"STAGES={stages}"), grid, 384, args, shared)

    def bytes_of(warps: int, row_tiles: int, tile: int, _blocks: int) -> int:
        return (warps * row_tiles * 16 + 4 * tile) * (2 * d + 16)

    best = next(c for c in PREFILL_CUTS[d] if bytes_of(*c) <= room(capability))
    names = "BLOCK_WARPS", "ROW_TILES", "TILE", "BLOCKS"
    defines = (*defines, *(f"{name}={n}" for name, n in zip(names, best, strict=True)))
    grid = -(-new.most * group // (best[0] * best[1] * 16)), heads.kv_heads, new.starts.shape[0]
    keys, values = past if past else (None, None)
    where = new.first_rows, new.slots, new.starts, new.counts
    sizes = new.key_stride, new.value_stride, heads.kv_heads, keys.shape[2] if past else 0
    args = (q, new.keys, new.values, keys, values, *where, out, *map(np.int32, sizes), scale_log2)
    return Launch("prefill_attention.cu", "prefill_attention", defines, grid, 32 * best[0], args, bytes_of(*best))
