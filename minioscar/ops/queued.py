"""A `Decoder` of raw kernels: the host queues a step while the one before it runs, and reads tokens a step behind.

A step that was launched and not read has put one token more into the cache than `cache.lengths` says. Nothing is lost by that: a
window holds what it held, and its next place, or the block that the token completed, is written again when the row goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache import Cache
from ..decoding import Decoder
from ..errors import Failure
from ..sampling import NOT_FINITE, RowSampling, history
from .decode_step import DecodeStep
from .upload import pinned

if TYPE_CHECKING:
    from ..model import Model
    from .cuda import Cuda

Array = Any


class QueuedDecoder(Decoder):
    """graph: a step is one CUDA graph; without, its launches one by one, which gives the same bits."""

    def __init__(
        self, ops: Cuda, model: Model, cache: Cache, rows: Sequence[RowSampling], logits: bool = False, graph: bool = True
    ):
        super().__init__(model, cache, rows, logits)
        self.ahead = 0 if logits else 1
        self.kernels = DecodeStep(ops, model.config, model.weights, model.tables_for(cache.context), cache, rows)
        self.queue = ops.queue(self.kernels, graph)
        self.running: deque[list[int]] = deque()  # the rows of the steps that are not read yet
        self.active: list[int] = []  # the rows that the device has as in use

    def feed(self, slots: Sequence[int], tokens: Sequence[int], step: int = 1) -> None:
        self.settle()
        super().feed(slots, tokens, step)
        seen = self.kernels.drawing.history
        for slot in slots if seen is not None else ():  # the step itself counts the token that it is fed with
            self.queue.put(seen[slot], history(self.rows[slot], self.drawn[slot][:-1], seen.shape[1]))
        newest = np.zeros(len(self.cache.lengths), np.int32)
        newest[list(slots)] = tokens
        self.queue.put(self.kernels.tokens, newest)
        self.queue.put(self.kernels.steps, np.full(len(newest), step, np.int32))
        self.active = []

    def launch(self, slots: Sequence[int]) -> None:
        slots = list(slots)
        if slots != self.active:
            lengths = np.full(len(self.cache.lengths), -1, np.int32)
            lengths[slots] = self.cache.lengths[slots] + len(self.running)
            self.queue.put(self.kernels.lengths, lengths)
            self.active = slots
        self.queue.go()
        self.running.append(slots)

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        slots = self.running.popleft()
        tokens = self.queue.tokens()[slots].astype(np.int64)
        self.cache.lengths[slots] += 1
        if (tokens < 0).any():
            raise Failure(NOT_FINITE)
        self._add(slots, tokens)
        return tokens, self.queue.get(self.kernels.logits)[slots] if self.wanted else None

    def settle(self) -> None:
        self.queue.settle()
        self.running.clear()


class Queue:
    """The steps of a `DecodeStep` on a stream of their own, each with a copy of its tokens behind it."""

    DEPTH = 2

    def __init__(self, kernels: DecodeStep, graph: bool):
        import cupy

        self.kernels, self.stream = kernels, cupy.cuda.Stream(non_blocking=True)
        self.graph = kernels.graph() if graph else None
        cupy.cuda.Device().synchronize()  # what made the arrays ran on another stream
        self.landing = pinned((self.DEPTH, kernels.rows), np.int32)
        self.arrived = [cupy.cuda.Event(disable_timing=True) for _ in range(self.DEPTH)]
        self.begun = self.taken = 0

    def put(self, array: Array, values: np.ndarray) -> None:
        array.set(values, stream=self.stream)

    def get(self, array: Array) -> np.ndarray:
        return array.get(stream=self.stream)

    def go(self) -> None:
        if self.graph is not None:
            self.graph.launch(self.stream)
        else:
            with self.stream:
                self.kernels.run()
        place = self.begun % self.DEPTH
        self.kernels.tokens.get(stream=self.stream, out=self.landing[place], blocking=False)
        self.arrived[place].record(self.stream)
        self.begun += 1

    def tokens(self) -> np.ndarray:
        """Of the oldest step that was not asked for yet; int32 [rows of the cache]."""
        place = self.taken % self.DEPTH
        self.arrived[place].synchronize()
        self.taken += 1
        return self.landing[place].copy()

    def settle(self) -> None:
        import cupy

        cupy.cuda.Device().synchronize()  # a prefill on the other stream, too
        self.taken = self.begun
