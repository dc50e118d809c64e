"""Decode steps of the rows of one cache: the next token of each row, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .cache import Cache
from .sampling import Sampling, sample

if TYPE_CHECKING:
    from .model import Model


class Decoder:
    """A step at a time, through the operations that a prefill uses too.

    `feed` says where the rows stand, `launch` begins a step of some of them, `read` has what came of the oldest that was not read yet.
    sequences: the number under which each row of the cache draws its random numbers. logits: `read` returns them too.
    """

    ahead = 0  # steps that may be launched before the one before them is read

    def __init__(self, model: Model, cache: Cache, sampling: Sampling, sequences: Sequence[int], logits: bool = False):
        self.model, self.cache, self.sampling, self.sequences, self.wanted = model, cache, sampling, sequences, logits
        self.newest, self.step = np.zeros(len(cache.lengths), np.int64), 0
        self.found: tuple[np.ndarray, np.ndarray | None] | None = None

    def feed(self, slots: Sequence[int], tokens: Sequence[int], step: int = 1) -> None:
        """The newest token of each row, which its cache does not hold yet; the next ones are drawn as those of `step`."""
        self.newest[list(slots)], self.step = tokens, step

    def launch(self, slots: Sequence[int]) -> None:
        """A step of these rows. Broken off, it leaves a cache that is whole again."""
        slots = list(slots)
        batch, ids, sequences = self.cache.place(slots, [1] * len(slots)), self.newest[slots], [self.sequences[slot] for slot in slots]
        try:
            if self.wanted:
                logits = self.model.forward(ids, self.cache, batch)
                drawn = [sample(row, self.sampling, sequence, self.step) for row, sequence in zip(logits, sequences, strict=True)]
                self.found = np.array(drawn), logits
            else:
                self.found = self.model.step(ids, self.cache, batch, self.sampling, self.step, sequences=sequences), None
        except BaseException:
            self.cache.broken_off(batch)
            raise
        self.newest[slots], self.step = self.found[0], self.step + 1

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens, int64 [rows of the step], and logits, float32 [rows, vocab], where they are wanted.

        `cache.lengths` counts the tokens that these were drawn behind. Raises Failure where logits are not finite.
        """
        return self.found

    def settle(self) -> None:
        """Nothing is under way afterwards; a step that was not read is forgotten."""
