"""A batch of new tokens as the kernels of a prefill take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..batch import Batch
from ..sm90.prefill_attention import TILE_TOKENS

Array = Any


@dataclass(frozen=True)
class Indices:
    """int32 arrays on the device."""

    batch: Batch
    positions: Array  # [tokens]
    rows: Array  # [tokens]: the cache row of each
    slots: Array  # [sequences]
    starts: Array
    counts: Array
    packed: Array
    firsts: Array  # [sequences]: index of each sequence's first token
    first_tiles: Array  # [sequences]: of sm90's Tiles
    tiles: int  # of sm90's Tiles, of all sequences
    shifts: Array | None  # [tokens]: what a token's row of the tables of RoPE is more than its position; None: all 0

    @classmethod
    def of(cls, batch: Batch, xp: Any) -> Indices:
        rows, firsts = np.repeat(batch.slots, batch.counts), np.cumsum(batch.counts) - batch.counts
        tiles = -(-np.add(batch.starts, batch.counts) // TILE_TOKENS)
        fields = batch.positions, rows, batch.slots, batch.starts, batch.counts, batch.packed, firsts
        fields = *fields, np.cumsum(tiles) - tiles
        arrays = (xp.asarray(np.asarray(x, np.int32)) for x in fields)
        shifts = batch.table_rows - batch.positions
        shifts = xp.asarray(shifts.astype(np.int32)) if batch.inputs is not None or shifts.any() else None
        return cls(batch, *arrays, int(tiles.sum()), shifts)
