"""Weights to the card: all arrays are parts of one allocation. Pieces of it are read from files into pinned memory, many at a time, while
others are on their way to the card; all of it is started and waited for by the one thread that asks for tensors.

A copy from ordinary memory goes through one buffer of the driver and one thread, at a fifth of what the bus carries; one thread reads
5 to 7 GB/s of what the system holds of a file, so that a dozen are needed, which are the C library's (aio.py). Pinning memory takes
longer than reading into it: few and small buffers, made when they are needed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .aio import Read

if TYPE_CHECKING:
    from ..weights import Tensor

Array = Any
ALIGN = 512  # bytes that every array begins at a multiple of, as CuPy's own do
PIECE = 4 << 20  # bytes of a buffer: smaller ones are over before Python has asked for the next, larger ones leave the processor's cache
BUFFERS = 20  # in 16 a Qwen3-0.6B takes 30 ms, in 20 28, in 24 28 (H200)
WORTH = 12  # pieces from which on a buffer is worth its pinning
HOST_TO_DEVICE = 1  # cudaMemcpyKind


class Part(NamedTuple):
    """Of a piece: `count` numbers from number `at` of a tensor on, or of those that continue it, which go to number `place` of the slab."""

    tensor: Tensor
    at: int
    count: int
    place: int


class Upload:
    """`Reference.loading` onto a card: call it with tensors; what it gave holds their numbers when its context has ended."""

    def __init__(self, dtype: np.dtype, advance: Callable[[int], object], tensors: Sequence[Tensor]):
        self.dtype, self.advance = dtype, advance
        self.used = self.end = 0  # numbers of the slab: with what lies behind the last array, and without
        self.tensors: list[Tensor] = []  # that do not continue the one before
        self.places: list[int] = []  # of their first numbers in the slab
        self.sizes: list[int] = []  # numbers, with those of what continues them
        self.last: Tensor | None = None
        self.width = max((tensor.dtype.itemsize for tensor in tensors), default=dtype.itemsize)  # bytes of a number in a buffer
        self.numbers = PIECE // self.width  # of the slab in a piece
        self.given = self.begun = self.copied = 0  # pieces that can be read, are being read, are on their way to the card
        self.slab = self._empty(sum(self._padded(tensor.size) for tensor in tensors))  # enough, however they are joined
        self.few = min(BUFFERS, -(-self.slab.size // (WORTH * self.numbers)))
        self.made = 0  # buffers, which are in one of these three:
        self.free: list[Buffer] = []
        self.reading: deque[Buffer] = deque()
        self.under_way: deque[Buffer] = deque()

    def __enter__(self) -> Upload:
        return self

    def __call__(self, tensors: Sequence[Tensor]) -> Array:
        first, rows = self.used, sum(tensor.shape[0] for tensor in tensors)
        for tensor in tensors:
            self._add(tensor)
        self.end, self.used = self.used, self._padded(self.used)
        if self.used > self.slab.size:
            raise ValueError("more is asked for than the tensors that `loading` was told of")
        self.given = self.used // self.numbers  # nothing is added to a full piece, so it can be read already
        self._begin()
        while self.reading and all(read.done() for read in self.reading[0].reads):
            self._send()
            self._begin()
        return self._part(first, (rows, *tensors[0].shape[1:]))

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.given = -(-self.end // self.numbers)
                while self.copied < self.given:
                    self._begin()
                    self._send()
        finally:  # after an error or Ctrl-C, too, nobody writes on into memory that is free
            for buffer in self.reading:
                for read in buffer.reads:
                    read.abandon()
            self._finish()

    def _add(self, tensor: Tensor) -> None:
        """What continues the last one, in its file and in the slab, is read with it."""
        if self.last is not None and self.places[-1] + self.sizes[-1] == self.used and self.last.continued_by(tensor):
            self.sizes[-1] += tensor.size
        else:
            self.tensors.append(tensor)
            self.places.append(self.used)
            self.sizes.append(tensor.size)
        self.last = tensor
        self.used += tensor.size

    def _padded(self, count: int) -> int:
        """Numbers up to where the next array may begin."""
        return count + -count % (ALIGN // self.dtype.itemsize)

    def _parts(self, piece: int) -> list[Part]:
        begin, end = piece * self.numbers, (piece + 1) * self.numbers
        found, i = [], bisect_right(self.places, begin) - 1
        while i < len(self.places) and (first := self.places[i]) < end:
            at, upto = max(begin - first, 0), min(end - first, self.sizes[i])
            if at < upto:  # not only what lies between two arrays
                found.append(Part(self.tensors[i], at, upto - at, first + at))
            i += 1
        return found

    def _begin(self) -> None:
        """Reads as many pieces as there are buffers for."""
        while self.begun < self.given:
            if self.under_way and (self._through(self.under_way[0]) or not self.reading and not self.free and self.made == self.few):
                self._wait(self.under_way[0])
                self.free.append(self.under_way.popleft())
            elif self.free or self.made < self.few:
                self._read(self.free.pop() if self.free else self._buffer())
            else:
                return

    def _read(self, buffer: Buffer) -> None:
        """The next piece; number n of the slab is to stand at byte (n - begin) * width."""
        buffer.begin, buffer.parts = self.begun * self.numbers, self._parts(self.begun)
        self.begun += 1
        self.reading.append(buffer)
        buffer.reads = []
        for tensor, at, count, place in buffer.parts:
            size, address = tensor.dtype.itemsize, buffer.address + (place - buffer.begin) * self.width
            buffer.reads.append(Read(tensor.file, tensor.begin + at * size, address, count * size))
            buffer.reads[-1].start()  # when it is where Ctrl-C finds it

    def _send(self) -> None:
        """The piece that has been read for longest, to its place; waits for it."""
        buffer = self.reading[0]
        for read in buffer.reads:
            read.finish()
        self.under_way.append(self.reading.popleft())
        begin, parts = buffer.begin, buffer.parts
        if self.width == self.dtype.itemsize and all(part.tensor.dtype == self.dtype for part in parts):
            self._copy(buffer, 0, begin, (parts[-1].place + parts[-1].count - begin) * self.width, self.dtype)  # with what lies between
        else:
            for tensor, _, count, place in parts:
                send = self._copy if tensor.dtype == self.dtype else self._convert
                send(buffer, (place - begin) * self.width, place, count * tensor.dtype.itemsize, tensor.dtype)
        self._sent(buffer)
        self.copied += 1
        self.advance(sum(part.count * part.tensor.dtype.itemsize for part in parts))

    # --- what needs a card

    def _empty(self, count: int) -> Array:
        import cupy

        cupy.cuda.get_current_stream().synchronize()  # whoever had this memory before is through with it
        self.stream = cupy.cuda.Stream(non_blocking=True)
        return cupy.empty(count, self.dtype)

    def _part(self, first: int, shape: tuple[int, ...]) -> Array:
        """Of the slab, from this number on. Not a slice: of more than 2 GB it would go to kernels that index with 64 bits, whatever its
        own size."""
        import cupy

        return cupy.ndarray(shape, self.dtype, self.slab.data + first * self.dtype.itemsize)

    def _buffer(self) -> Buffer:
        import cupy

        self.made += 1
        memory = pinned((PIECE,), np.uint8)
        return Buffer(memory, memory.ctypes.data, cupy.cuda.Event(disable_timing=True))

    def _copy(self, buffer: Buffer, start: int, place: int, size: int, _: np.dtype) -> None:
        import cupy

        there = self.slab.data.ptr + place * self.dtype.itemsize
        cupy.cuda.runtime.memcpyAsync(there, buffer.address + start, size, HOST_TO_DEVICE, self.stream.ptr)

    def _convert(self, buffer: Buffer, start: int, place: int, size: int, dtype: np.dtype) -> None:
        """On the card, which rounds as NumPy does."""
        import cupy

        with self.stream:
            there = cupy.empty(size // dtype.itemsize, dtype)
            there.set(buffer.memory[start : start + size].view(dtype), stream=self.stream)
            self._part(place, there.shape)[...] = there.astype(np.float32, copy=False).astype(self.dtype)

    def _sent(self, buffer: Buffer) -> None:
        buffer.copied.record(self.stream)

    def _through(self, buffer: Buffer) -> bool:
        return buffer.copied.done

    def _wait(self, buffer: Buffer) -> None:
        buffer.copied.synchronize()

    def _finish(self) -> None:
        self.stream.synchronize()


@dataclass
class Buffer:
    """PIECE bytes of pinned memory."""

    memory: np.ndarray
    address: int
    copied: Any  # the event behind the copy of what is in it
    begin: int = 0  # the first number of the slab that is for it
    parts: list[Part] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory of the host that the copy engine can reach. (cupyx.empty_pinned is the same, but importing cupyx takes 0.3 s.)"""
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
