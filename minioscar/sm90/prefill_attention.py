"""Plans and launches of sm90/prefill_attention.cu, which reads keys and values from tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..cache import BF16
from ..ops.attention import Heads, PrefillTokens
from ..ops.launch import Card, Launch

Array = Any

# Head_dim -> tiles of keys, and of values, in shared memory of a block of sm90/prefill_attention.cu
WGMMA_STAGES = {64: 6, 128: 3}
WGMMA_ROWS, TILE_TOKENS = 128, 128


def tiled(head_dim: int, card: Card) -> bool:
    """Whether `prefill_attention` reads keys and values from `Tiles`, not from where they are."""
    return card.capability == 90 and head_dim in WGMMA_STAGES


@dataclass(frozen=True)
class Tiles:
    """All keys and values of a prefill, old and new, in tiles of TILE_TOKENS (sm90/tile.cuh)."""

    keys: Array  # bf16 [tiles, kv_heads, TILE_TOKENS, d], swizzled
    values: Array
    first: Array  # int32 [sequences]: index of each sequence's first tile

    @classmethod
    def allocate(cls, xp: Any, heads: Heads, tiles: int, first: Array) -> Tiles:
        shape = tiles, heads.kv_heads, TILE_TOKENS, heads.head_dim
        return cls(xp.empty(shape, BF16), xp.empty(shape, BF16), first)


def fill_tiles(
    heads: Heads, new: PrefillTokens, past: tuple[Array, Array] | None, max_length: int, tiles: Tiles
) -> Launch:
    """New tokens, and older ones of a plain cache, into their tiles. max_length: of a sequence, old and new tokens."""
    keys, values = past if past else (None, None)
    indices = new.first_rows, new.slots, new.starts, new.counts, tiles.first
    sizes = new.key_stride, new.value_stride, keys.shape[2] if past else 0
    args = (new.keys, new.values, keys, values, *indices, tiles.keys, tiles.values, *map(np.int32, sizes))
    max_tiles = -(-max_length // TILE_TOKENS) if past else -(-new.max_count // TILE_TOKENS) + 1
    grid = max_tiles, heads.kv_heads, new.starts.shape[0]
    return Launch("sm90/prefill_tiles.cu", "prefill_tiles", (f"HEAD_DIM={heads.head_dim}",), grid, 256, args)


# About: so much of keys and values is attended to in one pass over heads (131,072 tokens: 209 ms, 237 with all heads).
L2_BYTES = 64 << 20
SPLIT_COST = 4  # tiles: what a split of the keys costs beyond its own tiles, its start and its sums written and read


@dataclass(frozen=True)
class SplitPlan:
    """How `prefill_attention` splits the keys of a block of queries; shapes alone decide."""

    blocks: int  # of queries, over all kv heads and sequences
    splits: int
    tiles: int  # of keys, of a split

    def workspace_floats(self, head_dim: int) -> int:
        return self.blocks * self.splits * WGMMA_ROWS * (head_dim + 2)

    def nbytes(self, head_dim: int) -> int:
        """Of the arrays of a `KeySplits`."""
        return 4 * (self.workspace_floats(head_dim) + self.blocks)


@dataclass(frozen=True)
class KeySplits:
    """A plan and what its blocks share."""

    plan: SplitPlan
    workspace: Array | None = None  # float32 [plan.workspace_floats(d)]
    split_counter: Array | None = None  # int32 [plan.blocks], zero before and after a launch

    @classmethod
    def allocate(cls, xp: Any, plan: SplitPlan, head_dim: int) -> KeySplits:
        return cls(plan, xp.empty(plan.workspace_floats(head_dim), np.float32), xp.zeros(plan.blocks, np.int32))


WHOLE = KeySplits(SplitPlan(0, 1, 2**30))  # keys are not split


@lru_cache(64)  # every layer of a pass asks for the same
def split_plan(heads: Heads, max_count: int, sequences: int, max_start: int, card: Card) -> SplitPlan | None:
    """Splits where multiprocessors would be idle without, else None. max_count, max_start: of new and older tokens."""
    if not tiled(heads.head_dim, card):
        return None
    blocks = -(-max_count * (heads.q_heads // heads.kv_heads) // WGMMA_ROWS) * heads.kv_heads * sequences
    tiles = -(-(max_start + max_count) // TILE_TOKENS)
    split_tiles = {splits: -(-tiles // splits) for splits in range(1, min(tiles, card.multiprocessors) + 1)}
    splits = min(split_tiles, key=lambda n: -(-blocks * n // card.multiprocessors) * (split_tiles[n] + SPLIT_COST))
    return SplitPlan(blocks, splits, split_tiles[splits]) if splits > 1 else None


def attend_to_tiles(
    heads: Heads, q: Array, new: PrefillTokens, tiles: Tiles, out: Array, card: Card, scale_log2: np.float32,
    splits: KeySplits,
) -> Launch:
    """sm90/prefill_attention.cu: at most a block a multiprocessor."""
    d, q_per_kv, plan = heads.head_dim, heads.q_heads // heads.kv_heads, splits.plan
    blocks, sequences = -(-new.max_count * q_per_kv // WGMMA_ROWS), new.starts.shape[0]
    fitting = L2_BYTES * heads.kv_heads // max(2 * tiles.keys.nbytes, 1)  # heads whose keys and values fit into L2
    heads_per_pass = next((n for n in range(heads.kv_heads, 1, -1) if heads.kv_heads % n == 0 and n <= fitting), 1)
    sizes = map(np.int32, (heads.kv_heads, heads_per_pass, sequences, blocks, plan.splits, plan.tiles))
    inputs = q, tiles.keys, tiles.values, tiles.first, new.first_rows, new.starts, new.counts
    q_stride = np.int32(q.strides[0] // BF16.itemsize)  # of a slice of the qkv projection more than its own numbers
    args = *inputs, out, splits.workspace, splits.split_counter, q_stride, *sizes, scale_log2
    stages = WGMMA_STAGES[d]
    shared = (WGMMA_ROWS + 2 * stages * TILE_TOKENS) * 2 * d + 4 * stages * 8 + 8
    grid = (min(blocks * plan.splits * heads.kv_heads * sequences, card.multiprocessors),)
    defines = f"HEAD_DIM={d}", f"Q_PER_KV={q_per_kv}", f"STAGES={stages}"
    return Launch("sm90/prefill_attention.cu", "prefill_attention", defines, grid, 384, args, shared)
