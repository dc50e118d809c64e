"""Plans and launches of products of 9 to 256 tokens: linear_batch.cu, or sm90/linear_batch.cu where that is faster."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..sm90 import linear_batch as sm90
from ..sm90.linear_batch import WgmmaPlan
from .launch import Card, Launch

Array = Any

BATCH_TOKENS = 256  # of one product, and so the rows of a decode step
MAX_STAGES = 6  # of linear_batch.cu


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


@dataclass(frozen=True)
class Scratch:
    """What the blocks of a product share, for one plan or several."""

    workspace: Array  # float32 [at least plan.workspace_floats]
    split_counter: Array  # int32 [at least plan.counters], zero before and after a launch
    x: Array = None  # bf16 [at least plan.x_numbers, or those of x]: x normed, or as a kernel wants it
    x_sums: Array = None  # float32 [at least plan.x_sums]: of its groups


@lru_cache(4096)  # a prompt of 17 to 256 tokens asks for the same few in every layer
def batch_plan(tokens: int, size: int, rows: int, silu: bool, card: Card) -> LinearPlan:
    """The cheapest. Raises ValueError for more than BATCH_TOKENS, or numbers a token that are no multiple of 8."""
    if not 1 <= tokens <= BATCH_TOKENS or size % 8:
        limit = f"at most {BATCH_TOKENS} tokens of a multiple of 8 numbers"
        raise ValueError(f"{tokens} tokens of {size} numbers do not fit linear_batch.cu: {limit}")
    if sm90.uses_wgmma(tokens, rows, card):
        return min(sm90.wgmma_configs(tokens, size, rows, silu, card), key=lambda plan: plan.cost)
    return min(mma_configs(tokens, size, rows, silu, card), key=lambda plan: plan.cost)


def linear_batch(
    x: Array, weight: Array, out: Array, p: LinearPlan, scratch: Scratch, *, bias: Array | None = None,
    residual: Array | None = None, silu: bool = False,
) -> Launch:
    """As `linear.linear`, for up to BATCH_TOKENS, already normed."""
    (tokens, size), rows = x.shape, weight.shape[0]
    rest = bias, residual, out, scratch.workspace, scratch.split_counter
    if isinstance(p, WgmmaPlan):
        return sm90.launch(x, weight, out, p, rest, silu)
    kind = f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    defines = f"COLUMNS={p.columns}", f"ROW_TILES={p.row_tiles}", f"K_GROUPS={p.k_groups}", f"STAGES={p.stages}", *kind
    args = (x, weight, *rest, *map(np.int32, (tokens, size, rows, p.granularity)))
    return Launch("linear_batch.cu", "linear_batch", defines, (p.blocks, p.column_blocks), 256, args, p.shared)
