"""Decode steps on a card: `model.step` over arrays that never move, run once, its launches recorded and replayed from then on.

Tokens, lengths and the numbers of the steps live on the device: a step reads the tokens that the step before has drawn, and the host
queues the next step while this one runs and reads tokens a step behind. A step that was launched and not read has put one token more
into the cache than `cache.lengths` says. Nothing is lost by that: a window holds what it held, and its next slot, or the block that the
token completed, is written again when the row goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..cache import Cache, LayerCache
from ..config import Config
from ..decoding import Decoder, Stepper
from ..errors import Failure
from ..oscar import Scheme
from ..sampling import NOT_FINITE, RowSampling, history
from . import attention, linear_batch, sample
from .launch import Launch
from .upload import pinned

Array = Any


class Card(Protocol):
    """The back end, as a step needs it (cuda.py)."""

    xp: Any
    multiprocessors: int
    capability: int

    def run(self, launch: Launch) -> None: ...


class StepBatch:
    """The newest token of every row, as `Batch` is the new tokens of a pass: int32 [rows] arrays on the device, a row of the cache each.

    `tokens` stand at positions `lengths` (-1: the row is not in use) and are the number `steps` of what their sequences drew; when a step
    has ended, all three are those of the next. rows: how each draws. Raises ValueError for schemes and shapes that have no kernels.
    """

    last = None  # every token is the last of its sequence

    def __init__(self, ops: Card, config: Config, cache: Cache, rows: Sequence[RowSampling]):
        size, xp, scheme = len(cache.lengths), ops.xp, cache.scheme
        if reason := unsupported(config, scheme, size):
            raise ValueError(reason)
        self.end, self.scheme, self.drawing = cache.context, scheme, sample.Drawing(xp, rows, config.vocab_size)
        self.heads = attention.Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        self.tokens, self.steps = (xp.zeros(size, np.int32) for _ in range(2))
        self.lengths = xp.asarray(np.full(size, -1, np.int32))
        self.plan = attention.decode_plan(self.heads, scheme, size, ops.multiprocessors, ops.capability)
        self.tasks = xp.empty(self.plan.task_shape, np.int32)
        self.workspace = xp.empty(self.plan.workspace_floats(config.head_dim), np.float32)
        self.split_counter = xp.zeros(self.plan.counters(config.head_dim), np.int32)

    def schedule(self, ops: Card) -> None:
        """Shares the step's attention out to the warps of the card, for every layer."""
        ops.run(attention.schedule(self.heads, self.scheme, self.plan, self.lengths, self.tasks, self.workspace))

    def attend(self, q: Array, layer_cache: LayerCache) -> Array:
        """One query a row over the cache, which holds the new tokens already."""
        out, where = layer_cache.xp.empty_like(q), (self.workspace, self.split_counter)
        attend = attention.decode_attention(
            self.heads, self.scheme, self.plan, q, layer_cache.arrays, self.lengths, self.tasks, out, None, *where,
            parity=layer_cache.index % 2,
        )
        layer_cache.ops.run(attend)
        return out

    def pack(self, cache: Cache, ops: Card) -> None:
        """The windows that this step has filled, of all layers at once: mostly it finds nothing."""
        if self.scheme.quantized:
            ops.run(attention.pack_step(self.heads, self.scheme, self.lengths, cache.arrays, len(cache.layers)))

    def draw(self, logits: Array, ops: Card) -> Array:
        """The next tokens, and everything one step further."""
        for launch in sample.sample(logits, self.drawing, self.steps, self.tokens):
            ops.run(launch)
        ops.run(sample.advance(self.lengths, self.steps))
        return self.tokens


class StepDecoder(Decoder):
    """A `Decoder` whose steps are queued. replay: "graph", a step is one CUDA graph; "launches", its launches one by one, which gives the
    same bits; "eager", `model.step` itself each time, for a back end that looks at what every operation computes.
    """

    def __init__(
        self, model: Stepper, cache: Cache, rows: Sequence[RowSampling], *, logits: bool = False, replay: str = "graph"
    ):
        super().__init__(model, cache, rows, logits)
        self.ahead, ops = 0 if logits else 1, model.ops
        self.batch = StepBatch(ops, model.config, cache, rows)
        self.running: deque[list[int]] = deque()  # the rows of the steps that are not read yet
        self.active: list[int] = []  # the rows that the device has as in use
        if replay == "eager":
            self.queue = ops.queue(self.batch, self.run_model, False)
            return
        with ops.recording(len(cache.lengths), model.config) as self.recorded:
            self.run_model()  # no row is in use: it computes, and changes nothing
        self.queue = ops.queue(self.batch, self.replay, replay == "graph")

    def run_model(self) -> None:
        draw = partial(self.batch.draw, ops=self.model.ops)
        self.logits = self.model.step(self.batch.tokens, self.cache, self.batch, draw)[1]

    def replay(self) -> None:
        for launch in self.recorded.launches:
            self.model.ops.run(launch)

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
        self.active = []

    def launch(self, slots: Sequence[int]) -> None:
        slots = list(slots)
        if slots != self.active:
            lengths = np.full(len(self.cache.lengths), -1, np.int32)
            lengths[slots] = self.cache.lengths[slots] + len(self.running)
            self.queue.put(self.batch.lengths, lengths)
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
        return tokens, self.queue.get(self.logits)[slots] if self.wanted else None

    def drain(self) -> None:
        self.queue.drain()
        self.running.clear()


class Queue:
    """Steps on a stream of their own, each with a copy of its tokens behind it. run: takes a step on the current stream."""

    DEPTH = 2

    def __init__(self, batch: StepBatch, run: Callable[[], None], graph: bool):
        import cupy

        self.batch, self.run, self.stream = batch, run, cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()  # what made the arrays ran on another stream
        self.graph = self.captured() if graph else None
        self.landing = pinned((self.DEPTH, len(batch.tokens)), np.int32)
        self.copied = [cupy.cuda.Event(disable_timing=True) for _ in range(self.DEPTH)]
        self.begun = self.taken = 0

    def captured(self) -> Any:
        """A step as one CUDA graph; it holds the addresses of its arrays."""
        with self.stream:
            self.stream.begin_capture()
            self.run()
            return self.stream.end_capture()

    def put(self, array: Array, values: np.ndarray) -> None:
        array.set(values, stream=self.stream)

    def get(self, array: Array) -> np.ndarray:
        return array.get(stream=self.stream)

    def go(self) -> None:
        if self.graph is not None:
            self.graph.launch(self.stream)
        else:
            with self.stream:
                self.run()
        slot = self.begun % self.DEPTH
        self.batch.tokens.get(stream=self.stream, out=self.landing[slot], blocking=False)
        self.copied[slot].record(self.stream)
        self.begun += 1

    def tokens(self) -> np.ndarray:
        """Of the oldest step that was not asked for yet; int32 [rows of the cache]."""
        slot = self.taken % self.DEPTH
        self.copied[slot].synchronize()
        self.taken += 1
        return self.landing[slot].copy()

    def drain(self) -> None:
        import cupy

        cupy.cuda.Device().synchronize()  # a prefill on the other stream, too
        self.taken = self.begun


def unsupported(config: Config, scheme: Scheme, rows: int) -> str | None:
    """Why a step of so many rows cannot be raw kernels alone, or None."""
    if scheme.quantized and (reason := attention.unsupported(scheme, config.head_dim)):
        return reason
    if config.head_dim not in attention.HEAD_DIMS:
        return f"head_dim {config.head_dim} is not one of {', '.join(map(str, attention.HEAD_DIMS))}"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return f"hidden and intermediate size {config.hidden_size}, {config.intermediate_size} are not multiples of 8"
    if config.vocab_size > sample.SAMPLE_VOCAB:
        return f"a vocabulary of {config.vocab_size} is more than {sample.SAMPLE_VOCAB}"
    if rows > linear_batch.BATCH_TOKENS:
        return f"{rows} rows are more than {linear_batch.BATCH_TOKENS}"
    return None
