"""Linear layers of a few tokens as launches of raw kernels, with the scratch memory that they share."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cache import BF16
from . import raw_dense
from .raw import Launch

Array = Any


class Products:
    """For one card and one stream: a launch may use the scratch memory as soon as the one before it has ended. What becomes too small
    is replaced; launches that were made before keep what they have.
    """

    def __init__(self, xp: Any, multiprocessors: int, capability: int):
        self.xp, self.card = xp, (multiprocessors, capability)
        self.partial, self.counters = xp.empty(0, np.float32), xp.zeros(0, np.int32)
        self.normed = xp.empty((0, 0), BF16)

    def launches(self, x: Array, weight: Array, out: Array, *, norm: tuple[Array, float] | None = None, **rest: Any) -> list[Launch]:
        """`Reference.linear` of at most raw_dense.BATCH_TOKENS tokens, a multiple of 8 wide; parameters as `raw_dense.linear` has them."""
        (tokens, size), silu = x.shape, rest.get("silu", False)
        if raw_dense.fits(tokens, size, norm is not None, silu, self.card[1]):
            return [raw_dense.linear(x, weight, out, *self.card, norm=norm, **rest)]
        before = []
        if norm is not None:
            if self.normed.shape != x.shape:
                self.normed = self.xp.empty(x.shape, BF16)
            before, x = [raw_dense.rms_norm(x, *norm, self.normed)], self.normed
        plan = raw_dense.batch_plan(tokens, size, weight.shape[0], silu, *self.card)
        if len(self.partial) < plan.workspace_floats:
            self.partial = self.xp.empty(plan.workspace_floats, np.float32)
        if len(self.counters) < plan.counters:
            self.counters = self.xp.zeros(plan.counters, np.int32)
        return [*before, raw_dense.linear_batch(x, weight, out, plan, self.partial, self.counters, **rest)]
