"""Weights to the card: read by several threads into pinned memory, from where the copy engine takes them.

A copy from ordinary memory goes through one buffer of the driver and one thread, at a fifth of what the bus carries.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np

from ..errors import UserError

Array = Any
PIECE = 2 << 20
BUFFERS = 32
HOST_TO_DEVICE = 1  # cudaMemcpyKind


def upload(x: np.ndarray) -> Array:
    """A copy of x on the card. x, contiguous: in memory, or in a file that is mapped into it, which is then read instead."""
    import cupy

    if x.nbytes < PIECE:
        return cupy.asarray(x)
    out, fill = cupy.empty(x.shape, x.dtype), _reader(x)
    stream, buffers, threads = _lane()
    cupy.cuda.get_current_stream().synchronize()  # whoever had out's memory before is through with it

    def piece(at: int) -> None:
        buffer, ready = buffers.get()
        ready.synchronize()
        count = min(PIECE, x.nbytes - at)
        fill(buffer[:count], at)
        cupy.cuda.runtime.memcpyAsync(out.data.ptr + at, buffer.ctypes.data, count, HOST_TO_DEVICE, stream.ptr)
        ready.record(stream)
        buffers.put((buffer, ready))

    list(threads.map(piece, range(0, x.nbytes, PIECE)))
    stream.synchronize()
    return out


def _reader(x: np.ndarray) -> Callable[[np.ndarray, int], None]:
    """What fills a buffer with the bytes of x from a place on. Reading a file takes the kernel less than a fault for each of its pages."""
    if getattr(x, "_mmap", None) is None:  # an np.memmap of another dtype is a copy in memory, and still one by its type
        source = x.reshape(-1).view(np.uint8)
        return lambda buffer, at: np.copyto(buffer, source[at : at + len(buffer)])
    begin = x.ctypes.data - np.frombuffer(x._mmap, np.uint8).ctypes.data
    file = open(x.filename, "rb", buffering=0)

    def read(buffer: np.ndarray, at: int) -> None:
        while len(buffer):
            count = os.preadv(file.fileno(), [buffer], begin + at)
            if not count:
                raise UserError(f"{x.filename} became shorter while it was read; fetch the model again")
            buffer, at = buffer[count:], at + count

    return read


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory of the host that the copy engine can reach. (cupyx.empty_pinned is the same, but importing cupyx takes 0.3 s.)"""
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


@cache
def _lane() -> tuple[Any, SimpleQueue, ThreadPoolExecutor]:
    import cupy

    buffers: SimpleQueue = SimpleQueue()
    for buffer in pinned((BUFFERS, PIECE), np.uint8):
        buffers.put((buffer, cupy.cuda.Event(disable_timing=True)))
    return cupy.cuda.Stream(non_blocking=True), buffers, ThreadPoolExecutor(min(BUFFERS, os.cpu_count() or 1))
