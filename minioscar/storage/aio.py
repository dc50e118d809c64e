"""Asynchronous reads: POSIX.1's aio_read as glibc has it (aio(7)), in threads of its own.

A thread of Python that comes back from a read waits 0.1 to 0.3 ms for the GIL where a dozen of them want it: a third of
the time that reading 4 MB takes.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any, BinaryIO

from ..errors import UserError

THREADS = 12  # with 12 a Qwen3-0.6B takes 28 ms to load, with 20, as glibc would have it, 29 (H200)
MAX_OPEN = 128  # descriptors that reads duplicate, at a time: a process may have some 1,024 (ulimit -n)
SIGEV_NONE = 1  # signal.h: no notification
EINPROGRESS = 115


class Read:
    """`size` bytes of a file from its byte `begin` on, to an address. That memory and this object must last from
    `start` until `finish` or `abandon` returns. Raises UserError where the file cannot be read or ends before."""

    opened = 0  # descriptors of all reads

    def __init__(self, file: BinaryIO, begin: int, address: int, size: int):
        self.name, self.own = file.name, Read.opened < MAX_OPEN
        fd = os.dup(file.fileno()) if self.own else file.fileno()  # glibc serializes reads of one descriptor
        Read.opened += self.own
        self.block = _Block(fd=fd, address=address, size=size, notify=SIGEV_NONE, offset=begin)

    def start(self) -> None:
        if _library().aio_read(self.block):
            code = ctypes.get_errno()
            self._close()
            raise UserError(f"{self.name} {_unreadable(code)}; fetch the model again")

    def done(self) -> bool:
        """Whether `finish` need not wait, unless the system gave less than was asked for."""
        return _library().aio_error(self.block) != EINPROGRESS

    def finish(self) -> None:
        """Waits for all bytes."""
        block = self.block
        while block.size:
            code, count = self._outcome()
            if code or count <= 0:
                self._close()
                reason = _unreadable(code) if code else "became shorter while it was read"
                raise UserError(f"{self.name} {reason}; fetch the model again")
            block.address, block.offset, block.size = block.address + count, block.offset + count, block.size - count
            if block.size:
                self.start()
        self._close()

    def abandon(self) -> None:
        """Nothing is written any more when it returns."""
        if self.block.fd >= 0:
            _library().aio_cancel(self.block.fd, self.block)
            self._outcome()
            self._close()

    def _outcome(self) -> tuple[int, int]:
        """errno, and the bytes that were read."""
        block = self.block
        while (code := _library().aio_error(block)) == EINPROGRESS:
            _library().aio_suspend(ctypes.pointer(ctypes.pointer(block)), 1, None)  # ends early for Ctrl-C, too
        return code, _library().aio_return(block)

    def _close(self) -> None:
        if self.own:
            os.close(self.block.fd)
            Read.opened -= 1
        self.block.fd = -1


def _unreadable(code: int) -> str:
    return f"cannot be read ({os.strerror(code)})"


class _Block(ctypes.Structure):  # struct aiocb of glibc's aio.h, for 64-bit longs; fields named _ belong to the library
    _fields_ = [
        ("fd", ctypes.c_int), ("opcode", ctypes.c_int), ("priority", ctypes.c_int), ("address", ctypes.c_void_p),
        ("size", ctypes.c_size_t), ("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int),
        ("_event", ctypes.c_char * 48), ("_next", ctypes.c_void_p), ("_place", ctypes.c_int),
        ("_policy", ctypes.c_int), ("_error", ctypes.c_int), ("_result", ctypes.c_ssize_t),
        ("offset", ctypes.c_int64), ("_rest", ctypes.c_char * 32),
    ]  # fmt: skip


@cache
def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "aio_read"):  # glibc before 2.34
        library = ctypes.CDLL("librt.so.1", use_errno=True)
    block = ctypes.POINTER(_Block)
    library.aio_read.argtypes = library.aio_error.argtypes = library.aio_return.argtypes = [block]
    library.aio_cancel.argtypes = [ctypes.c_int, block]
    library.aio_suspend.argtypes = [ctypes.POINTER(block), ctypes.c_int, ctypes.c_void_p]
    library.aio_return.restype = ctypes.c_ssize_t
    threads, seconds_idle = min(THREADS, os.cpu_count() or 1), 1
    library.aio_init((ctypes.c_int * 8)(threads, 0, 0, 0, 0, 0, seconds_idle))  # struct aioinit
    return library
