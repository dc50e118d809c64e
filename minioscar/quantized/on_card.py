"""Quantized matrices by kernels: what multiplies with them, and how they come and go."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..formats import Plain
from ..ops.launch import Card, Launch
from ..ops.linear import OTHERS, Kernels
from ..sm90 import quantized_vector as sm90
from . import Quantized, from_plain, plans

Array = Any


def fits(tokens: int, weight: Quantized, norm: bool, silu: bool, card: Card) -> bool:
    return sm90.fits(tokens, weight, silu, card) or plans.fits(tokens, weight, norm, silu, card)


def linear(x: Array, weight: Quantized, out: Array, card: Card, **given: Any) -> Launch:
    """`plans.linear`, or on compute capability 9.0 what is faster."""
    fits_sm90 = sm90.fits(len(x), weight, given.get("silu", False), card)
    return (sm90 if fits_sm90 else plans).linear(x, weight, out, card, **given)


OTHERS[Quantized] = Kernels(
    fits, linear, plans.batch_plan, plans.before_batch, plans.linear_batch, plans.possible_plans
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
