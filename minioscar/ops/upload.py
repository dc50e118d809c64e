"""Weights to the card: all arrays are parts of one allocation, and threads read pieces of it from files into pinned memory, from where
the copy engine takes them, waiting for nothing but a buffer.

A copy from ordinary memory goes through one buffer of the driver and one thread, at a fifth of what the bus carries; a thread reads
5 to 10 GB/s of what the system holds of a file, so that several are needed. Pinning memory takes as long as reading into it: few buffers.
An allocation takes 0.15 ms and Python 0.08 for a piece, whatever their sizes (H200): one allocation, and pieces that are full.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..weights import Tensor

Array = Any
ALIGN = 512  # bytes that every array begins at a multiple of, as CuPy's own do
PIECE = 8 << 20  # bytes of a buffer: a copy of 2 MB is over before Python has asked for the next
THREADS = 12  # with two buffers each (Qwen3-8B, H200: 45 GB/s; 8 threads 43, 8 with 4 MB 37, 16 threads 42)
SWITCH = 0.0005  # seconds after which Python lets another thread in: at 0.005 the first reads waited until all tensors had been asked for
HOST_TO_DEVICE = 1  # cudaMemcpyKind


class Upload:
    """`Reference.loading` onto a card: call it with tensors; what it gave holds their numbers when its context has ended."""

    def __init__(self, dtype: np.dtype, advance: Callable[[int], object], tensors: Sequence[Tensor]):
        self.dtype, self.advance, self.used = dtype, advance, 0
        self.pieces: list[Piece] = []
        self.given = 0  # of them, to the threads
        self.threads: list[Thread] = []
        self.slab = self._empty(sum(self._padded(tensor.size) for tensor in tensors))  # enough, however they are joined

    def __enter__(self) -> Upload:
        return self

    def __call__(self, tensors: Sequence[Tensor]) -> Array:
        first, rows = self.used, sum(tensor.shape[0] for tensor in tensors)
        for tensor in tensors:
            add(self.pieces, tensor, self.used)
            self.used += tensor.size
        self.used = self._padded(self.used)
        if self.used > self.slab.size:
            raise ValueError("more is asked for than the tensors that `loading` was told of")
        self._give(len(self.pieces) - 1)  # the last one may get more
        return self._part(first, (rows, *tensors[0].shape[1:]))

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._give(len(self.pieces))
                for _ in self.pieces:
                    found = self.done.get()
                    if isinstance(found, BaseException):
                        raise found
                    self.advance(found)
        finally:  # after an error or Ctrl-C, too, nobody writes on into memory that is free
            if self.threads:
                self._stop()

    def _padded(self, count: int) -> int:
        """Numbers up to where the next array may begin."""
        return count + -count % (ALIGN // self.dtype.itemsize)

    def _give(self, upto: int) -> None:
        """The first so many pieces to the threads, which read while more tensors are asked for."""
        if upto > self.given and not self.threads:
            self._start()
        for piece in self.pieces[self.given : upto]:
            self.todo.put((piece, self._part(piece.first, (piece.size // piece.dtype.itemsize,))))
            self.given += 1

    def _start(self) -> None:
        count = min(THREADS, os.cpu_count() or 1, -(-self.slab.nbytes // (8 * PIECE)))  # a buffer is worth its pinning from four pieces on
        self.lanes = self._lanes(count)  # kept to the end: copies run on when a thread has ended
        self.stopped = False
        self.todo: SimpleQueue = SimpleQueue()  # pieces and their places; None: no more
        self.done: SimpleQueue = SimpleQueue()  # bytes of a piece, or what went wrong
        self.interval = sys.getswitchinterval()
        self.threads = [Thread(target=self._work, args=(lane,), daemon=True) for lane in self.lanes]
        sys.setswitchinterval(SWITCH)
        for thread in self.threads:
            thread.start()

    def _stop(self) -> None:
        self.stopped = True
        for _ in self.threads:
            self.todo.put(None)
        for thread in self.threads:
            thread.join()
        sys.setswitchinterval(self.interval)
        self._finish()

    def _work(self, lane: Lane) -> None:
        try:
            while (given := self.todo.get()) is not None and not self.stopped:
                piece, place = given
                buffer = lane.buffer(piece.size)
                for tensor, at, begin, end in piece.parts:
                    tensor.read(buffer[begin:end], at)
                lane.copy(buffer, piece.dtype, place)
                self.done.put(sum(end - begin for _, _, begin, end in piece.parts))
        except BaseException as error:
            self.done.put(error)

    # --- what needs a card

    def _lanes(self, count: int) -> list[Lane]:
        import cupy

        cupy.cuda.get_current_stream().synchronize()  # whoever had the slab's memory before is through with it
        self.stream = cupy.cuda.Stream(non_blocking=True)
        return [Lane(self.stream) for _ in range(count)]

    def _empty(self, count: int) -> Array:
        import cupy

        return cupy.empty(count, self.dtype)

    def _part(self, first: int, shape: tuple[int, ...]) -> Array:
        """Of the slab, from this number on. Not a slice: of more than 2 GB it would go to kernels that index with 64 bits, whatever its
        own size."""
        import cupy

        return cupy.ndarray(shape, self.dtype, self.slab.data + first * self.dtype.itemsize)

    def _finish(self) -> None:
        self.stream.synchronize()


@dataclass
class Piece:
    """A stretch of the slab that one copy fills, with numbers of one dtype; what lies between its parts is padding."""

    dtype: np.dtype  # in the files
    first: int  # number of the slab
    parts: list[tuple[Tensor, int, int, int]] = field(default_factory=list)  # from which of its bytes on; begin and end in the buffer

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self.parts[-1][3]


def add(pieces: list[Piece], tensor: Tensor, place: int) -> None:
    """The parts of a tensor whose numbers begin at `place`. Pieces are as full as can be: small tensors share one, large take several."""
    dtype, at = tensor.dtype, 0
    while at < tensor.nbytes:
        number = place + at // dtype.itemsize
        if not pieces or pieces[-1].dtype != dtype or number >= pieces[-1].first + PIECE // dtype.itemsize:
            pieces.append(Piece(dtype, number))
        begin = (number - pieces[-1].first) * dtype.itemsize
        end = min(begin + tensor.nbytes - at, PIECE)
        pieces[-1].parts.append((tensor, at, begin, end))
        at += end - begin


class Lane:
    """A thread's buffers: one is read into while the other is copied from."""

    def __init__(self, stream: Any):
        self.stream, self.buffers, self.turn = stream, [], 0

    def buffer(self, size: int) -> np.ndarray:
        """Of so many bytes, free to be written."""
        import cupy

        if len(self.buffers) < 2:  # pinned by the thread, while others read already
            self.buffers.append((pinned((PIECE,), np.uint8), cupy.cuda.Event(disable_timing=True)))
        self.turn = (self.turn + 1) % len(self.buffers)
        memory, copied = self.buffers[self.turn]
        copied.synchronize()
        return memory[:size]

    def copy(self, buffer: np.ndarray, dtype: np.dtype, place: Array) -> None:
        """What `buffer` has handed out, numbers of this dtype, to their place; converted on the card, which rounds as NumPy does."""
        import cupy

        if dtype == place.dtype:
            cupy.cuda.runtime.memcpyAsync(place.data.ptr, buffer.ctypes.data, len(buffer), HOST_TO_DEVICE, self.stream.ptr)
        else:
            with self.stream:
                there = cupy.empty(place.shape, dtype)
                there.set(buffer.view(dtype), stream=self.stream)
                place[...] = there.astype(np.float32, copy=False).astype(place.dtype)
        self.buffers[self.turn][1].record(self.stream)


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory of the host that the copy engine can reach. (cupyx.empty_pinned is the same, but importing cupyx takes 0.3 s.)"""
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
