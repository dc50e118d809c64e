"""Cards of CuPy as far as `parallel/cuda.py` asks for them, over the simulator: devices, streams, events and graphs.

What is used while another card is the current one is a fault: arrays in array code and in launches, streams, events.
Each card runs its launches in their order, those in which all take part when every card has come to it; a host that
waits for one that not all have come to would wait for ever, which is a fault, too.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from minioscar.config import Config
from minioscar.ops.launch import Launch, TensorMap
from minioscar.ops.linear import Products
from minioscar.parallel.cuda import SplitCuda

from . import _arrays, _runtime, array
from .backend import Simt, _Memory
from .nccl import Nccl

BASIC = int, slice, type(None), type(Ellipsis), np.integer


@dataclass(frozen=True)
class Work:
    """What a card has to do. meeting: what all have alike where all take part, whose phases 1, 2 and 4 are run then."""

    run: Callable[[int], None]
    meeting: object = None


class Cards:
    """cuda: what stands for `cupy.cuda`. reach: whether cards say that they reach each other's memory."""

    def __init__(self, count: int, reach: bool = True):
        self.reach, self.here, self.lock = reach, threading.local(), threading.RLock()
        self.queues = [deque[Work]() for _ in range(count)]
        self.card_of, self.stream_at = dict[int, int](), dict[int, Stream]()  # by addresses of arrays; of streams
        self.enabled: list[tuple[int, int]] = []  # pairs of cards, the second of which the first may write to
        self.records = False  # launches are noted, and do not run: simulated memory has nothing for rows not in use
        error = type("CUDAError", (RuntimeError,), {})
        self.cuda = SimpleNamespace(
            Device=lambda number=None: Device(self, self.current if number is None else number),
            Stream=lambda non_blocking=False: Stream(self), Event=lambda disable_timing=False: Event(self),
            get_current_stream=lambda number=None: self.streams_of(number)[-1],
            runtime=self._runtime(error), driver=SimpleNamespace(CUDADriverError=error), nccl=Nccl(self),
        )  # fmt: skip

    def _runtime(self, error: type[Exception]) -> SimpleNamespace:
        return SimpleNamespace(
            CUDARuntimeError=error, getDeviceCount=lambda: len(self.queues), memcpy2DAsync=self._copy_2d,
            getDeviceProperties=lambda card: {"name": b"a card"}, deviceCanAccessPeer=lambda card, other: self.reach,
            deviceEnablePeerAccess=lambda other: self.enabled.append((self.current, other)),
        )  # fmt: skip

    @property
    def current(self) -> int:
        return getattr(self.here, "stack", [0])[-1]

    def streams_of(self, card: int | None = None) -> list[Stream]:
        """Of the calling thread: the current one is the last."""
        streams = self.here.__dict__.setdefault("streams", {})
        return streams.setdefault(self.current if card is None else card, [Stream(self, None)])

    def check(self, card: int | None) -> None:
        assert card in (None, self.current), f"of card {card}, while card {self.current} is the current one"

    def stream(self, at: int) -> Stream:
        """By its address: of the current card."""
        stream = self.stream_at[at] if at else Stream(self, None)
        self.check(stream.card)
        return stream

    def bytes_at(self, card: int, at: int, size: int) -> np.ndarray:
        """Memory of a card, which lies within one array."""
        start = max(start for start in list(_arrays) if start <= at)
        assert at + size <= start + _arrays[start][0], "beyond an array"
        assert self.card_of[start] == card, f"memory of card {self.card_of[start]} is used by card {card}"
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(at))

    def _copy_2d(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, height: int, kind: int, stream: int
    ) -> None:
        card = self.current

        def rows(at: int, pitch: int) -> np.ndarray:
            flat = self.bytes_at(card, at, (height - 1) * pitch + width)
            return np.lib.stride_tricks.as_strided(flat, (height, width), (pitch, 1))

        def copy(_: int) -> None:
            rows(to, to_pitch)[...] = rows(source, pitch)
            for row in range(height):
                _runtime().simt_mark_written(to + row * to_pitch, width)

        assert kind == 3 and min(to_pitch, pitch) >= width
        self.stream(stream).enqueue(card, Work(copy))

    def add(self, card: int, work: Work) -> None:
        with self.lock:
            self.queues[card].append(work)
            while not self.records and self._run_next():
                pass
            if self.records:
                self.queues[card].pop()

    def _run_next(self) -> bool:
        for queue in self.queues:
            if queue and queue[0].meeting is None:
                queue.popleft().run(0)
                return True
        if not all(self.queues):
            return False
        together = [queue.popleft() for queue in self.queues]
        assert len({work.meeting for work in together}) == 1, "cards are out of step"
        for phase in (1, 2, 4):
            for work in together:
                work.run(phase)
        return True

    def wait(self, card: int) -> None:
        assert not self.queues[card], f"the host waits for card {card}, which waits for a launch on another one"


class Device:
    def __init__(self, cards: Cards, number: int):
        self.cards, self.number = cards, number

    def __enter__(self) -> None:
        self.cards.here.__dict__.setdefault("stack", [0]).append(self.number)

    def __exit__(self, *_: object) -> None:
        self.cards.here.stack.pop()

    def synchronize(self) -> None:
        self.cards.wait(self.number)


class Stream:
    """card: None is the default stream of any."""

    def __init__(self, cards: Cards, card: int | None = -1):
        self.cards, self.card = cards, cards.current if card == -1 else card
        self.captured: list[Work] | None = None
        self.ptr = 0 if self.card is None else id(self)
        if self.ptr:
            cards.stream_at[self.ptr] = self

    def enqueue(self, card: int, work: Work) -> None:
        if self.captured is not None:
            self.captured.append(work)
        else:
            self.cards.add(card, work)

    def __enter__(self) -> None:
        self.cards.check(self.card)
        self.cards.streams_of().append(self)

    def __exit__(self, *_: object) -> None:
        assert self.cards.streams_of().pop() is self, "a stream is left while another card is the current one"

    def begin_capture(self) -> None:
        self.cards.check(self.card)
        self.captured = []

    def end_capture(self) -> Graph:
        self.cards.check(self.card)
        works, self.captured = self.captured, None
        return Graph(self.cards, self.card, works)

    def is_capturing(self) -> bool:
        return self.captured is not None

    def record(self, event: Event) -> Event:
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.cards.check(self.card)
        assert self.captured is None, "what is captured waits for what is not"


class Event:
    def __init__(self, cards: Cards):
        self.cards, self.card = cards, cards.current

    def record(self, stream: Stream) -> None:
        self.cards.check(self.card)
        self.cards.check(stream.card)

    def synchronize(self) -> None:
        self.cards.wait(self.card)


class Graph:
    def __init__(self, cards: Cards, card: int, works: list[Work]):
        self.cards, self.card, self.works = cards, card, works

    def upload(self, stream: Stream) -> None:
        self.cards.check(self.card)
        self.cards.check(stream.card)

    def launch(self, stream: Stream) -> None:
        self.upload(stream)
        for work in self.works:
            self.cards.add(self.card, work)


class OnCard(np.ndarray):
    """An array of one card; array code over it runs while that card is the current one and has nothing left to do."""

    cards: Cards | None = None
    card: int | None = None

    def __array_finalize__(self, other: Any) -> None:
        self.cards, self.card = getattr(other, "cards", None), getattr(other, "card", None)

    def plain(self) -> np.ndarray:
        self.cards.check(self.card)
        self.cards.wait(self.card)
        return self.view(np.ndarray)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        options |= {"out": tuple(map(plain, out))} if out else {}
        made = getattr(ufunc, method)(*map(plain, inputs), **options)
        return out[0] if out else self._own(made)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return self._own(function(*plain(args), **plain(options)))

    def _own(self, x: Any) -> Any:
        return on_card(self.cards, x) if isinstance(x, np.ndarray) else x

    def __getitem__(self, key: Any) -> Any:
        if not all(isinstance(k, BASIC) for k in (key if isinstance(key, tuple) else (key,))):
            return self._own(self.plain()[plain(key)])
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.plain()[plain(key)] = plain(value)

    def copy(self, order: str = "C") -> OnCard:
        """Onto the current card, where nothing waits for what another one still computes."""
        assert self.card == self.cards.current or self.cards.reach, "copied between cards that do not reach each other"
        self.cards.wait(self.card)
        return on_card(self.cards, self.view(np.ndarray))

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self) -> Device:
        return Device(self.cards, self.card)

    def get(self, stream: Stream, out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray | None:
        assert stream.card == self.card
        self.cards.wait(self.card)
        if out is None:
            return np.array(self.view(np.ndarray))
        out[...] = self.view(np.ndarray)

    def set(self, values: np.ndarray, stream: Stream) -> None:
        assert stream.card == self.card and (values.shape, values.dtype) == (self.shape, self.dtype)
        self.cards.wait(self.card)
        self.view(np.ndarray)[...] = values


def plain(x: Any) -> Any:
    """Without cards, which are checked: within tuples, lists and dicts, too."""
    if isinstance(x, OnCard):
        return x.plain()
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    return type(x)(map(plain, x)) if type(x) in (tuple, list) else x


def on_card(cards: Cards, x: np.ndarray) -> OnCard:
    """On the current one, in simulated memory."""
    made = array(np.asarray(x)).view(OnCard)
    made.cards, made.card = cards, cards.current
    cards.card_of[made.ctypes.data] = cards.current
    return made


class Memory(_Memory):
    def __init__(self, cards: Cards):
        self.cards = cards

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)
        if isinstance(function, type) or not callable(function):
            return function

        def call(*args: Any, **options: Any) -> Any:
            made = function(*plain(args), **plain(options))
            return on_card(self.cards, made) if isinstance(made, np.ndarray) else made

        return call

    def empty(self, shape: Any, dtype: Any = float) -> OnCard:
        return on_card(self.cards, np.zeros(shape, dtype))

    zeros = empty

    def empty_like(self, x: OnCard) -> OnCard:
        return self.empty(x.shape, x.dtype)

    def asarray(self, x: Any, dtype: Any = None) -> OnCard:
        """In the order that x has, as CuPy's."""
        if isinstance(x, OnCard) and dtype in (None, x.dtype):
            return x
        x = np.asarray(plain(x), dtype)
        return on_card(self.cards, x.T).T if x.flags.fnc else on_card(self.cards, x)


class Card(Simt):
    """The current one of several."""

    name = "cuda"

    def __init__(self, cards: Cards):
        super().__init__()
        self.cards, self.number, self.xp = cards, cards.current, Memory(cards)
        self.products = Products(self.xp, self.card)

    def run(self, launch: Launch) -> None:
        self.cards.check(self.number)
        is_collective = launch.source.startswith("parallel/")
        for a in launch.args:
            a = a.array if isinstance(a, TensorMap) else a
            if isinstance(a, np.ndarray):
                assert is_collective or a.card == self.number, f"{launch.name} has an array of card {a.card}"
        own = replace(launch, args=tuple(map(_plain_argument, launch.args)))

        def phase(n: int) -> None:
            defines = (*own.defines[:-1], f"PHASES={n}") if is_collective else own.defines
            Simt.run(self, replace(own, defines=defines))

        stream = self.cards.streams_of()[-1]
        self.cards.check(stream.card)
        stream.enqueue(self.number, Work(phase, (own.source, own.grid) if is_collective else None))

    def numpy(self, x: OnCard) -> np.ndarray:
        return np.array(plain(x))

    on_host = numpy

    def array(self, x: np.ndarray) -> OnCard:
        return on_card(self.cards, np.asarray(x).astype(self.dtype))

    def sum(self, x: OnCard, y: OnCard) -> OnCard:
        return on_card(self.cards, Simt.sum(self, plain(x), plain(y)))

    def product(self, x: OnCard, weight: OnCard, float32: bool) -> OnCard:
        return on_card(self.cards, Simt.product(self, plain(x), plain(weight), float32))

    def add_product(self, y: OnCard, x: OnCard, weight: OnCard, *beta: np.ndarray) -> None:
        Simt.add_product(self, *map(plain, (y, x, weight)), *beta)

    @contextmanager
    def loading(self, *args: Any) -> Iterator[Any]:
        with super().loading(*args) as put:
            yield lambda tensors: on_card(self.cards, put(tensors))


def _plain_argument(a: Any) -> Any:
    """Of a launch, which runs later."""
    if isinstance(a, TensorMap):
        return replace(a, array=a.array.view(np.ndarray))
    return a.view(np.ndarray) if isinstance(a, OnCard) else a


class SplitCards(SplitCuda):
    """`SplitCuda` as it is, but for CuPy's pools and its compiler."""

    prepare = Simt.prepare

    @contextmanager
    def recording(self, tokens: int, config: Config) -> Iterator[Any]:
        cards = self.first.cards
        cards.records = True
        try:
            with Simt.recording(self, tokens, config) as recorded:
                yield recorded
        finally:
            cards.records = False
