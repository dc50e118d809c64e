"""The launch of a product of 9 to 256 tokens: linear_batch.cu, or sm90/linear_batch.cu where that is faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..plans import LinearPlan
from ..sm90 import linear_batch as sm90
from ..sm90.linear_batch import WgmmaPlan
from .launch import Launch

Array = Any


@dataclass(frozen=True)
class Scratch:
    """What the blocks of a product share, for one plan or several."""

    workspace: Array  # float32 [at least plan.workspace_floats]
    split_counter: Array  # int32 [at least plan.counters], zero before and after a launch
    x: Array = None  # bf16 [at least plan.x_numbers, or those of x]: x normed, or as a kernel wants it
    x_sums: Array = None  # float32 [at least plan.x_sums]: of its groups


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
