"""Standard streams as shells leave them: closed, in a narrow encoding, a pipe whose reader left, a full disk."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import Failure, UserError


class Stream:
    """Standard output, whose errors end the work; or, not `needed`, standard error, whose errors cost its messages."""

    def __init__(self, stream: TextIO, needed: bool):
        self.stream, self.needed = stream, needed
        if needed and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the encoding lacks becomes "?"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._guarded(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._guarded(self.stream.flush)

    def _guarded(self, call: Any, *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):  # what its buffer holds would fail again when Python exits
                sink = os.open(os.devnull, os.O_WRONLY)
                os.dup2(sink, self.stream.fileno())
                os.close(sink)
            if isinstance(error, BrokenPipeError) and self.needed:
                raise
            if self.needed:
                why = error.strerror or error
                raise Failure(f"standard output cannot be written: {why}; redirect it elsewhere") from None


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """sys.stdout and sys.stderr as `Stream`s; a closed stderr is silence. Files never become descriptor 0, 1 or 2."""
    before = sys.stdout, sys.stderr
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stderr = Stream(open(os.devnull, "w") if sys.stderr is None else sys.stderr, needed=False)
    if sys.stdout is not None:
        sys.stdout = Stream(sys.stdout, needed=True)
    try:
        yield
    finally:
        with contextlib.suppress(Failure, BrokenPipeError):  # said already, or there is an earlier error to say
            if sys.stdout is not None:
                sys.stdout.flush()
        sys.stdout, sys.stderr = before


def check_stdout() -> None:
    """Raises UserError where the shell closed standard output: there is no place for a result."""
    if sys.stdout is None:
        raise UserError("standard output is closed: there is no place for the result; redirect it, even to /dev/null")
