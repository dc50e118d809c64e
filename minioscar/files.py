"""Files that are there whole or not at all: written beside their place under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import Failure, UserError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """The path to write to; it becomes `path` when the block ends without an error, its bytes on disk first.

    After a crash or kill -9 a `.partial-...` file may be left, never half a `path`; the next write of `path` removes it. Raises
    UserError where `path` cannot be written at all, Failure where writing it failed.
    """
    target = check_writable(path)
    _sweep(target)
    partial = target.with_name(f".partial-{target.name}.{os.getpid()}")
    try:
        try:
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise Failure(f"{target}: cannot be written: {error.strerror or error}; free space or name another file") from error


def check_writable(path: str | Path) -> Path:
    """The path, if a file can be put there; to be asked before long work. Raises UserError."""
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{target} is a folder; name the file to write")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target}: the folder {target.parent} cannot be written to; name another")
    return target


def _sweep(target: Path) -> None:
    """Removes what earlier writers of `target` left behind, unless they are still at it."""
    name = re.compile(re.escape(f".partial-{target.name}.") + r"(\d+)")
    for path in target.parent.iterdir():
        if (match := name.fullmatch(path.name)) and not _alive(int(match[1])):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
