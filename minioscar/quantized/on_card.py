"""Quantized matrices by kernels: what multiplies with them, and how they come and go."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..formats import Plain
from ..ops.linear import OTHERS, Kernels
from . import Quantized, from_plain, plans

Array = Any
OTHERS[Quantized] = Kernels(
    plans.fits, plans.linear, plans.batch_plan, plans.before_batch, plans.linear_batch, plans.possible_plans
)


def stored(ops: Any, plain: Plain) -> Quantized:
    """What the kernels read of a matrix; its codes are put into their order on the card where rows are whole vectors.
    ops: the back end."""

    def repacked(plain: Plain) -> Array:
        out = ops.xp.empty(plans.words_shape(plain.kind, *plain.shape), np.uint32)
        ops.run(plans.repack(plain.kind, ops.xp.ascontiguousarray(plain.codes), out))
        return out

    return from_plain(plain, ops.xp, None if plain.shape[1] % 8 else repacked)


def dense(ops: Any, weight: Quantized) -> Array:
    """Its numbers, bf16 [rows, columns]."""
    if weight.shape[1] % 8:
        return weight.dequantize(ops.xp).astype(ops.dtype)
    out = ops.xp.empty(weight.shape, ops.dtype)
    ops.run(plans.dequantize(weight, out))
    return out
