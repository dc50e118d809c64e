"""Launches of linear layers and what stands around them: norms, activations, sums; and the products' scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..cache import BF16
from ..machine import Card
from ..plans import LinearPlan, batch_plan, fits, linear_plan
from .launch import Launch
from .linear_batch import Scratch, linear_batch

Array = Any

SIZES = {"workspace": "workspace_floats", "split_counter": "counters", "x": "x_numbers", "x_sums": "x_sums"}  # of plans


def linear(
    x: Array, weight: Array, out: Array, card: Card, *,
    norm: tuple[Array, float] | None = None, bias: Array | None = None, residual: Array | None = None,
    silu: bool = False,
) -> Launch:
    """`Reference.linear` of x [tokens, in], bf16, at most LINEAR_TOKENS of them; out bf16 or float32.

    Raises ValueError where `plans.fits` says no.
    """
    (tokens, size), (rows, _) = x.shape, weight.shape
    plan = linear_plan(tokens, size, rows, norm is not None, silu, card)
    weights, eps = norm or (None, 0.0)
    args = (x, weights, weight, bias, residual, out, *map(np.int32, (tokens, size, rows)), np.float32(eps))
    flags = f"NORM={norm is not None:d}", f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    defines = f"BLOCK_WARPS={plan.warps}", *flags
    return Launch("linear.cu", "linear", defines, (plan.blocks,), 32 * plan.warps, args, plan.shared)


def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> Launch:
    """x [tokens, size] -> out, both bf16."""
    args = (x, weight, out, np.int32(x.shape[1]), np.float32(eps))
    return Launch("rms_norm.cu", "rms_norm", ("SILU=0", "OUT_BF16=1"), (len(x),), 256, args)


def silu_mul(gate_up: Array, out: Array) -> Launch:
    """`Reference.silu_mul`: gate_up [tokens, 2 n] -> out [tokens, n], both bf16, n a multiple of 8."""
    return _elementwise("silu_mul", out, gate_up, out)


def add(x: Array, y: Array) -> Launch:
    """y += x in bf16: y [tokens, n], x the same or a bias [n], n a multiple of 8."""
    return _elementwise("add", y, x, y, np.int32(y.shape[1] // 8 if x.ndim == 2 else 0))


def _elementwise(name: str, out: Array, a: Array, b: Array, *more: np.int32) -> Launch:
    tokens, size = out.shape
    if size % 8:
        raise ValueError(f"rows of {size} numbers do not fit elementwise.cu, which takes multiples of 8")
    grid = tokens, -(-size // 4096)
    return Launch("elementwise.cu", name, (), grid, 256, (a, b, np.int32(size // 8), *more))


def embed(table: Array, tokens: Array, x: Array) -> Launch:
    """x[i] = table[tokens[i]]: table bf16 [vocab, hidden], tokens int32 [n], x bf16 [n, hidden]; hidden % 8 = 0."""
    return Launch("step.cu", "embed", (), (len(tokens),), 128, (table, tokens, x, np.int32(table.shape[1])))


def normed(x: Array, norm: tuple[Array, float] | None, scratch: Scratch) -> tuple[list[Launch], Array]:
    """Before products that do not norm by themselves."""
    if norm is None:
        return [], x
    to = scratch.x[: x.size].reshape(x.shape)
    return [rms_norm(x, *norm, to)], to


class Products:
    """For one card and one stream, whose launches take the scratch memory in turn. Grown buffers are reallocated;
    earlier launches keep a reference to the old ones."""

    def __init__(self, xp: Any, card: Card):
        self.xp, self.card = xp, card
        self.scratch = Scratch(*(xp.zeros(0, dtype) for dtype in (np.float32, np.int32, BF16, np.float32)))

    def launches(
        self, x: Array, weight: Array, out: Array, *, norm: tuple[Array, float] | None = None, **rest: Any
    ) -> list[Launch]:
        """`Reference.linear` of at most BATCH_TOKENS tokens, a multiple of 8 wide; parameters as `linear` has them. (Of
        a quantized matrix: quantized/on_card.py.)"""
        (tokens, size), silu = x.shape, rest.get("silu", False)
        if fits(tokens, size, norm is not None, silu, self.card):
            return [linear(x, weight, out, self.card, norm=norm, **rest)]
        plan = batch_plan(tokens, size, weight.shape[0], silu, self.card)
        self.reserve([plan], 0 if norm is None else x.size)
        before, x = normed(x, norm, self.scratch)
        return [*before, linear_batch(x, weight, out, plan, self.scratch, **rest)]

    def reserve(self, plans: Sequence[LinearPlan], normed: int = 0) -> None:
        """Scratch for all of these at once: recorded launches would keep each buffer that was too small. normed:
        numbers of an x that is normed."""
        for name, needed in scratch_sizes(plans, normed).items():
            if len(old := getattr(self.scratch, name)) < needed:  # counters are 0 before a launch
                self.scratch = replace(self.scratch, **{name: self.xp.zeros(needed, old.dtype)})


def scratch_sizes(plans: Sequence[LinearPlan], normed: int) -> dict[str, int]:
    """Numbers of each array of `Scratch`."""
    sizes = {name: max((getattr(p, of) for p in plans), default=0) for name, of in SIZES.items()}
    return sizes | {"x": max(sizes["x"], normed)}
