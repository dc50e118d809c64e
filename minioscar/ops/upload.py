"""Weights to the card: all arrays are parts of one allocation. Threads read pieces of it from files into pinned memory; the thread that
asks for tensors sends them on to the card, and waits for nothing but the next piece.

A copy from ordinary memory goes through one buffer of the driver and one thread, at a fifth of what the bus carries; a thread reads
4 to 7 GB/s of what the system holds of a file, so that several are needed. Pinning memory takes as long as reading into it: few and
small buffers. Python lets one thread in at a time, and a call that lets others in takes some 20 microseconds to get back where they
want to be let in: a reader makes one such call a piece, and only one thread talks to the driver.
"""

from __future__ import annotations

import math
import os
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ..weights import Tensor

Array = Any
ALIGN = 512  # bytes that every array begins at a multiple of, as CuPy's own do
PIECE = 4 << 20  # bytes of a buffer: smaller ones are over before Python has asked for the next, larger ones leave the processor's cache
THREADS = 8  # more want to be let in more often: 12 take 36 ms for a Qwen3-0.6B, 8 take 32 (H200)
UNDER_WAY = 2  # copies to the card, while there is something else to send
SWITCH = 0.0001  # seconds after which Python lets another thread in: at 0.005 the first reads waited until all tensors had been asked for
HOST_TO_DEVICE = 1  # cudaMemcpyKind


class Part(NamedTuple):
    """Of a piece: `count` numbers of a tensor, from its number `at` on, which go to number `place` of the slab."""

    tensor: Tensor
    at: int
    count: int
    place: int


class Upload:
    """`Reference.loading` onto a card: call it with tensors; what it gave holds their numbers when its context has ended."""

    def __init__(self, dtype: np.dtype, advance: Callable[[int], object], tensors: Sequence[Tensor]):
        self.dtype, self.advance = dtype, advance
        self.used = self.end = 0  # numbers of the slab: with what lies behind the last array, and without
        self.tensors: list[Tensor] = []
        self.places: list[int] = []  # of their first numbers in the slab
        self.width = max((tensor.dtype.itemsize for tensor in tensors), default=dtype.itemsize)  # bytes of a number in a buffer
        self.numbers = PIECE // self.width  # of the slab in a piece
        self.given = 0  # pieces, to the threads
        self.slab = self._empty(sum(self._padded(tensor.size) for tensor in tensors))  # enough, however they are joined

    def __enter__(self) -> Upload:
        self.stopped, self.copied = False, 0
        self.todo: SimpleQueue = SimpleQueue()  # numbers of pieces; None: no more
        self.filled: SimpleQueue = SimpleQueue()  # (Buffer, first number in it, parts), or what went wrong
        self.free: SimpleQueue = SimpleQueue()  # buffers; None: no more
        self.under_way: deque[Buffer] = deque()
        few = -(-self.slab.size // (8 * self.numbers))  # a buffer is worth its pinning from four pieces on
        count = min(THREADS, os.cpu_count() or 1, few)
        self.threads = [Thread(target=self._read, args=(i + 1,), daemon=True) for i in range(count)]
        self.interval = sys.getswitchinterval()
        self._start(0)
        sys.setswitchinterval(SWITCH)
        return self

    def __call__(self, tensors: Sequence[Tensor]) -> Array:
        first, rows = self.used, sum(tensor.shape[0] for tensor in tensors)
        for tensor in tensors:
            self._add(tensor)
        self.end, self.used = self.used, self._padded(self.used)
        if self.used > self.slab.size:
            raise ValueError("more is asked for than the tensors that `loading` was told of")
        self._give(self.used // self.numbers)  # nothing is added to a full piece, so it can be read already
        for _ in range(self.filled.qsize()):  # not more: the threads want more to do
            self._send()
        return self._part(first, (rows, *tensors[0].shape[1:]))

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._give(-(-self.end // self.numbers))
                while self.copied < self.given:
                    self._send()
        finally:  # after an error or Ctrl-C, too, nobody writes on into memory that is free
            self.stopped = True
            for _ in self.threads:
                self.todo.put(None), self.free.put(None)
            for thread in self.threads:  # in the order in which they start each other
                if thread.ident is not None:
                    thread.join()
            sys.setswitchinterval(self.interval)
            self._finish()

    def _add(self, tensor: Tensor) -> None:
        """What continues the last one, in its file and in the slab, is read with it."""
        last = self.tensors[-1] if self.tensors else None
        if last and self.places[-1] + last.size == self.used and last.continued_by(tensor):
            self.tensors[-1] = replace(last, shape=(last.size + tensor.size,), nbytes=last.nbytes + tensor.nbytes)
        else:
            self.tensors.append(tensor)
            self.places.append(self.used)
        self.used += tensor.size

    def _padded(self, count: int) -> int:
        """Numbers up to where the next array may begin."""
        return count + -count % (ALIGN // self.dtype.itemsize)

    def _give(self, upto: int) -> None:
        for piece in range(self.given, upto):
            self.todo.put(piece)
        self.given = max(self.given, upto)

    def _parts(self, piece: int) -> list[Part]:
        begin, end = piece * self.numbers, (piece + 1) * self.numbers
        found, i = [], bisect_right(self.places, begin) - 1
        while i < len(self.places) and (first := self.places[i]) < end:
            at, upto = max(begin - first, 0), min(end - first, self.tensors[i].size)
            if at < upto:  # not only what lies between two arrays
                found.append(Part(self.tensors[i], at, upto - at, first + at))
            i += 1
        return found

    def _start(self, thread: int) -> None:
        if thread < len(self.threads) and not self.stopped:
            self.threads[thread].start()

    def _read(self, next_thread: int) -> None:
        """A thread: the first pieces into buffers of its own, the others into what is free by then. It starts the next one, since starting
        them all takes 2 ms."""
        own = 2
        try:
            self._start(next_thread)
            while (piece := self.todo.get()) is not None:
                buffer, own = (self._buffer() if own else self.free.get()), max(own - 1, 0)
                if self.stopped:
                    return
                begin, parts = piece * self.numbers, self._parts(piece)
                for tensor, at, numbers, place in parts:
                    size, start = tensor.dtype.itemsize, (place - begin) * self.width
                    tensor.read(buffer.memory[start : start + numbers * size], at * size)
                self.filled.put((buffer, begin, parts))
        except BaseException as error:
            self.filled.put(error)

    def _send(self) -> None:
        """The next filled buffer, in which number n of the slab stands at byte (n - begin) * width, to its place; waits for one."""
        while self.under_way and (len(self.under_way) > UNDER_WAY or self.filled.empty()):  # who reads may be waiting for a buffer
            oldest = self.under_way.popleft()
            self._wait(oldest)
            self.free.put(oldest)
        found = self.filled.get()
        if isinstance(found, BaseException):
            raise found
        buffer, begin, parts = found
        if self.width == self.dtype.itemsize and all(part.tensor.dtype == self.dtype for part in parts):
            self._copy(buffer, 0, begin, (parts[-1].place + parts[-1].count - begin) * self.width, self.dtype)  # with what lies between
        else:
            for tensor, _, count, place in parts:
                send = self._copy if tensor.dtype == self.dtype else self._convert
                send(buffer, (place - begin) * self.width, place, count * tensor.dtype.itemsize, tensor.dtype)
        self._sent(buffer)
        self.under_way.append(buffer)
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

        memory = pinned((PIECE,), np.uint8)
        return Buffer(memory, memory.ctypes.data, cupy.cuda.Event(disable_timing=True))

    def _copy(self, buffer: Buffer, start: int, place: int, size: int, _: np.dtype) -> None:
        import cupy

        there = self.slab.data.ptr + place * self.dtype.itemsize
        cupy.cuda.runtime.memcpyAsync(there, buffer.pointer + start, size, HOST_TO_DEVICE, self.stream.ptr)

    def _convert(self, buffer: Buffer, start: int, place: int, size: int, dtype: np.dtype) -> None:
        """On the card, which rounds as NumPy does."""
        import cupy

        with self.stream:
            there = cupy.empty(size // dtype.itemsize, dtype)
            there.set(buffer.memory[start : start + size].view(dtype), stream=self.stream)
            self._part(place, there.shape)[...] = there.astype(np.float32, copy=False).astype(self.dtype)

    def _sent(self, buffer: Buffer) -> None:
        buffer.copied.record(self.stream)

    def _wait(self, buffer: Buffer) -> None:
        buffer.copied.synchronize()

    def _finish(self) -> None:
        self.stream.synchronize()


@dataclass
class Buffer:
    """PIECE bytes of pinned memory."""

    memory: np.ndarray
    pointer: int
    copied: Any  # the event behind the copy of what is in it


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory of the host that the copy engine can reach. (cupyx.empty_pinned is the same, but importing cupyx takes 0.3 s.)"""
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
