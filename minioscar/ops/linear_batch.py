"""Plans and launches of products of 9 to 256 tokens: linear_batch.cu, or sm90/linear_batch.cu where that is faster."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .launch import Card, Launch, TensorMap

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


MAX_TILE_ROWS = {1: 240, 2: 256, 3: 192, 4: 128}  # warpgroups -> rows of a tile whose sums fit into registers
MAX_WGMMA_STAGES = 16


@dataclass(frozen=True)
class WgmmaPlan:
    """Tile config and split plan of sm90/linear_batch.cu for a weight [rows, size] and a number of tokens."""

    tokens: int
    rows: int  # of a tile
    runs: int  # of 64 k, of a slab
    stages: int
    blocks: int
    tiles: int
    splits: int  # of k, each in another block; 1 where there are tiles enough
    max_runs: int  # of a block

    @property
    def warpgroups(self) -> int:
        return -(-self.tokens // 64)

    @property
    def shared(self) -> int:
        return self.stages * self.runs * _run_bytes(self.warpgroups, self.rows)

    @property
    def _tile_floats(self) -> int:
        return 64 * self.warpgroups * self.rows

    @property
    def workspace_floats(self) -> int:
        return self.blocks * self._tile_floats if self.splits > 1 else 0

    @property
    def counters(self) -> int:
        return self.tiles * 4 * self.warpgroups if self.splits > 1 else 0

    @property
    def cost(self) -> float:
        """About microseconds on an H200: the longest of memory (4.2 TB/s), a multiprocessor's path to L2 (125 GB/s)
        and products (64 clocks each at least, and a start for every slab), a seventh of the others, which get in its
        way, and the partial sums, which the last block reads alone. See the notebook, The copy engine."""
        memory = self.max_runs * self.blocks * self.rows * 128 / 4.2e6
        l2 = self.max_runs * (self.rows + self.tokens) * 128 / 125e3
        products = self.max_runs * (4 * max(self.warpgroups * self.rows / 1.7, 64) / 1750 + 0.07 / self.runs)
        merging = 3.5 + self.splits * self._tile_floats * 4 / 30e3 if self.splits > 1 else 0
        longest = max(memory, l2, products)
        return longest + (memory + l2 + products - longest) / 7 + merging


def wgmma_configs(tokens: int, size: int, rows: int, silu: bool, card: Card) -> list[WgmmaPlan]:
    """Tile configs and split plans, at most a block a multiprocessor."""
    outputs, warpgroups, configs = rows // 2 if silu else rows, -(-tokens // 64), []
    for tile in range(16, MAX_TILE_ROWS[warpgroups] + 1, 16):
        tiles = -(-outputs // (tile // 2 if silu else tile))
        for runs in (1, 2):
            slabs = -(-size // (64 * runs))
            stages = min(card.max_shared_bytes // (runs * _run_bytes(warpgroups, tile)), MAX_WGMMA_STAGES)
            for splits in range(1, 9):
                blocks = tiles * splits if splits > 1 else min(tiles, card.multiprocessors)
                if stages < 2 + runs or blocks > card.multiprocessors or splits > slabs:
                    continue
                max_runs = -(-tiles * splits // blocks) * -(-slabs // splits) * runs
                configs.append(WgmmaPlan(tokens, tile, runs, stages, blocks, tiles, splits, max_runs))
    return configs


def _run_bytes(warpgroups: int, rows: int) -> int:
    """64 k of sm90/linear_batch.cu: the lines of x and of its weights, of 128 bytes."""
    return (64 * warpgroups + rows) * 128


LinearPlan = BatchPlan | WgmmaPlan


@dataclass(frozen=True)
class Scratch:
    """What the blocks of a product share, for one plan or several."""

    workspace: Array  # float32 [at least plan.workspace_floats]
    split_counter: Array  # int32 [at least plan.counters], zero before and after a launch


def uses_wgmma(tokens: int, rows: int, card: Card) -> bool:
    """Whether sm90/linear_batch.cu is faster: measured with Qwen3-8B's matrices on an H200."""
    return card.capability == 90 and tokens > (48 if rows >= 128 * card.multiprocessors else 16)


@lru_cache(4096)  # a prompt of 17 to 256 tokens asks for the same few in every layer
def batch_plan(tokens: int, size: int, rows: int, silu: bool, card: Card) -> LinearPlan:
    """The cheapest. Raises ValueError for more than BATCH_TOKENS, or numbers a token that are no multiple of 8."""
    if not 1 <= tokens <= BATCH_TOKENS or size % 8:
        limit = f"at most {BATCH_TOKENS} tokens of a multiple of 8 numbers"
        raise ValueError(f"{tokens} tokens of {size} numbers do not fit linear_batch.cu: {limit}")
    if uses_wgmma(tokens, rows, card):
        return min(wgmma_configs(tokens, size, rows, silu, card), key=lambda plan: plan.cost)
    return min(mma_configs(tokens, size, rows, silu, card), key=lambda plan: plan.cost)


def linear_batch(
    x: Array, weight: Array, out: Array, p: LinearPlan, scratch: Scratch, *, bias: Array | None = None,
    residual: Array | None = None, silu: bool = False,
) -> Launch:
    """As `linear.linear`, for up to BATCH_TOKENS, already normed."""
    (tokens, size), rows = x.shape, weight.shape[0]
    rest = bias, residual, out, scratch.workspace, scratch.split_counter
    kind = f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    if isinstance(p, WgmmaPlan):
        maps = TensorMap(x, -(-tokens // 8) * 8), TensorMap(weight, p.rows // 2 if silu else p.rows)
        defines = f"WARPGROUPS={p.warpgroups}", f"ROWS={p.rows}", f"RUNS={p.runs}", f"STAGES={p.stages}", *kind
        args = (*maps, *rest, *map(np.int32, (tokens, size, rows, p.splits)))
        threads = 128 * p.warpgroups + 128
        return Launch("sm90/linear_batch.cu", "linear_batch", defines, (p.blocks,), threads, args, p.shared)
    defines = f"COLUMNS={p.columns}", f"ROW_TILES={p.row_tiles}", f"K_GROUPS={p.k_groups}", f"STAGES={p.stages}", *kind
    args = (x, weight, *rest, *map(np.int32, (tokens, size, rows, p.granularity)))
    return Launch("linear_batch.cu", "linear_batch", defines, (p.blocks, p.column_blocks), 256, args, p.shared)
