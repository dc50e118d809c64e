"""Launches of the products of 9 to 256 tokens, and how they are cut: linear_batch.cu, or linear_batch_sm90.cu where that is faster."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .raw import Launch, TensorMap, room

Array = Any

BATCH_TOKENS = 256
MOST_STAGES = 6  # of linear_batch.cu


@dataclass(frozen=True)
class BatchPlan:
    """How linear_batch.cu is cut for a weight [rows, size], so many tokens and a card."""

    columns: int  # of a block
    column_blocks: int
    row_tiles: int  # of 16 rows, of a warp
    k_groups: int
    stages: int
    blocks: int  # that share the slabs
    tiles: int  # of rows
    unit: int  # slabs that are not cut: those of a tile, or 1
    most: int  # slabs that a block has at most
    parts: int  # of tiles that it has at most, and adds to those of other blocks

    @property
    def shared(self) -> int:
        return self.stages * _stage_bytes(self.columns, self.row_tiles, self.k_groups)

    @property
    def _part_floats(self) -> int:
        return 128 * self.row_tiles // self.k_groups * self.columns

    @property
    def workspace_floats(self) -> int:
        return self.column_blocks * self.blocks * 2 * self._part_floats if self.parts else 0

    @property
    def counters(self) -> int:
        return self.column_blocks * self.tiles * 8 if self.parts else 0

    @property
    def cost(self) -> int:
        """Bytes that a block waits for: its weights, and its parts of sums, which are written and read."""
        return self.most * 128 * self.row_tiles * 128 + self.parts * 8 * self._part_floats


def batch_cuts(tokens: int, size: int, rows: int, silu: bool, multiprocessors: int, capability: int) -> list[BatchPlan]:
    """Ways to share the slabs, a block a multiprocessor, with the fewest blocks of columns whose x has room; the first one goes on every
    card."""
    many_rows, space = rows >= 128 * multiprocessors, room(capability)
    column_blocks = -(-tokens // (128 if 3 * _stage_bytes(128, 2, 1 if many_rows else 2) <= space else 64))
    each = -(-tokens // column_blocks)
    step = 16 if each <= 64 else 32
    columns, outputs = -(-each // step) * step, rows // 2 if silu else rows

    def cut(row_tiles: int, k_groups: int, whole: bool) -> BatchPlan:
        """whole: no block ends within a tile, or all of a tile's blocks have the same part of it."""
        stages = min(space // _stage_bytes(columns, row_tiles, k_groups), MOST_STAGES)
        tiles, slabs = -(-outputs // (128 * row_tiles // k_groups // (2 if silu else 1))), -(-size // (64 * k_groups))
        blocks, unit, parts = min(max(multiprocessors // column_blocks, 1), tiles * slabs), 1, 2
        if whole and tiles >= blocks:
            unit, parts = slabs, 0
        elif whole:
            of_tile = min(blocks // tiles, slabs)
            blocks, parts = tiles * of_tile, of_tile > 1
        most = -(-tiles * slabs // unit // blocks) * unit
        return BatchPlan(columns, column_blocks, row_tiles, k_groups, stages, blocks, tiles, unit, most, int(parts))

    cuts = [cut(2, 1 if many_rows else 2, False)]
    if columns <= 64:  # with more it is the products that take time, and there are no registers for three tiles
        cuts += [cut(2, 1, True), cut(2, 2, True)]
        cuts += [cut(3, 2, True)] if outputs % (6 if silu else 12) == 0 else []  # what is not aligned is stored one by one
    return [c for c in cuts if c.stages >= 3 or c is cuts[0]]


def _stage_bytes(columns: int, row_tiles: int, k_groups: int) -> int:
    """A slab of linear_batch.cu: the lines of its weights and those of x, of 128 bytes."""
    return (128 * row_tiles + columns * k_groups) * 128


GROUP_ROWS = {1: 240, 2: 256, 3: 192, 4: 128}  # warpgroups -> rows of a tile whose sums have room in registers
GROUP_STAGES = 16


@dataclass(frozen=True)
class GroupPlan:
    """How linear_batch_sm90.cu is cut for a weight [rows, size] and so many tokens."""

    tokens: int
    rows: int  # of a tile
    runs: int  # of 64 k, of a slab
    stages: int
    blocks: int
    tiles: int
    parts: int  # of k, each of another block; 1 where there are tiles enough
    most: int  # runs that a block has at most

    @property
    def groups(self) -> int:
        return -(-self.tokens // 64)

    @property
    def shared(self) -> int:
        return self.stages * self.runs * _run_bytes(self.groups, self.rows)

    @property
    def _part_floats(self) -> int:
        return 64 * self.groups * self.rows

    @property
    def workspace_floats(self) -> int:
        return self.blocks * self._part_floats if self.parts > 1 else 0

    @property
    def counters(self) -> int:
        return self.tiles * 4 * self.groups if self.parts > 1 else 0

    @property
    def cost(self) -> float:
        """About microseconds on an H200: what takes longest of memory (4.2 TB/s), a multiprocessor's way to L2 (125 GB/s) and products
        (64 clocks each at least, and a start for every slab), a seventh of the others, which get into its way, and the parts of sums,
        which who comes last reads alone. How good that is: docs/kernels-notebook.md, The copy engine."""
        memory = self.most * self.blocks * self.rows * 128 / 4.2e6
        l2 = self.most * (self.rows + self.tokens) * 128 / 125e3
        products = self.most * (4 * max(self.groups * self.rows / 1.7, 64) / 1750 + 0.07 / self.runs)
        merging = 3.5 + self.parts * self._part_floats * 4 / 30e3 if self.parts > 1 else 0
        longest = max(memory, l2, products)
        return longest + (memory + l2 + products - longest) / 7 + merging


def group_cuts(tokens: int, size: int, rows: int, silu: bool, multiprocessors: int) -> list[GroupPlan]:
    """Ways to cut it, a block a multiprocessor."""
    outputs, groups, found = rows // 2 if silu else rows, -(-tokens // 64), []
    for tile in range(16, GROUP_ROWS[groups] + 1, 16):
        tiles = -(-outputs // (tile // 2 if silu else tile))
        for runs in (1, 2):
            slabs, stages = -(-size // (64 * runs)), min(room(90) // (runs * _run_bytes(groups, tile)), GROUP_STAGES)
            for parts in range(1, 9):
                blocks = tiles * parts if parts > 1 else min(tiles, multiprocessors)
                if stages < 2 + runs or blocks > multiprocessors or parts > slabs:
                    continue
                most = -(-tiles * parts // blocks) * -(-slabs // parts) * runs
                found.append(GroupPlan(tokens, tile, runs, stages, blocks, tiles, parts, most))
    return found


def _run_bytes(groups: int, rows: int) -> int:
    """64 k of linear_batch_sm90.cu: the lines of x and of its weights, of 128 bytes."""
    return (64 * groups + rows) * 128


Plan = BatchPlan | GroupPlan


def grouped(tokens: int, rows: int, multiprocessors: int, capability: int) -> bool:
    """Whether linear_batch_sm90.cu is faster: measured with Qwen3-8B's matrices on an H200."""
    return capability == 90 and tokens > (48 if rows >= 128 * multiprocessors else 16)


@lru_cache(4096)  # a prompt of 17 to 256 tokens asks for the same few in every layer
def batch_plan(tokens: int, size: int, rows: int, silu: bool, multiprocessors: int, capability: int) -> Plan:
    """The cheapest. Raises ValueError for more than BATCH_TOKENS, or numbers a token that are no multiple of 8."""
    if not 1 <= tokens <= BATCH_TOKENS or size % 8:
        raise ValueError(f"{tokens} tokens of {size} numbers have no place in linear_batch.cu")
    if grouped(tokens, rows, multiprocessors, capability):
        return min(group_cuts(tokens, size, rows, silu, multiprocessors), key=lambda cut: cut.cost)
    return min(batch_cuts(tokens, size, rows, silu, multiprocessors, capability), key=lambda cut: cut.cost)


def linear_batch(
    x: Array, weight: Array, out: Array, p: Plan, workspace: Array, arrived: Array, *, bias: Array | None = None,
    residual: Array | None = None, silu: bool = False,
) -> Launch:
    """As `raw_dense.linear`, for up to BATCH_TOKENS, already normed.

    workspace float32 [p.workspace_floats]; arrived int32 [p.counters], zero before and after.
    """
    (tokens, size), rows = x.shape, weight.shape[0]
    rest, kind = (bias, residual, out, workspace, arrived), (f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}")
    if isinstance(p, GroupPlan):
        maps = TensorMap(x, -(-tokens // 8) * 8), TensorMap(weight, p.rows // 2 if silu else p.rows)
        defines = f"GROUPS={p.groups}", f"ROWS={p.rows}", f"RUNS={p.runs}", f"STAGES={p.stages}", *kind
        args = (*maps, *rest, *map(np.int32, (tokens, size, rows, p.parts)))
        return Launch("linear_batch_sm90.cu", "linear_batch", defines, (p.blocks,), 128 * p.groups + 128, args, p.shared)
    defines = f"COLUMNS={p.columns}", f"ROW_TILES={p.row_tiles}", f"K_GROUPS={p.k_groups}", f"STAGES={p.stages}", *kind
    args = (x, weight, *rest, *map(np.int32, (tokens, size, rows, p.unit)))
    return Launch("linear_batch.cu", "linear_batch", defines, (p.blocks, p.column_blocks), 256, args, p.shared)
