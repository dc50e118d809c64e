"""Weights to the card: threads read chunks of the files into pinned buffers, the loading thread copies them from there.

All arrays are slices of one allocation, the slab; a chunk is CHUNK bytes of it, whichever tensors lie there. A copy
from pageable memory reaches a fifth of the bus's rate. One thread reads 5 to 7 GB/s from the page cache, so a dozen
read, with one `os.preadv` a chunk, which holds no GIL. They call nothing else that blocks: whoever comes back from such
a call may wait 0.1 ms for the GIL.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from ..weights import Tensor

Array = Any
ALIGN = 512  # bytes; every array begins at a multiple of it, as CuPy's own do
CHUNK = 4 << 20  # bytes of a buffer: smaller reads end before Python queues the next, larger ones leave the CPU's cache
THREADS, BUFFERS, COPYING = 12, 20, 4  # at most; of the buffers, COPYING wait for the card, the others for a thread
CHUNKS_PER_BUFFER = 12  # pinning a buffer takes 2 ms, longer than reading it: small models get fewer
SWITCH_INTERVAL = 1e-4  # seconds after which a reader that waits for the GIL gets it; Python's own are 5e-3
HOST_TO_DEVICE = 1  # cudaMemcpyKind


class Segment(NamedTuple):
    """`count` numbers of a file from byte `begin` on, of adjacent tensors; for number `offset` of the slab."""

    file: BinaryIO
    dtype: np.dtype
    begin: int
    offset: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def rest(self, start: int) -> Segment:
        """From number `start` on."""
        return self._replace(
            begin=self.begin + start * self.dtype.itemsize, offset=self.offset + start, count=self.count - start
        )


@dataclass
class Buffer:
    memory: np.ndarray  # uint8 [CHUNK], pinned
    copied: Any  # the event behind its copy
    begin: int = 0  # its chunk's first number in the slab
    reads: list[tuple[Segment, np.ndarray]] = field(default_factory=list)  # and the bytes of `memory` that they fill


class Upload:
    """`Reference.loading` onto a card. Call it with tensors: what it returns is filled when the context has ended."""

    def __init__(self, dtype: np.dtype, advance: Callable[[int], object], tensors: Sequence[Tensor]):
        self.dtype, self.advance = dtype, advance
        # Bytes of a number in a buffer, numbers of a chunk; the slab has room for the tensors however they are joined.
        self.width = max((tensor.dtype.itemsize for tensor in tensors), default=dtype.itemsize)
        self.numbers = CHUNK // self.width
        self.slab = self._empty(sum(self._aligned(tensor.size) for tensor in tensors))
        self.used = self.end = 0  # numbers of the slab, with the gap behind the last array and without
        self.segments = list[Segment]()  # by offset; what is adjacent in the slab and in the file is one
        self.chunks = 0  # that are queued, or were
        self.num_buffers = min(BUFFERS, -(-self.slab.size // (CHUNKS_PER_BUFFER * self.numbers)))
        self.num_threads = min(THREADS, os.cpu_count() or 1, self.num_buffers)
        self.threads, self.buffers, self.copying = list[Thread](), list[Buffer](), deque[Buffer]()
        self.to_read, self.was_read = SimpleQueue[Buffer | None](), SimpleQueue[Buffer | Exception]()

    def __enter__(self) -> Upload:
        self.switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        return self

    def __call__(self, tensors: Sequence[Tensor]) -> Array:
        """Their rows one below the other. Raises ValueError where more is asked for than was announced."""
        first = self.used
        if self._aligned(first + sum(tensor.size for tensor in tensors)) > self.slab.size:
            raise ValueError("more is asked for than the tensors that `loading` was told of")
        for tensor in tensors:
            segment = Segment(tensor.file, tensor.dtype, tensor.begin, self.used, tensor.size)
            if self.segments and (last := self.segments[-1]).rest(last.count)[:4] == segment[:4]:
                segment = self.segments.pop()._replace(count=last.count + segment.count)
            self.segments.append(segment)
            self.used += tensor.size
        self.end, self.used = self.used, self._aligned(self.used)
        while len(self.buffers) < self.num_buffers and (self.chunks + 1) * self.numbers <= self.used:
            self._read_next(self._free_buffer())  # a full chunk, while more is asked for
        return self._slice(first, (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]))

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                while self.chunks * self.numbers < self.end:
                    self._read_next(self._free_buffer())
                while len(self.copying) < len(self.buffers):
                    self._copy_next()
        finally:  # after an error or Ctrl-C, too, nobody writes into memory that is free
            with contextlib.suppress(Empty):
                while True:
                    self.to_read.get_nowait()
            for _ in self.threads:
                self.to_read.put(None)
            for thread in self.threads:
                thread.join()
            sys.setswitchinterval(self.switch_interval)
            self.stream.synchronize()

    def _aligned(self, count: int) -> int:
        """Numbers up to where the next array may begin."""
        return count + -count % (ALIGN // self.dtype.itemsize)

    def _segments_of(self, chunk: int) -> list[Segment]:
        begin, end = chunk * self.numbers, (chunk + 1) * self.numbers
        found, first = [], bisect_right(self.segments, begin, key=lambda segment: segment.offset) - 1
        for segment in self.segments[max(first, 0) :]:
            segment = segment.rest(max(begin - segment.offset, 0))
            if segment.offset >= end:
                break
            if segment.count > 0:  # and not only the gap behind it
                found.append(segment._replace(count=min(segment.count, end - segment.offset)))
        return found

    def _free_buffer(self) -> Buffer:
        if len(self.buffers) < self.num_buffers:
            self.buffers.append(self._buffer())
            return self.buffers[-1]
        while len(self.copying) < min(COPYING, self.num_buffers):
            self._copy_next()
        self.copying[0].copied.synchronize()
        return self.copying.popleft()

    def _read_next(self, buffer: Buffer) -> None:
        """Queues a chunk: number n of the slab will stand at byte (n - begin) * width of the buffer."""
        buffer.begin, buffer.reads = self.chunks * self.numbers, []
        for segment in self._segments_of(self.chunks):
            at = (segment.offset - buffer.begin) * self.width
            buffer.reads.append((segment, buffer.memory[at : at + segment.nbytes]))
        self.chunks += 1
        self.to_read.put(buffer)
        if len(self.threads) < self.num_threads:
            self.threads.append(Thread(target=self._reader, name="upload"))
            self.threads[-1].start()

    def _reader(self) -> None:
        while (buffer := self.to_read.get()) is not None:
            try:
                for segment, memory in buffer.reads:
                    read_exactly(segment.file, segment.begin, memory)
                self.was_read.put(buffer)
            except Exception as error:  # raised by the loading thread
                self.was_read.put(error)

    def _copy_next(self) -> None:
        """Waits for a chunk that has been read, and copies it to the slab."""
        if isinstance(buffer := self.was_read.get(), Exception):
            raise buffer
        if all(segment.dtype == self.dtype for segment, _ in buffer.reads) and self.width == self.dtype.itemsize:
            last = buffer.reads[-1][0]
            size = (last.offset + last.count - buffer.begin) * self.width
            self._copy(buffer.memory[:size].view(self.dtype), buffer.begin)  # with the gaps between arrays
        else:
            for segment, memory in buffer.reads:
                self._copy(memory.view(segment.dtype), segment.offset)
        buffer.copied.record(self.stream)
        self.copying.append(buffer)
        self.advance(sum(segment.nbytes for segment, _ in buffer.reads))

    # --- what needs a card

    def _empty(self, count: int) -> Array:
        import cupy

        cupy.cuda.get_current_stream().synchronize()  # whoever had this memory before is through with it
        self.stream = cupy.cuda.Stream(non_blocking=True)
        return cupy.empty(count, self.dtype)

    def _slice(self, first: int, shape: tuple[int, ...]) -> Array:
        """Of the slab. No view of it: of an array over 2 GB that would go to kernels with 64-bit indices."""
        import cupy

        return cupy.ndarray(shape, self.dtype, self.slab.data + first * self.dtype.itemsize)

    def _buffer(self) -> Buffer:
        import cupy

        return Buffer(pinned((CHUNK,), np.uint8), cupy.cuda.Event(disable_timing=True))

    def _copy(self, numbers: np.ndarray, offset: int) -> None:
        """Another dtype is converted on the card, which rounds as NumPy does."""
        import cupy

        if numbers.dtype == self.dtype:
            target = self.slab.data.ptr + offset * self.dtype.itemsize
            cupy.cuda.runtime.memcpyAsync(target, numbers.ctypes.data, numbers.nbytes, HOST_TO_DEVICE, self.stream.ptr)
            return
        with self.stream:
            there = cupy.empty(numbers.size, numbers.dtype)
            there.set(numbers, stream=self.stream)
            self._slice(offset, there.shape)[...] = there.astype(np.float32, copy=False).astype(self.dtype)


def read_exactly(file: BinaryIO, begin: int, memory: np.ndarray) -> None:
    """Fills `memory` (uint8) from byte `begin` of the file on. Raises UserError where it is unreadable or ends."""
    while memory.size:
        try:
            count = os.preadv(file.fileno(), [memory], begin)
        except OSError as error:
            raise UserError(f"{file.name} cannot be read ({error.strerror}); fetch the model again") from None
        if not count:
            raise UserError(f"{file.name} became shorter while it was read; fetch the model again")
        begin, memory = begin + count, memory[count:]


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Host memory that the copy engine can reach. (cupyx.empty_pinned is the same, but its import takes 0.3 s.)"""
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
