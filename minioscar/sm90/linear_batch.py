"""Plans and launches of sm90/linear_batch.cu: products of 9 to 256 tokens, by warpgroups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops.launch import Card, Launch, TensorMap

Array = Any
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
    x_numbers = x_sums = 0  # x is taken as it is

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


def uses_wgmma(tokens: int, rows: int, card: Card) -> bool:
    """Whether sm90/linear_batch.cu is faster: measured with Qwen3-8B's matrices on an H200."""
    return card.capability == 90 and tokens > (48 if rows >= 128 * card.multiprocessors else 16)


def launch(x: Array, weight: Array, out: Array, p: WgmmaPlan, rest: tuple[Array | None, ...], silu: bool) -> Launch:
    """As `ops.linear_batch.linear_batch`. rest: bias, residual, out and scratch, as the kernel takes them."""
    (tokens, size), rows = x.shape, weight.shape[0]
    maps = TensorMap(x, -(-tokens // 8) * 8), TensorMap(weight, p.rows // 2 if silu else p.rows)
    kind = f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    defines = f"WARPGROUPS={p.warpgroups}", f"ROWS={p.rows}", f"RUNS={p.runs}", f"STAGES={p.stages}", *kind
    args = (*maps, *rest, *map(np.int32, (tokens, size, rows, p.splits)))
    threads = 128 * p.warpgroups + 128
    return Launch("sm90/linear_batch.cu", "linear_batch", defines, (p.blocks,), threads, args, p.shared)
