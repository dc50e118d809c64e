"""Linear layers of a few tokens as launches of raw kernels, with the scratch memory that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache import BF16
from . import raw_batch, raw_dense
from .raw import Launch

if TYPE_CHECKING:
    from ..config import Config

Array = Any


class Products:
    """For one card and one stream: a launch may use the scratch memory as soon as the one before it has ended. Grown
    buffers are reallocated; earlier launches keep a reference to the old ones.
    """

    def __init__(self, xp: Any, multiprocessors: int, capability: int):
        self.xp, self.card = xp, (multiprocessors, capability)
        self.workspace, self.counters = xp.empty(0, np.float32), xp.zeros(0, np.int32)
        self.normed = xp.empty((0, 0), BF16)

    def launches(
        self, x: Array, weight: Array, out: Array, *, norm: tuple[Array, float] | None = None, **rest: Any
    ) -> list[Launch]:
        """`Reference.linear` of at most raw_batch.BATCH_TOKENS tokens, a multiple of 8 wide; parameters as
        `raw_dense.linear` has them."""
        (tokens, size), silu = x.shape, rest.get("silu", False)
        if raw_dense.fits(tokens, size, norm is not None, silu, self.card[1]):
            return [raw_dense.linear(x, weight, out, *self.card, norm=norm, **rest)]
        before = []
        if norm is not None:
            if self.normed.shape != x.shape:
                self.normed = self.xp.empty(x.shape, BF16)
            before, x = [raw_dense.rms_norm(x, *norm, self.normed)], self.normed
        plan = raw_batch.batch_plan(tokens, size, weight.shape[0], silu, *self.card)
        self._reserve(plan.workspace_floats, plan.counters)
        return [*before, raw_batch.linear_batch(x, weight, out, plan, self.workspace, self.counters, **rest)]

    def reserve(self, plans: Sequence[raw_batch.LinearPlan]) -> None:
        """Scratch for all of these at once: where launches are kept, each size that was too small would be kept with
        them."""
        self._reserve(max((p.workspace_floats for p in plans), default=0), max((p.counters for p in plans), default=0))

    def _reserve(self, floats: int, counters: int) -> None:
        if len(self.workspace) < floats:
            self.workspace = self.xp.empty(floats, np.float32)
        if len(self.counters) < counters:
            self.counters = self.xp.zeros(counters, np.int32)


def batch_plans(config: Config, tokens: int, multiprocessors: int, capability: int) -> list[raw_batch.LinearPlan]:
    """Of the matrices of a model, for so many tokens; none for few, which linear.cu takes without scratch."""
    if tokens <= raw_dense.LINEAR_TOKENS:
        return []
    c = config
    shapes = (c.hidden_size, c.q_size + 2 * c.kv_size, False), (c.q_size, c.hidden_size, False)
    shapes += ((c.hidden_size, c.vocab_size, False),)
    shapes += (c.hidden_size, 2 * c.intermediate_size, True), (c.intermediate_size, c.hidden_size, False)
    return [raw_batch.batch_plan(tokens, *shape, multiprocessors, capability) for shape in shapes if shape[0] % 8 == 0]
