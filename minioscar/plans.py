"""Plans of the general kernels for a shape and a card: tile configs, split plans, bytes of memory that these take.

The launches that follow them are in ops/; kernels of compute capability 9.0 have plans in sm90/, experts and quantized
matrices in their own packages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .config import Config
from .machine import Card
from .oscar import Scheme
from .pages import PAGE_TOKENS, page_bytes
from .sm90 import linear_batch as sm90
from .sm90.linear_batch import WgmmaPlan

LINEAR_TOKENS = 8  # of linear.cu: the columns of an MMA
BATCH_TOKENS = 256  # of one product, and so the rows of a decode step
MAX_STAGES = 6  # of linear_batch.cu


@dataclass(frozen=True)
class Heads:
    """Of one attention layer."""

    q_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Config) -> Heads:
        return cls(config.num_heads, config.num_kv_heads, config.head_dim)


# --- products of up to 8 tokens: linear.cu


class LinearTiling(NamedTuple):
    warps: int  # of a block; they split k
    blocks: int
    shared: int


def linear_plan(tokens: int, size: int, rows: int, norm: bool, silu: bool, card: Card) -> LinearTiling:
    """For a weight [rows, size]. Raises ValueError where `fits` says no."""
    if not fits(tokens, size, norm, silu, card):
        where = f"a card of capability {card.capability / 10}"
        raise ValueError(f"{tokens} tokens of {size} numbers do not fit linear.cu on {where}")
    shared, warps = _linear_bytes(tokens, size, norm, silu), linear_warps(size, silu)
    resident = min(16 // warps, card.max_shared_bytes // (shared + 1024) or 1)  # blocks a multiprocessor
    blocks = min(-(-rows // (16 * (2 if silu else 1))), card.multiprocessors * resident)
    return LinearTiling(warps, blocks, shared)


def fits(tokens: int, size: int, norm: bool, silu: bool, card: Card) -> bool:
    """Whether linear.cu takes this many tokens of `size` numbers; normed, they stay in shared memory."""
    has_columns = 1 <= tokens <= LINEAR_TOKENS and size % 8 == 0
    return has_columns and _linear_bytes(tokens, size, norm, silu) <= card.max_shared_bytes


def _linear_bytes(tokens: int, size: int, norm: bool, silu: bool) -> int:
    sums = 2 * (2 if silu else 1) * linear_warps(size, silu) * 16 * 8 * 4
    return sums + (tokens * (-(-size // 64) * 128 + 64) if norm else 0)


def linear_warps(size: int, silu: bool) -> int:
    """Warps that split k: as many as have weights to load in at least three fifths of their rounds. Independent of the
    tokens, since it decides the order of sums."""
    rounds = {warps: (4 if silu else 8) * 32 * warps for warps in (16, 8)}  # k that all ask for at a time
    return next((warps for warps, k in rounds.items() if size / (-(-size // k) * k) >= 0.6), 4)


# --- products of 9 to 256 tokens: linear_batch.cu


@dataclass(frozen=True)
class BatchPlan:
    """Tile config and split plan of linear_batch.cu for a weight [rows, size], a number of tokens and a card."""

    columns: int  # of a block
    column_blocks: int
    row_tiles: int  # of 16 rows, of a warp
    k_groups: int
    stages: int
    blocks: int  # that share the slabs
    tiles: int  # of rows
    granularity: int  # slabs that stay in one block: those of a tile, or 1
    max_slabs: int  # of a block
    partial_tiles: int  # of a block at most, whose sums it adds to those of other blocks
    x_numbers = x_sums = 0  # x is taken as it is

    @property
    def shared(self) -> int:
        return self.stages * _stage_bytes(self.columns, self.row_tiles, self.k_groups)

    @property
    def tile_floats(self) -> int:
        return 128 * self.row_tiles // self.k_groups * self.columns

    @property
    def workspace_floats(self) -> int:
        return self.column_blocks * self.blocks * 2 * self.tile_floats if self.partial_tiles else 0

    @property
    def counters(self) -> int:
        return self.column_blocks * self.tiles * 8 if self.partial_tiles else 0

    @property
    def cost(self) -> int:
        """Bytes that a block waits for: its weights, and its partial sums, which are written and read."""
        return self.max_slabs * 128 * self.row_tiles * 128 + self.partial_tiles * 8 * self.tile_floats


def mma_configs(tokens: int, size: int, rows: int, silu: bool, card: Card) -> list[BatchPlan]:
    """Ways to share the slabs, one block a multiprocessor, the fewest blocks of columns; the first fits every card."""
    large, shared = rows >= 128 * card.multiprocessors, card.max_shared_bytes
    column_blocks = -(-tokens // (128 if 3 * _stage_bytes(128, 2, 1 if large else 2) <= shared else 64))
    block_tokens = -(-tokens // column_blocks)
    step = 16 if block_tokens <= 64 else 32
    columns, outputs = -(-block_tokens // step) * step, rows // 2 if silu else rows

    def config(row_tiles: int, k_groups: int, whole: bool) -> BatchPlan:
        """whole: no block ends within a tile, or all of a tile's blocks have the same share of it."""
        stages = min(shared // _stage_bytes(columns, row_tiles, k_groups), MAX_STAGES)
        tiles, slabs = -(-outputs // (128 * row_tiles // k_groups // (2 if silu else 1))), -(-size // (64 * k_groups))
        sharing = share_slabs(tiles, slabs, max(card.multiprocessors // column_blocks, 1), whole)
        return BatchPlan(columns, column_blocks, row_tiles, k_groups, stages, *sharing)

    configs = [config(2, 1 if large else 2, False)]
    if columns <= 64:  # with more, time goes into products, and registers do not suffice for three tiles
        configs += [config(2, 1, True), config(2, 2, True)]
        # Unaligned outputs are stored one by one
        configs += [config(3, 2, True)] if outputs % (6 if silu else 12) == 0 else []
    return [c for c in configs if c.stages >= 3 or c is configs[0]]


def share_slabs(tiles: int, slabs: int, blocks: int, whole: bool) -> tuple[int, int, int, int, int]:
    """BatchPlan's blocks, tiles, granularity, max_slabs and partial_tiles, for tiles of so many slabs each. whole: as
    in `mma_configs`."""
    blocks, granularity, partial_tiles = min(blocks, tiles * slabs), 1, 2
    if whole and tiles >= blocks:
        granularity, partial_tiles = slabs, 0
    elif whole:
        blocks_per_tile = min(blocks // tiles, slabs)
        blocks, partial_tiles = tiles * blocks_per_tile, int(blocks_per_tile > 1)
    return blocks, tiles, granularity, -(-tiles * slabs // granularity // blocks) * granularity, partial_tiles


def _stage_bytes(columns: int, row_tiles: int, k_groups: int) -> int:
    """A slab of linear_batch.cu: the lines of its weights and those of x, of 128 bytes."""
    return (128 * row_tiles + columns * k_groups) * 128


LinearPlan = BatchPlan | WgmmaPlan


@lru_cache(4096)  # a prompt of 17 to 256 tokens asks for the same few in every layer
def batch_plan(tokens: int, size: int, rows: int, silu: bool, card: Card) -> LinearPlan:
    """The cheapest. Raises ValueError for more than BATCH_TOKENS, or numbers a token that are no multiple of 8."""
    if not 1 <= tokens <= BATCH_TOKENS or size % 8:
        limit = f"at most {BATCH_TOKENS} tokens of a multiple of 8 numbers"
        raise ValueError(f"{tokens} tokens of {size} numbers do not fit linear_batch.cu: {limit}")
    if sm90.uses_wgmma(tokens, rows, card):
        return min(sm90.wgmma_configs(tokens, size, rows, silu, card), key=lambda plan: plan.cost)
    return min(mma_configs(tokens, size, rows, silu, card), key=lambda plan: plan.cost)


# --- rows, packing and attention


def step_sizes(rows: int) -> list[int]:
    """How many rows the recorded steps of a cache have whose rows join and leave: a step is of the first so many that
    have all that are in use, so that a few do not pay for all."""
    return [*(1 << i for i in range((rows - 1).bit_length())), rows]


def feedback_bytes(scheme: Scheme, head_dim: int) -> int:
    """Shared memory of error_feedback.cuh, FeedbackShared: errors twice and fed keys, params, a table for each warp."""
    tile, params, table = 32 * PAGE_TOKENS + 24, 2 * 32 * max(PAGE_TOKENS // scheme.group, 1), 32 * head_dim
    return 4 * (3 * tile + params + table)


# (warps, stages), best first
WARP_CONFIGS = (12, 2), (8, 2), (4, 2), (2, 2), (1, 2)
BF16_WARP_CONFIGS = (8, 2), (4, 3), (4, 2), (2, 2), (1, 2)


@dataclass(frozen=True)
class DecodePlan:
    """Shape of a decode kernel, for a model, a scheme, a batch and a card: the same for every step."""

    q_per_kv: int  # q heads of one work item, at most 8; more that share a kv head are several groups
    q_groups: int
    warps: int
    stages: int
    blocks: int

    def workspace_floats(self, head_dim: int) -> int:
        """Per parity two slots a block, each with sums and four numbers for every 32 channels (decode_merge.cuh)."""
        return 2 * 2 * self.blocks * self.q_per_kv * head_dim * 9 // 8

    def counters(self, head_dim: int) -> int:
        """Split counters: one for every 64 channels of the q heads of a block."""
        return self.blocks * -(-self.q_per_kv * head_dim // 64)

    @property
    def task_shape(self) -> tuple[int, int, int]:
        """Rows of four: two for each warp of a block, one for each of the two heads that it shares (schedule.cuh)."""
        return self.blocks, 2 * self.warps + 2, 4

    def nbytes(self, head_dim: int) -> int:
        """Of the arrays of a `DecodeState`, but for the lengths."""
        return 4 * (self.workspace_floats(head_dim) + self.counters(head_dim) + math.prod(self.task_shape))


def decode_plan(heads: Heads, scheme: Scheme, batch: int, card: Card) -> DecodePlan:
    """The most warps whose rings fit, 8 where items are large (notebook, version 13); of grids near the whole card one
    where heads end with blocks, or with every second one, and of multiples of 16 splits, which are read at once."""
    q_per_kv = heads.q_heads // heads.kv_heads
    q_groups = next(n for n in range(1, q_per_kv + 1) if q_per_kv % n == 0 and q_per_kv // n <= 8)
    work, limit = batch * heads.kv_heads * q_groups, card.multiprocessors
    near = range(limit * 15 // 16, limit + 1)
    even = [n for n in near if n % work == 0 or work % n == 0] or [n for n in near if work > n and 2 * work % n == 0]
    blocks = max(even, key=lambda n: (n % (16 * work) == 0, n), default=limit)
    configs = WARP_CONFIGS if scheme.quantized else BF16_WARP_CONFIGS
    plans = [DecodePlan(q_per_kv // q_groups, q_groups, warps, stages, blocks) for warps, stages in configs]
    # The sums of 256 channels leave registers for 8 warps.
    if heads.head_dim > 128 or _item_bytes(heads.head_dim, scheme) >= 6 << 10:
        plans = [p for p in plans if p.warps <= 8]
    fitting = (p for p in plans if shared_bytes(heads.head_dim, scheme, p, batch) <= card.max_shared_bytes)
    return next(fitting, plans[-1])


def _item_bytes(head_dim: int, scheme: Scheme) -> int:
    """Of a page, with all steps and minima that it shares with another one and with norms; or of 16 tokens in BF16."""
    if not scheme.quantized:
        return 16 * head_dim * 4
    shared = 2 * head_dim if scheme.group > PAGE_TOKENS else 0
    return page_bytes(scheme, head_dim) + shared + (256 if scheme.scale else 0)


def shared_bytes(head_dim: int, scheme: Scheme, p: DecodePlan, batch: int) -> int:
    """Dynamic shared memory of a decode kernel: decode_merge.cuh, LENGTHS_OFFSET and what follows."""
    ring = p.stages * _item_bytes(head_dim, scheme)
    heads = p.warps * (ring + p.q_per_kv * head_dim * 4 + 2 * p.q_per_kv * 8 + 8)
    return -(-heads // 16) * 16 + p.warps * p.stages * 8 + 4 * batch


class PrefillTiling(NamedTuple):
    warps: int
    row_tiles: int  # of 16 rows, of a warp
    tile: int  # keys
    blocks: int  # a multiprocessor

    def shared(self, head_dim: int) -> int:
        return (self.warps * self.row_tiles * 16 + 4 * self.tile) * (2 * head_dim + 16)


# head_dim, and smaller ones -> best first
PREFILL_CONFIGS = {
    64: [(4, 2, 64, 2)], 96: [(4, 2, 64, 2)], 128: [(4, 2, 48, 2)], 256: [(8, 1, 64, 1), (8, 1, 32, 1), (4, 1, 16, 2)],
}


def prefill_plan(head_dim: int, card: Card) -> PrefillTiling:
    configs = PREFILL_CONFIGS[min(size for size in PREFILL_CONFIGS if size >= head_dim)]
    tilings = (PrefillTiling(*config) for config in configs)
    return next(tiling for tiling in tilings if tiling.shared(head_dim) <= card.max_shared_bytes)
