"""Weights to the card: chunks of the files are read into pinned buffers, many at a time, and copied from there.

All arrays are slices of one allocation, the slab; a chunk is CHUNK bytes of it, whichever tensors lie there. A copy
from pageable memory reaches a fifth of the bus's rate. One thread reads 5 to 7 GB/s from the page cache, so a dozen
read, which are the C library's (aio.py): threads of Python that called `os.preadv` took 35 to 39 ms for a Qwen3-0.6B,
these take 28 (H200), since each read ended with a wait for the GIL.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from .aio import Read

if TYPE_CHECKING:
    from .checkpoint import Tensor

Array = Any
ALIGN = 512  # bytes; every array begins at a multiple of it, as CuPy's own do
CHUNK = 4 << 20  # bytes of a buffer: smaller reads end before Python queues the next, larger ones leave the CPU's cache
BUFFERS = 20  # at most: in 16 a Qwen3-0.6B takes 30 ms, in 20 28, in 24 28 (H200)
CHUNKS_PER_BUFFER = 12  # pinning a buffer takes 2 ms, longer than reading it: small models get fewer
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
    segments: list[tuple[Segment, np.ndarray]] = field(default_factory=list)  # and the bytes of `memory` that they fill
    reads: list[Read] = field(default_factory=list)


@dataclass
class Buffers:
    """What one upload after the other reads into: as many as all bytes so far are worth pinning for."""

    buffers: list[Buffer] = field(default_factory=list)
    nbytes: int = 0  # of all uploads


class Upload:
    """`Reference.loading` onto a card. Call it with tensors: what it returns is filled when the context has ended."""

    def __init__(
        self, dtype: np.dtype, advance: Callable[[int], object], tensors: Sequence[Tensor],
        shared: Buffers | None = None,
    ):
        """shared: with uploads before and after this one, none at the same time."""
        self.dtype, self.advance = dtype, advance
        # Bytes of a number in a buffer, numbers of a chunk; the slab has room for the tensors however they are joined.
        self.width = max((tensor.dtype.itemsize for tensor in tensors), default=dtype.itemsize)
        self.numbers = CHUNK // self.width
        self.slab = self._empty(sum(self._aligned(tensor.size) for tensor in tensors))
        self.used = self.end = 0  # numbers of the slab, with the gap behind the last array and without
        self.segments = list[Segment]()  # by offset; what is adjacent in the slab and in the file is one
        self.chunks = 0  # that are queued, or were
        shared = shared or Buffers()
        shared.nbytes += self.slab.size * self.width
        self.num_buffers = min(BUFFERS, -(-shared.nbytes // (CHUNKS_PER_BUFFER * self.numbers * self.width)))
        self.buffers, self.reading, self.copying = shared.buffers, deque[Buffer](), deque(shared.buffers)

    def __enter__(self) -> Upload:
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
        while True:  # full chunks, while more is asked for, as far as nothing has to be waited for
            while self.reading and all(read.done() for read in self.reading[0].reads):
                self._copy_next()
            if (self.chunks + 1) * self.numbers > self.used or (buffer := self._idle_buffer()) is None:
                break
            self._read_next(buffer)
        return self._slice(first, (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]))

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                while self.chunks * self.numbers < self.end:
                    self._read_next(self._free_buffer())
                while self.reading:
                    self._copy_next()
        finally:  # after an error or Ctrl-C, too, nobody writes into memory that is free
            for buffer in self.reading:
                for read in buffer.reads:
                    read.abandon()
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

    def _idle_buffer(self) -> Buffer | None:
        """One whose copy is through, or a new one; None: all are in use."""
        if self.copying and self.copying[0].copied.done:
            return self.copying.popleft()
        if len(self.buffers) < self.num_buffers:
            self.buffers.append(self._buffer())
            return self.buffers[-1]
        return None

    def _free_buffer(self) -> Buffer:
        """The same, waited for."""
        while (buffer := self._idle_buffer()) is None:
            if self.reading:
                self._copy_next()
            else:
                self.copying[0].copied.synchronize()
        return buffer

    def _read_next(self, buffer: Buffer) -> None:
        """Begins to read a chunk: number n of the slab will stand at byte (n - begin) * width of the buffer."""
        buffer.begin, buffer.segments, buffer.reads = self.chunks * self.numbers, [], []
        segments = self._segments_of(self.chunks)
        self.chunks += 1
        self.reading.append(buffer)  # where Ctrl-C finds its reads
        for segment in segments:
            at = (segment.offset - buffer.begin) * self.width
            memory = buffer.memory[at : at + segment.nbytes]
            buffer.segments.append((segment, memory))
            buffer.reads.append(Read(segment.file, segment.begin, memory.ctypes.data, segment.nbytes))
            buffer.reads[-1].start()

    def _copy_next(self) -> None:
        """Waits for the chunk that has been read for longest, and copies it to the slab."""
        buffer = self.reading[0]
        for read in buffer.reads:
            read.finish()
        self.reading.popleft()
        if all(segment.dtype == self.dtype for segment, _ in buffer.segments) and self.width == self.dtype.itemsize:
            last = buffer.segments[-1][0]
            size = (last.offset + last.count - buffer.begin) * self.width
            self._copy(buffer.memory[:size].view(self.dtype), buffer.begin)  # with the gaps between arrays
        else:
            for segment, memory in buffer.segments:
                self._copy(memory.view(segment.dtype), segment.offset)
        buffer.copied.record(self.stream)
        self.copying.append(buffer)
        self.advance(sum(segment.nbytes for segment, _ in buffer.segments))

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


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Host memory that the copy engine can reach. (cupyx.empty_pinned is the same, but its import takes 0.3 s.)"""
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
