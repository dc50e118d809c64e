"""Several cards by kernels: a launch over `Ranks` is a launch on every card, with the card's own arrays.

Nearly everything is `Cuda` as it is, which looks at shapes and hands arrays to kernels. A decode step is recorded once,
for all cards, and captured as one graph a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from ..batch import Batch
from ..cache import Cache, LayerCache
from ..config import Config
from ..cublas import ONE
from ..decoding import Decoder, Stepper
from ..errors import Failure, one_line
from ..ops import linear
from ..ops.cuda import Cuda
from ..ops.decode import Queue, StepBatch
from ..ops.launch import Launch, Recording, TensorMap, kernel
from ..ops.linear import Products
from ..oscar import Scheme
from ..plans import BATCH_TOKENS, step_sizes
from ..sampling import RowSampling
from ..storage.upload import pinned
from ..weights import Layer
from .backend import Split
from .caches import split_kernel_cache
from .collectives import NOTHING_PUSHED, PUSHED, Gather, Links, Sum
from .ranks import Ranks, of_rank
from .shares import GATHERED, SUMMED
from .together import launch_graphs, undivided

Array = Any
NOT_READY, LAUNCH_FAILED = 600, 719  # cudaError_t: of a card that is at work; of one that gave up waiting by a trap
CHUNKS, CHUNK_TOKENS = 4, 1024  # of a prompt, whose sums are on their way one after the other; tokens at least
ZERO = np.zeros(1, np.float32)


class SplitRecording(Recording):
    """Of launches on several cards: addresses in all of their memories are different."""

    def append(self, launch: Launch | Sum | Gather) -> None:
        if isinstance(launch, Launch):
            super().append(launch)
        else:
            self.launches.append(launch.map(self._released))

    def _released(self, a: Any) -> Any:
        return Ranks(map(self._released, a.values)) if isinstance(a, Ranks) else super()._released(a)


class SplitCuda(Split, Cuda):
    """ranks: of each card, made while it is the current one. devices: of each (None: the first ones); one that has
    several ranks, as tests have it, gives each a stream of its own, so that none waits behind another in a sum.
    """

    recording_type = SplitRecording

    def __init__(
        self, ranks: Sequence[Cuda], config: Config, pushed: int = PUSHED, devices: Sequence[int] | None = None
    ):
        self.devices = list(range(len(ranks)) if devices is None else devices)
        self.is_shared = len(set(self.devices)) < len(ranks)
        self.streams: list[Any] = [None] * len(ranks)  # None: the device's current one
        self.streams = self.new_streams(len(ranks)) if self.is_shared else self.streams
        super().__init__(ranks, config)
        self.card, self.indices, self.recorded = self.ranks[0].card, None, None
        self.products, self.links = Products(self.xp, self.card), Links(self.xp, self.cards, self.on, pushed)
        self.last: list[Any] = [None] * len(ranks)  # the stream of each card's newest sum
        self.threads = ThreadPoolExecutor(max(len(ranks) - 1, 1), "launch")

    @contextmanager
    def on(self, rank: int) -> Iterator[None]:
        """A card as the current one. Raises Failure, which names it, where it fails."""
        from cupy.cuda import Device, driver, runtime

        try:
            with Device(self.devices[rank]), self.streams[rank] or nullcontext():
                yield
        except (runtime.CUDARuntimeError, driver.CUDADriverError) as error:
            guilty, error = self._guilty(rank, error)
            which = f"GPU {self.devices[guilty]} of {len(self.devices)} has failed ({one_line(error)})"
            raise Failure(f"{which}; the others give up within a minute, look at it with nvidia-smi") from None

    def _guilty(self, rank: int, error: Exception) -> tuple[int, Exception]:
        """Which card failed, and of what: a launch failure may be of one that waited for another in vain."""
        from cupy.cuda import Device, runtime

        for other, device in enumerate(self.devices) if getattr(error, "status", None) == LAUNCH_FAILED else ():
            try:
                with Device(device):
                    status = runtime.streamQuery(0)
            except runtime.CUDARuntimeError as failed:  # what has failed says so at any call
                status = failed.status
            if status not in (0, NOT_READY, LAUNCH_FAILED):
                return other, runtime.CUDARuntimeError(status)
        return rank, error

    def new_streams(self, count: int) -> list[Any]:
        """One for each rank; of a shared device such as wait for array code on its default stream."""
        import cupy

        made = []
        for rank in range(count):
            with self.on(rank):
                made.append(cupy.cuda.Stream(non_blocking=not self.is_shared))
        return made

    def run(self, launch: Launch | Sum | Gather) -> None:
        if not isinstance(launch, Launch):
            self.follow()
            launch.run(self.links)
        else:
            with self._together(launch) if launch.source.startswith("parallel/") else nullcontext():
                for rank, ops in enumerate(self.ranks):
                    with self.on(rank):
                        ops.run(launch_of(launch, rank))
        if self.recorded is not None:
            self.recorded.append(launch)

    def spread(self, x: Array) -> Ranks:
        import cupy

        with self.on(0):
            x = cupy.ascontiguousarray(x)  # another card would make it so, behind nothing
            cupy.cuda.Device().synchronize()  # others copy it on streams of their own
        if self.links.pushed != NOTHING_PUSHED:
            return super().spread(x)
        there = self.numpy(x)  # cards may only say that they reach each other's memory
        return Ranks(self.each(lambda ops: x if ops is self.first else ops.xp.asarray(there)))

    @contextmanager
    def _together(self, launch: Launch) -> Iterator[None]:
        """A launch in which cards wait for each other: none waits while another one's kernel is being loaded."""
        for rank in range(len(self.ranks)):
            with self.on(rank):
                kernel(launch.source, launch.name, launch.defines, self.devices[rank])
        self.follow()
        with undivided():
            yield

    def follow(self, streams: Sequence[Any] | None = None) -> None:
        """What is launched on these streams (None: the current ones) comes after the sums on others: all have the same
        inboxes and counters. A step that is being captured follows when its graph is launched."""
        from cupy.cuda import Event, get_current_stream

        if streams is None:
            streams = [own or get_current_stream(at) for own, at in zip(self.streams, self.devices, strict=True)]
        if streams == self.last or streams[0].is_capturing():
            return
        for rank, (last, stream) in enumerate(zip(self.last, streams, strict=True)):
            with self.on(rank):
                if last is not None:
                    stream.wait_event(last.record(Event(disable_timing=True)))
        self.last = list(streams)

    def cache_type(self, config: Config, scheme: Scheme) -> type[LayerCache]:
        return split_kernel_cache(self.ranks[0].cache_type(config, scheme), self.cards)

    def work_bytes(
        self, config: Config, tokens: int, context: int, rows: int = 1, penalties: bool | None = False
    ) -> int:
        """Also what a card computes of a sum, beside what it is added to, and the logits of its share; where nothing is
        pushed those of all shares, of each recorded step."""
        one = super().work_bytes(config, tokens, context, rows, penalties)
        part = self.dtype.itemsize * tokens * config.hidden_size + 4 * self.share * rows
        if self.links.pushed == NOTHING_PUSHED:
            part += 4 * self.cards * self.share * (rows + sum(step_sizes(rows)) if penalties is None else rows)
        return one + self.cards * part

    def say_if_slow(self, config: Config, scheme: Scheme) -> bool:
        return self.ranks[0].say_if_slow(self.local, scheme)

    # --- the transformer

    def linear(
        self, x: Array, weight: Array, bias: Array | None = None, *, norm: tuple[Array, float] | None = None,
        silu: bool = False, residual: Array | None = None, float32: bool = False,
    ) -> Array:  # fmt: skip
        """`Cuda.linear` with each card's share of a matrix. What is summed has bias and residual once."""
        if weight.split != SUMMED:
            y = super().linear(x, weight, bias, norm=norm, silu=silu, residual=residual, float32=float32)
            return self._gathered(y) if weight.split == GATHERED else y
        bias = self.once(bias)
        if len(x) * weight.shape[0] <= self.links.pushed and len(x) <= BATCH_TOKENS:
            return self._summed(super().linear(x, weight, bias), residual)
        if len(x) <= BATCH_TOKENS:
            return self._summed_in_place(super().linear(x, weight, bias, residual=self.once(residual)))
        return self._overlapped(x, weight, bias, residual)

    def once(self, x: Array | None) -> Ranks | None:
        """Of the first card only."""
        return None if x is None else Ranks([x.values[0], *[None] * (self.cards - 1)])

    def _overlapped(self, x: Ranks, weight: Ranks, bias: Ranks | None, residual: Ranks) -> Ranks:
        """By cuBLAS and NCCL: while the sum of a chunk of tokens is on its way, the next chunk is multiplied. The first
        card adds to its residual in place."""
        self.follow()
        out = Ranks(self.each(lambda ops, x: x if ops is self.ranks[0] else ops.xp.empty_like(x), residual))
        weight = self.dense(weight)
        size = max(-(-len(x) // CHUNKS), CHUNK_TOKENS)
        for chunk in (slice(i, i + size) for i in range(0, len(x), size)):
            part = out[chunk]
            for rank, ops in enumerate(self.ranks):
                with self.on(rank):
                    y = part.values[rank]
                    ops.add_product(y, x.values[rank][chunk], weight.values[rank], ONE if rank == 0 else ZERO)
                    if rank == 0 and bias is not None:
                        ops.run(linear.add(bias.values[0], y))
            self.links.sum_beside(part)
        self.links.join()
        return out

    def _summed(self, parts: Ranks, residual: Ranks | None) -> Ranks:
        out = parts if residual is None else residual
        self.run(self.links.all_reduce(parts, residual, out))
        return out

    def _summed_in_place(self, parts: Ranks) -> Ranks:
        self.run(Sum(parts))
        return parts

    def _gathered(self, parts: Ranks) -> Ranks:
        out = self.xp.empty((len(parts), self.config.vocab_size), np.float32)
        self.run(self.links.gather(parts, out, self.first_tokens))
        return out

    def add_product(self, y: Array, x: Array, weight: Array) -> None:
        self.each(lambda ops, y, x, weight: ops.add_product(y, x, weight), y, x, weight)

    def product(self, x: Array, weight: Array, float32: bool) -> Array:
        return Ranks(self.each(lambda ops, x, weight: ops.product(x, weight, float32), x, weight))

    def experts(self, x: Array, layer: Layer, config: Config, batch: Batch | StepBatch) -> Array:
        parts = super().experts(x, layer, self.local, batch, True)
        if x.size <= self.links.pushed and len(x) <= BATCH_TOKENS:
            return self._summed(parts, x)
        total = self._summed_in_place(parts)
        self.run(linear.add(x, total))  # on every card, so that a recorded step has it, too
        return total

    def rotate_scale(
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], layer_cache: LayerCache, config: Config,
        *rest: Any,
    ) -> tuple[Array, Any]:  # fmt: skip
        return super().rotate_scale(qkv, layer, tables, layer_cache, self.local, *rest)

    def decoder(self, model: Stepper, cache: Cache, rows: Sequence[RowSampling] | None, **how: Any) -> Decoder:
        return super().decoder(self._localized(model), cache, rows, **how)

    def prepare(
        self, model: Stepper, cache: Cache, passes: Sequence[Batch], rows: Sequence[RowSampling] | None, progress: bool
    ) -> None:
        super().prepare(self._localized(model), cache, passes, rows, progress)

    def queue(self, batch: StepBatch, runs: Mapping[int, Callable[[], None]], graph: bool) -> Queue:
        return SplitQueue(batch, runs, graph, self)


def launch_of(launch: Launch, rank: int) -> Launch:
    """What one card launches."""

    def own(a: Any) -> Any:
        return replace(a, array=of_rank(a.array, rank)) if isinstance(a, TensorMap) else of_rank(a, rank)

    return replace(launch, args=tuple(map(own, launch.args)))


@contextmanager
def on_streams(ops: SplitCuda, streams: Sequence[Any]) -> Iterator[None]:
    """One of each card as its current one."""

    def leave(rank: int) -> None:  # CuPy puts the stream before it back on the card that is the current one
        with ops.on(rank):
            streams[rank].__exit__()

    with ExitStack() as stack:
        if ops.is_shared:
            stack.callback(setattr, ops, "streams", ops.streams)
            ops.streams = list(streams)
        else:
            for rank, stream in enumerate(streams):
                with ops.on(rank):
                    stream.__enter__()
                stack.callback(leave, rank)
        yield


def captured(ops: SplitCuda, streams: Sequence[Any], run: Callable[[], object]) -> list[Any]:
    """What `run` launches as one CUDA graph for each card, there already: the first launch need not make room for it
    while another card waits."""
    with undivided(), on_streams(ops, streams):
        for rank, stream in enumerate(streams):
            with ops.on(rank):
                stream.begin_capture()
        run()
        graphs = []
        for rank, stream in enumerate(streams):
            with ops.on(rank):
                graphs.append(stream.end_capture())
                graphs[-1].upload(stream)
        return graphs


class SplitQueue(Queue):
    """Steps on a stream of each card; the first card's tokens are read, since all draw the same."""

    def __init__(self, batch: StepBatch, runs: Mapping[int, Callable[[], None]], graph: bool, ops: SplitCuda):
        import cupy

        self.graphs: dict[int, list[Any]] = {}  # freed before the communicators: NCCL waits for graphs with its sums
        self.communicators: tuple[Any, ...] = ()  # also where one collection takes `ops`, too: it clears no tuple
        self.batch, self.runs, self.ops = batch, runs, ops
        self.streams = ops.new_streams(len(ops.ranks))
        ops.each(lambda _: cupy.cuda.Device().synchronize())  # what made the arrays ran on other streams
        self.communicators = tuple(ops.links.communicators)
        self.graphs = {rows: self.capture(run) for rows, run in runs.items()} if graph else {}
        self.pinned_tokens = pinned((self.DEPTH, len(batch.tokens)), np.int32)
        with ops.on(0):
            self.copied = [cupy.cuda.Event(disable_timing=True) for _ in range(self.DEPTH)]
        self.num_launched = self.num_read = 0

    def capture(self, run: Callable[[], None]) -> list[Any]:
        return captured(self.ops, self.streams, run)

    def current(self) -> AbstractContextManager:
        return on_streams(self.ops, self.streams)

    def put(self, array: Ranks, values: np.ndarray) -> None:
        for rank, stream in enumerate(self.streams):
            with self.ops.on(rank):
                array.values[rank].set(values, stream=stream)

    def get(self, array: Ranks) -> np.ndarray:
        with self.ops.on(0):
            return array.values[0].get(stream=self.streams[0])

    def go(self, rows: int) -> None:
        if self.graphs:
            self.ops.follow(self.streams)
            launch_graphs(self.graphs[rows], self.streams, self.ops.on, self.ops.threads)
        else:
            with self.current():
                self.runs[rows]()
        slot = self.num_launched % self.DEPTH
        with self.ops.on(0):
            tokens = self.batch.tokens.values[0]
            tokens.get(stream=self.streams[0], out=self.pinned_tokens[slot], blocking=False)
            self.copied[slot].record(self.streams[0])
        self.num_launched += 1

    def tokens(self) -> np.ndarray:
        with self.ops.on(0):
            return super().tokens()

    def drain(self) -> None:
        import cupy

        self.ops.each(lambda _: cupy.cuda.Device().synchronize())
        self.num_read = self.num_launched
