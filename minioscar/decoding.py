"""Decode steps of the rows of one cache: the next token of each row, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from .cache import Backend, Batch, Cache
from .config import Config
from .sampling import RowSampling, next_token

Array = Any
Draw = Callable[[Array], Array]  # from logits to tokens


class Stepper(Protocol):
    """The model, as a decoder needs it (model.py)."""

    config: Config
    ops: Backend
    weights: Any
    tables: Any  # of RoPE

    def step(self, ids: Array, cache: Cache, batch: Batch, draw: Draw | None = None) -> tuple[Array, Array]: ...


class Decoder:
    """A step at a time, through the operations that a prefill uses too.

    `feed` says where the rows stand, `launch` begins a step of some of them, `read` has what came of the oldest that
    was not read yet. rows: how each row of the cache draws. logits: `read` returns them too.
    """

    ahead = 0  # steps that may be launched before the one before them is read

    def __init__(self, model: Stepper, cache: Cache, rows: Sequence[RowSampling], logits: bool = False):
        self.model, self.cache, self.rows, self.with_logits = model, cache, rows, logits
        self.drawn: list[list[int]] = [[] for _ in rows]  # by each row so far; the newest token is not in the cache yet
        self.step = 0
        self.newest: tuple[np.ndarray, np.ndarray | None] | None = None

    def feed(self, slots: Sequence[int], tokens: Sequence[int], step: int = 1) -> None:
        """The newest token of each row, which its cache does not hold yet; the next ones are drawn as those of
        `step`."""
        self.step = step
        for slot, token in zip(slots, tokens, strict=True):
            self.drawn[slot] = [*self.drawn[slot][: step - 1], int(token)]

    def launch(self, slots: Sequence[int]) -> None:
        """A step of these rows. Interrupted, it leaves a consistent cache."""
        slots = list(slots)
        batch, ids = self.cache.batch_for(slots, [1] * len(slots)), np.array([self.drawn[slot][-1] for slot in slots])
        try:
            tokens, logits = self.model.step(ids, self.cache, batch, partial(self._draw, slots))
        except BaseException:
            self.cache.rollback(batch)
            raise
        self.newest = tokens, self.model.ops.numpy(logits) if self.with_logits else None
        self._add(slots, tokens)
        self.step += 1

    def _draw(self, slots: Sequence[int], logits: Array) -> np.ndarray:
        rows = zip(self.model.ops.numpy(logits), slots, strict=True)
        return np.array([next_token(row, self.rows[slot], self.step, self.drawn[slot]) for row, slot in rows])

    def _add(self, slots: Sequence[int], tokens: np.ndarray) -> None:
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            self.drawn[slot].append(token)

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens, int64 [rows of the step], and logits, float32 [rows, vocab], if `logits`.

        `cache.lengths` counts the tokens before these. Raises Failure where logits are not finite.
        """
        return self.newest

    def drain(self) -> None:
        """Waits for all steps; those that were not read are forgotten."""
