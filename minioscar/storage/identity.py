"""Which weights a model has: its files as they were when they were opened, and their SHA-256.

Hashing takes longer than loading (1.8 GB/s a core), so it is done when a prompt cache is first saved or loaded. What
was read is known by then only if the files are still the same: the same inodes, with the times and sizes that they had.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError

Stamp = tuple[int, ...]
TICK = 10_000_000  # ns between two times that a file system tells apart: the slowest clock of Linux has 100 Hz


def stamp(file: BinaryIO) -> Stamp:
    """Device, inode, size and times of an open file: of its last writing, and of its last change: that cannot be set.

    A change within the same tick would leave all of it as it was, so a file that was changed just now is waited for.
    """
    found = os.fstat(file.fileno())
    age = time.time_ns() - found.st_ctime_ns
    if 0 <= age < TICK:
        time.sleep((TICK - age) / 1e9)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class WeightFiles:
    """The weight files of one folder, by the stamps of the handles from which they are read."""

    def __init__(self, stamps: Mapping[Path, Stamp]):
        self.stamps = {path.absolute(): of for path, of in stamps.items()}  # a program may go to another folder

    @classmethod
    def of(cls, paths: list[Path]) -> WeightFiles:
        """As they are now. Raises UserError for one that cannot be read."""
        stamps = {}
        for path in paths:
            try:
                with open(path, "rb") as file:
                    stamps[path] = stamp(file)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror or error}); fetch the model again") from None
        return cls(stamps)

    @cached_property
    def sha256(self) -> str:
        """Over the bytes of all files in the order of their names, hex: equal for equal weights in equal files.

        Reads them once. Raises UserError where one is no longer what was read, before or after it is hashed.
        """
        with ThreadPoolExecutor() as threads:  # hashing lets other threads run
            return hashlib.sha256(b"".join(threads.map(self._digest, sorted(self.stamps)))).hexdigest()

    def check(self) -> None:
        """Raises UserError where the path of a file leads to another one by now, or to none."""
        for path in self.stamps:
            with self._opened(path):
                pass

    def _digest(self, path: Path) -> bytes:
        digest = hashlib.sha256()
        with self._opened(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
            self._same(path, file)
        return digest.digest()

    def _opened(self, path: Path) -> BinaryIO:
        try:
            file = open(path, "rb")
        except OSError as error:
            raise self._changed(path, f": {error.strerror or error}") from None
        try:
            self._same(path, file)
        except BaseException:
            file.close()
            raise
        return file

    def _same(self, path: Path, file: BinaryIO) -> None:
        if stamp(file) != self.stamps[path]:
            raise self._changed(path)

    def _changed(self, path: Path, why: str = "") -> UserError:
        return UserError(f"{path} has changed since the model was loaded from it{why}; load the model again")
