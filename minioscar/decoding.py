"""Decode steps of the rows of one cache: the next token of each row, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np

from .backend import Backend
from .batch import Batch
from .cache import Cache
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
    rotates_values: bool

    def step(self, ids: Array, cache: Cache, batch: Batch, draw: Draw | None = None) -> tuple[Array, Array]: ...


class Decoder:
    """A step at a time, through the operations that a prefill uses too.

    `feed` says where the rows stand, `launch` begins a step of some of them, `read` has what came of the oldest that
    was not read yet. rows: how each row of the cache draws; None: each row says so when it joins. logits: `read`
    returns them too.
    """

    ahead = 0  # steps that may be launched before the one before them is read

    def __init__(self, model: Stepper, cache: Cache, rows: Sequence[RowSampling] | None, logits: bool = False):
        self.model, self.cache, self.with_logits = model, cache, logits
        self.rows = [RowSampling()] * len(cache.lengths) if rows is None else list(rows)
        # By each row so far; the newest token is not in the cache yet
        self.drawn: list[list[int]] = [[] for _ in self.rows]
        self.allowed: dict[int, np.ndarray] = {}
        self.newest: tuple[np.ndarray, dict[int, np.ndarray]] | None = None

    def feed(self, slots: Sequence[int], tokens: Sequence[int], step: int = 1) -> None:
        """The newest token of each row, which its cache does not hold yet; the next ones are drawn as those of
        `step`."""
        for slot, token in zip(slots, tokens, strict=True):
            self.drawn[slot] = [*self.drawn[slot][: step - 1], int(token)]

    def join(self, slot: int, row: RowSampling, logits: Array, allowed: np.ndarray | None = None) -> int:
        """A row begins between two steps; the first token that it draws, from the logits behind what its cache holds,
        float32 [vocab] on the back end, made within `ordered`. allowed: as `allow` has it.

        Steps of other rows may be running, one of this row may not. It leaves by not being launched any more. Raises
        Failure where the logits are not finite.
        """
        token = self._first(slot, row, logits, allowed)
        self.rows[slot], self.drawn[slot] = row, [token]
        self.allowed.pop(slot, None)
        return token

    def _first(self, slot: int, row: RowSampling, logits: Array, allowed: np.ndarray | None) -> int:
        return next_token(self.model.ops.numpy(logits), row, 0, (), allowed)

    def allow(self, slot: int, allowed: np.ndarray) -> None:
        """The tokens that a row may draw from its next step on, a mask as `penalties.adjusted` takes it."""
        self.allowed[slot] = allowed

    def ordered(self) -> AbstractContextManager:
        """Passes and copies of rows of the cache within it come after the steps that were launched before it, and
        before those launched after."""
        return nullcontext()

    def rows_with(self, slot: int) -> int:
        """How many rows a step pays for in which this one, and none behind it, is in use."""
        return 1

    def launch(self, slots: Sequence[int]) -> None:
        """A step of these rows. Interrupted, it leaves a consistent cache."""
        slots = list(slots)
        batch, ids = self.cache.batch_for(slots, [1] * len(slots)), np.array([self.drawn[slot][-1] for slot in slots])
        try:
            tokens, logits = self.model.step(ids, self.cache, batch, partial(self._draw, slots))
        except BaseException:
            self.cache.rollback(batch)
            raise
        self.newest = tokens, dict(zip(slots, self.model.ops.numpy(logits), strict=True))
        self._add(slots, tokens)

    def _draw(self, slots: Sequence[int], logits: Array) -> np.ndarray:
        rows = zip(self.model.ops.numpy(logits), slots, strict=True)
        drawn = self.drawn
        return np.array([
            next_token(row, self.rows[slot], len(drawn[slot]), drawn[slot], self.allowed.get(slot))
            for row, slot in rows
        ])  # fmt: skip

    def _add(self, slots: Sequence[int], tokens: np.ndarray) -> None:
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            self.drawn[slot].append(token)

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens, int64 [rows of the step], and logits, float32 [rows, vocab], if `logits`.

        `cache.lengths` counts the tokens before these. Raises Failure where logits are not finite.
        """
        tokens, logits = self.newest
        return tokens, np.stack(list(logits.values())) if self.with_logits else None

    def logits_of(self, slot: int) -> np.ndarray:
        """Logits of a row in the newest step, after `read` and before the next `launch`; float32 [vocab]."""
        return self.newest[1][slot]

    def drain(self) -> None:
        """Waits for all steps; those that were not read are forgotten."""
