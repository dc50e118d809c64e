"""Steps on a card whose rows join and leave between two of them, as the server's do, without a new recording.

There are arrays for all that any row may ask of sampling, and a step for each of `step_sizes`, in the same arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any

import numpy as np

from .backend import Runner
from .cache import Cache
from .config import Config
from .errors import Failure
from .ops.attention import DecodeState
from .ops.decode import StepBatch, StepDecoder
from .ops.sample import BINS, MAX_BIASES, MAX_ENDS, Drawing, ends_of, sample, settings_of
from .penalties import history, mask_words
from .plans import decode_plan, step_sizes
from .sampling import NOT_FINITE, RowSampling

Array = Any


class JoiningDrawing(Drawing):
    """allowed: int32 [rows, mask_words(vocab)]. biased: int32 [rows, MAX_BIASES], token ids padded with -1; biases:
    float32, what is added to their logits."""

    def __init__(self, xp: Any, rows: Sequence[RowSampling], vocab: int):
        super().__init__(xp, rows, vocab)
        size, self.draws, self.bins = len(rows), True, BINS
        self.adjusted, self.history = xp.empty((size, vocab), np.float32), xp.zeros((size, vocab), np.int32)
        widths = MAX_ENDS, mask_words(vocab), MAX_BIASES
        self.ends, self.allowed, self.biased = (xp.asarray(np.full((size, n), -1, np.int32)) for n in widths)
        self.biases = xp.zeros((size, MAX_BIASES), np.float32)

    def rows(self, some: slice) -> JoiningDrawing:
        """The same arrays of some rows."""
        part = copy(self)
        for name, array in vars(self).items():
            if getattr(array, "shape", None):
                setattr(part, name, array[some])
        return part

    def of_row(self, slot: int, row: RowSampling) -> Iterator[tuple[Array, np.ndarray]]:
        """Parts of the arrays, and what is to be in them when this row joins, nothing drawn yet but the token that its
        first step is fed with. Raises ValueError for more ends or biases than there is room for."""
        if row.masks and len(row.ends) > MAX_ENDS or len(row.bias) > MAX_BIASES:
            raise ValueError(f"a row that joins has room for {MAX_ENDS} ends and {MAX_BIASES} biases")
        yield self.settings[slot], settings_of(row, self.vocab)
        if row.sampling.penalizes:
            yield self.history[slot], history(row, [], self.vocab)
        yield self.ends[slot], ends_of(row, MAX_ENDS)
        yield self.allowed[slot], np.full(mask_words(self.vocab), -1, np.int32)
        ids = np.full(MAX_BIASES, -1, np.int32)
        ids[: len(row.bias)] = [token for token, _ in row.bias]
        biases = np.zeros(MAX_BIASES, np.float32)
        biases[: len(row.bias)] = [bias for _, bias in row.bias]
        yield self.biased[slot], ids
        yield self.biases[slot], biases


class JoiningBatch(StepBatch):
    drawing_type = JoiningDrawing

    def __init__(self, ops: Runner, config: Config, cache: Cache, rows: Any = None, *rest: Any):
        super().__init__(ops, config, cache, [RowSampling()] * len(cache.lengths), *rest)

    def by_rows(self, ops: Runner) -> dict[int, StepBatch]:
        size = len(self.tokens)
        return {n: self if n == size else self._first(n, ops) for n in step_sizes(size)}

    def _first(self, rows: int, ops: Runner) -> JoiningBatch:
        """Of the first rows, in the same arrays."""
        part, here, heads, scheme = copy(self), slice(rows), self.state.heads, self.state.scheme
        part.tokens, part.steps, part.lengths = self.tokens[here], self.steps[here], self.lengths[here]
        part.shifts = None if self.shifts is None else self.shifts[here]
        part.drawing = self.drawing.rows(here)
        plan = decode_plan(heads, scheme, rows, ops.card)
        of_rows = heads, scheme, plan, part.lengths, self.state.table, self.rotates_back
        part.state = DecodeState.allocate(ops.xp, *of_rows)
        return part


class JoiningDecoder(StepDecoder):
    batch_type = JoiningBatch

    def _first(self, slot: int, row: RowSampling, logits: Array, allowed: np.ndarray | None) -> int:
        """By the launches of a step, of this row alone."""
        drawing, here = self.batch.drawing, slice(slot, slot + 1)
        tokens, steps = self.batch.tokens[here], self.batch.steps[here]
        nothing, zero, one = (np.array([value], np.int32) for value in (-1, 0, 1))
        for array, values in (*drawing.of_row(slot, row), (tokens, nothing), (steps, zero)):
            self.queue.put(array, values)
        if allowed is not None:
            self.allow(slot, allowed)
        with self.queue.current():
            for launch in sample(logits[None], drawing.rows(here), steps, tokens):
                self.model.ops.run(launch)
        self.queue.put(steps, one)
        self.active = []
        self.current.add(slot)
        token = int(self.queue.get(tokens)[0])
        if token < 0:
            raise Failure(NOT_FINITE)
        return token

    def allow(self, slot: int, allowed: np.ndarray) -> None:
        self.queue.put(self.batch.drawing.allowed[slot], allowed)

    def ordered(self) -> AbstractContextManager:
        return self.queue.current()

    def logits_of(self, slot: int) -> np.ndarray:
        return self.queue.get(self.work.logits[slot])
