"""Decode steps on a card: `model.step` over arrays that never move, run once, its launches recorded and replayed.

Tokens, lengths and step numbers live on the device: a step reads the tokens that the step before has drawn, and the
host queues the next step while this one runs and reads tokens a step behind. A step that was launched and not read has
put one token more into the cache than `cache.lengths` says. Nothing is lost by that: the window has a slot for it even
when it is full, so the slots of older tokens are untouched; its own slot, and the block that was packed behind it, are
written again when the row goes on. A second one (an interrupt while the host waits for the first) may overwrite the
window's oldest token: then the row loses its window (`Cache.restore`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from ..backend import Runner
from ..cache import Cache, LayerCache
from ..config import Config
from ..decoding import Decoder, Stepper
from ..errors import Failure
from ..experts import plans as experts
from ..oscar import Scheme
from ..pages import unsupported as has_no_pages
from ..penalties import history
from ..plans import BATCH_TOKENS, Heads, decode_plan
from ..sampling import NOT_FINITE, RowSampling
from ..storage.upload import pinned
from . import attention
from .attention import DecodeState
from .sample import SAMPLE_VOCAB, Drawing, advance, sample

Array = Any


class StepBatch:
    """The newest token of every row of the cache, as `Batch` is the new tokens of a pass.

    int32 [rows] arrays on the device: `tokens` stand at positions `lengths` (-1: the row is not in use), `steps` counts
    what the rows have drawn. A step leaves in all three what the next one takes. shifts: `Cache.shifts`, of a model
    that reads pictures. feedback: `Weights.key_feedback`. Raises ValueError without kernels.
    """

    drawing_type = Drawing
    last = inputs = None  # every token is the last of its sequence, and none is of a picture

    def __init__(
        self, ops: Runner, config: Config, cache: Cache, rows: Sequence[RowSampling], feedback: Array | None = None,
        rotates_values: bool = False,
    ):
        size, xp, scheme, heads = len(cache.lengths), ops.xp, cache.scheme, Heads.of(config)
        if reason := unsupported(config, scheme, size):
            raise ValueError(reason)
        self.feedback = feedback
        self.end, self.drawing = cache.context, self.drawing_type(xp, rows, config.vocab_size)
        self.tokens, self.steps = (xp.zeros(size, np.int32) for _ in range(2))
        self.lengths = xp.asarray(np.full(size, -1, np.int32))
        self.shifts = xp.zeros(size, np.int32) if config.towers else None
        plan = decode_plan(heads, scheme, size, ops.card)
        self.rotates_back = rotates_values and heads.head_dim in attention.ROTATED_DIMS
        of_rows = heads, scheme, plan, self.lengths, cache.arrays["table"], self.rotates_back
        self.state, self.all_lengths = DecodeState.allocate(xp, *of_rows), self.lengths

    def by_rows(self, ops: Runner) -> dict[int, StepBatch]:
        """The steps that are recorded, by how many of the first rows they are of."""
        return {len(self.tokens): self}

    def schedule(self, ops: Runner) -> None:
        """Shares the step's attention out to the warps of the card, for every layer."""
        ops.run(attention.schedule(self.state))

    def attend(self, q: Array, layer_cache: LayerCache) -> Array:
        """One query a row over the cache, which holds the new tokens already."""
        out, parity = layer_cache.xp.empty_like(q), layer_cache.index % 2
        layer_cache.ops.run(attention.decode_attention(self.state, q, layer_cache.arrays, out, parity=parity))
        return out

    def pack(self, cache: Cache, ops: Runner) -> None:
        """The windows that this step has filled, of all layers at once: mostly there are none. All rows are looked at,
        since layers lie as far apart as they take."""
        heads, scheme = self.state.heads, self.state.scheme
        if scheme.quantized:
            lengths, layers = self.all_lengths, len(cache.layers)
            ops.run(attention.pack_step(heads, scheme, lengths, cache.arrays, layers, self.feedback))

    def draw(self, logits: Array, ops: Runner) -> Array:
        """The next tokens, and everything one step further."""
        for launch in sample(logits, self.drawing, self.steps, self.tokens):
            ops.run(launch)
        ops.run(advance(self.lengths, self.steps))
        return self.tokens


class Step:
    """`model.step` over one batch, and its launches once it was recorded. It knows no decoder and no queue: without a
    circle of references a cache is freed as soon as its decoder is.
    """

    def __init__(self, model: Stepper, cache: Cache, batch: StepBatch):
        self.model, self.cache, self.batch = model, cache, batch
        self.logits: Array = None  # float32 [rows, vocab] on the device, of the newest step

    def run(self) -> None:
        draw = partial(self.batch.draw, ops=self.model.ops)
        self.logits = self.model.step(self.batch.tokens, self.cache, self.batch, draw)[1]

    def record(self) -> None:
        """Runs it while no row is in use: it computes, and changes nothing."""
        with self.model.ops.recording(len(self.batch.tokens), self.model.config) as self.recorded:
            self.run()

    def replay(self) -> None:
        for launch in self.recorded.launches:
            self.model.ops.run(launch)


class StepDecoder(Decoder):
    """A `Decoder` whose steps are queued. replay: "graph", a step is one CUDA graph; "launches", its launches one by
    one (equal bits); "eager", `model.step` itself, for a back end that looks at what every operation computes. Of rows
    that join and leave: joining.py."""

    batch_type = StepBatch

    def __init__(
        self, model: Stepper, cache: Cache, rows: Sequence[RowSampling] | None, *, logits: bool = False,
        replay: str = "graph",
    ):
        super().__init__(model, cache, rows, logits)
        self.ahead, ops = 0 if logits else 1, model.ops
        of_model = model.weights.key_feedback, model.rotates_values
        self.batch = self.batch_type(ops, model.config, cache, self.rows, *of_model)
        self.running: deque[list[int]] = deque()  # the rows of the steps that are not read yet
        self.active: list[int] = []  # the rows that the device has as in use
        self.current: set[int] = set()  # the rows whose newest token and history the device has
        self.works = {rows: Step(model, cache, batch) for rows, batch in self.batch.by_rows(ops).items()}
        self.work = self.works[len(cache.lengths)]  # of the newest step
        if replay != "eager":
            for work in self.works.values():
                work.record()
        runs = {rows: work.run if replay == "eager" else work.replay for rows, work in self.works.items()}
        self.queue = ops.queue(self.batch, runs, replay == "graph")

    def feed(self, slots: Sequence[int], tokens: Sequence[int], step: int = 1) -> None:
        self.drain()
        super().feed(slots, tokens, step)
        seen = self.batch.drawing.history
        for slot in slots if seen is not None else ():  # the step itself counts the token that it is fed with
            self.queue.put(seen[slot], history(self.rows[slot], self.drawn[slot][:-1], seen.shape[1]))
        newest = np.zeros(len(self.cache.lengths), np.int32)
        newest[list(slots)] = tokens
        self.queue.put(self.batch.tokens, newest)
        self.queue.put(self.batch.steps, np.full(len(newest), step, np.int32))
        self.active, self.current = [], set(slots)

    def rows_with(self, slot: int) -> int:
        return next(rows for rows in self.works if rows > slot)

    def launch(self, slots: Sequence[int]) -> None:
        slots, rows = list(slots), self.rows_with(max(slots))
        if slots != self.active:
            for slot in slots:
                self.cache.check_whole(slot)
                if slot not in self.current:
                    self._resume(slot)
            self.current = set(slots)
            lengths = np.full(len(self.cache.lengths), -1, np.int32)
            lengths[slots] = [self.cache.lengths[slot] + sum(slot in step for step in self.running) for slot in slots]
            self.queue.put(self.batch.lengths, lengths)
            if self.batch.shifts is not None:
                self.queue.put(self.batch.shifts, self.cache.shifts.astype(np.int32))
            self.active = slots
        self.work = self.works[rows]
        self.queue.go(rows)
        self.running.append(slots)

    def _resume(self, slot: int) -> None:
        """A row that was left out of steps, all of its own read: these have drawn something for it all the same."""
        self.queue.put(self.batch.tokens[slot : slot + 1], np.array(self.drawn[slot][-1:], np.int32))
        if (seen := self.batch.drawing.history) is not None:
            self.queue.put(seen[slot], history(self.rows[slot], self.drawn[slot][:-1], seen.shape[1]))

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        slots = self.running[0]
        tokens = self.queue.tokens()[slots].astype(np.int64)
        self.cache.lengths[slots] += 1
        self.running.popleft()
        if (tokens < 0).any():
            raise Failure(NOT_FINITE)
        self._add(slots, tokens)
        return tokens, self.queue.get(self.work.logits)[slots] if self.with_logits else None

    def drain(self) -> None:
        self.queue.drain()
        for slot, unread in Counter(slot for slots in self.running for slot in slots).items():
            self.cache.restore(slot, int(self.cache.lengths[slot]), unread)
        self.running.clear()


class Queue:
    """Steps on a stream of their own, each followed by a copy of its tokens. runs: a step of so many rows on the
    current stream."""

    DEPTH = 2

    def __init__(self, batch: StepBatch, runs: Mapping[int, Callable[[], None]], graph: bool):
        import cupy

        self.batch, self.runs, self.stream = batch, runs, cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()  # what made the arrays ran on another stream
        self.graphs = {rows: self.capture(run) for rows, run in runs.items()} if graph else {}
        self.pinned_tokens = pinned((self.DEPTH, len(batch.tokens)), np.int32)
        self.copied = [cupy.cuda.Event(disable_timing=True) for _ in range(self.DEPTH)]
        self.num_launched = self.num_read = 0

    def capture(self, run: Callable[[], None]) -> Any:
        """A step as one CUDA graph; it holds the addresses of its arrays."""
        with self.stream:
            self.stream.begin_capture()
            run()
            return self.stream.end_capture()

    def current(self) -> AbstractContextManager:
        """The steps' stream as CuPy's current one."""
        return self.stream

    def put(self, array: Array, values: np.ndarray) -> None:
        array.set(values, stream=self.stream)

    def get(self, array: Array) -> np.ndarray:
        return array.get(stream=self.stream)

    def go(self, rows: int) -> None:
        if self.graphs:
            self.graphs[rows].launch(self.stream)
        else:
            with self.stream:
                self.runs[rows]()
        slot = self.num_launched % self.DEPTH
        self.batch.tokens.get(stream=self.stream, out=self.pinned_tokens[slot], blocking=False)
        self.copied[slot].record(self.stream)
        self.num_launched += 1

    def tokens(self) -> np.ndarray:
        """Of the oldest step that was not read yet; int32 [rows of the cache]."""
        slot = self.num_read % self.DEPTH
        self.copied[slot].synchronize()
        self.num_read += 1
        return self.pinned_tokens[slot].copy()

    def drain(self) -> None:
        import cupy

        cupy.cuda.Device().synchronize()  # a prefill on the other stream, too
        self.num_read = self.num_launched


def unsupported(config: Config, scheme: Scheme, rows: int) -> str | None:
    """Why a step of so many rows cannot be raw kernels alone, or None."""
    if reason := has_no_pages(scheme, config.head_dim):
        return reason
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return f"hidden and intermediate size {config.hidden_size}, {config.intermediate_size} are not multiples of 8"
    if config.vocab_size > SAMPLE_VOCAB:
        return f"a vocabulary of {config.vocab_size} is more than {SAMPLE_VOCAB}"
    if reason := experts.unsupported(config):
        return reason
    if rows > BATCH_TOKENS:
        return f"{rows} rows are more than {BATCH_TOKENS}"
    return None
