"""Weights to the card: threads read pieces of files into pinned memory, from where the copy engine takes them, and go on from one
tensor to the next without waiting for anything but a buffer.

A copy from ordinary memory goes through one buffer of the driver and one thread, at a fifth of what the bus carries; a thread reads
5 to 10 GB/s of what the system holds of a file, so that several are needed. Pinning memory takes as long as reading into it: few buffers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..weights import Tensor

Array = Any
PIECE = 4 << 20  # bytes of a buffer: a copy of 2 MB is over before Python has asked for the next (H200: 25 GB/s, 46 with 4 MB)
THREADS = 8  # with two buffers each
HOST_TO_DEVICE = 1  # cudaMemcpyKind


class Upload:
    """`Reference.loading` onto a card: call it with tensors; what it gave holds their numbers when its context has ended."""

    def __init__(self, dtype: np.dtype, advance: Callable[[int], object]):
        self.dtype, self.advance = dtype, advance
        self.stopped, self.count = False, 0
        self.pieces: SimpleQueue = SimpleQueue()  # (tensor, number of its first number, place on the card); None: no more
        self.taken: SimpleQueue = SimpleQueue()  # bytes of a piece, or what went wrong

    def __enter__(self) -> Upload:
        self.lanes = self._lanes(min(THREADS, os.cpu_count() or 1))  # kept to the end: copies run on when a thread has ended
        self.threads = [Thread(target=self._work, args=(lane,), daemon=True) for lane in self.lanes]
        for thread in self.threads:
            thread.start()
        return self

    def __call__(self, tensors: Sequence[Tensor]) -> Array:
        shapes = [tensor.array.shape for tensor in tensors]
        out, row = self._empty((sum(shape[0] for shape in shapes), *shapes[0][1:])), 0
        for tensor, shape in zip(tensors, shapes, strict=True):
            place, step = out[row : row + shape[0]].reshape(-1), PIECE // tensor.array.itemsize
            for at in range(0, place.size, step):
                self.pieces.put((tensor, at, place[at : at + step]))
                self.count += 1
            row += shape[0]
        return out

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            for _ in range(self.count if kind is None else 0):
                found = self.taken.get()
                if isinstance(found, BaseException):
                    raise found
                self.advance(found)
        finally:  # after an error or Ctrl-C, too, nobody writes on into memory that is free
            self.stopped = True
            for _ in self.threads:
                self.pieces.put(None)
            for thread in self.threads:
                thread.join()
            self._finish()

    def _work(self, lane: Lane) -> None:
        try:
            while (piece := self.pieces.get()) is not None and not self.stopped:
                tensor, at, place = piece
                size = tensor.array.itemsize
                buffer = lane.buffer(place.size * size)
                tensor.read(buffer, at * size)
                lane.copy(buffer, tensor.array.dtype, place)
                self.taken.put(len(buffer))
        except BaseException as error:
            self.taken.put(error)

    # --- what needs a card

    def _lanes(self, count: int) -> list[Lane]:
        import cupy

        cupy.cuda.get_current_stream().synchronize()  # whoever had the new arrays' memory before is through with it
        self.stream = cupy.cuda.Stream(non_blocking=True)
        return [Lane(self.stream) for _ in range(count)]

    def _empty(self, shape: tuple[int, ...]) -> Array:
        import cupy

        return cupy.empty(shape, self.dtype)

    def _finish(self) -> None:
        self.stream.synchronize()


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
