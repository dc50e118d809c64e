"""Quantized matrices by kernels: what multiplies with them, and how they come and go."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..formats import Plain
from ..ops.launch import Launch
from ..ops.linear import Products
from ..sm90 import quantized_vector as sm90
from . import Quantized, from_plain, plans

Array = Any


def launches(
    products: Products, x: Array, weight: Quantized, out: Array, *, norm: tuple[Array, float] | None = None, **rest: Any
) -> list[Launch]:
    """`Products.launches` with a quantized matrix; on compute capability 9.0 by what is faster there."""
    tokens, silu, card = len(x), rest.get("silu", False), products.card
    if sm90.fits(tokens, weight, silu, card):
        return [sm90.linear(x, weight, out, card, norm=norm, **rest)]
    if plans.fits(tokens, weight, norm is not None, silu, card):
        return [plans.linear(x, weight, out, card, norm=norm, **rest)]
    plan = plans.batch_plan(tokens, weight, silu, card)
    products.reserve([plan], 0 if norm is None else x.size)
    before, x = plans.before_batch(x, weight, plan, norm, products.scratch)
    return [*before, plans.linear_batch(x, weight, out, plan, products.scratch, **rest)]


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
