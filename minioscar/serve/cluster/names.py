"""Names for the beginnings of a prompt, by which doors and replicas speak of what is in a cache.

The name of the first n blocks of 128 tokens is 64 bits of BLAKE2b over the name of n - 1 blocks and the ids of block n.
Equal names are taken for equal beginnings; where they are not, a prompt is read that might have been in a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from ...oscar import WINDOW
from ...prompt_cache import common

BLOCK = WINDOW
FINE = 8  # beginnings of so many blocks are all named, longer ones where they are an eighth longer than the last


class Chain:
    """The names of one sequence that grows, or begins anew: what it has in common with the last call is not hashed
    again."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.all: list[int] = []  # a name for each whole block

    def names(self, ids: Sequence[int]) -> list[int]:
        """Of the beginnings that `sizes` lists, shortest first."""
        whole = len(ids) // BLOCK * BLOCK
        same = common(self.ids, ids[:whole]) // BLOCK
        del self.all[same:]
        self.ids = list(ids[:whole])
        blocks = np.asarray(self.ids[same * BLOCK :], "<i8").reshape(-1, BLOCK)
        for block in blocks:
            before = self.all[-1].to_bytes(8, "little") if self.all else b""
            self.all.append(int.from_bytes(blake2b(before + block.tobytes(), digest_size=8).digest(), "little"))
        return [self.all[size - 1] for size in sizes(len(self.all))]


def names(ids: Sequence[int]) -> list[int]:
    """Of the beginnings of one prompt."""
    return Chain().names(ids)


def sizes(blocks: int) -> list[int]:
    """The beginnings that have names, in blocks: 1, 2, ... 8, 9, 10, ... 16, 18, ... up to `blocks`."""
    found, size = [], 1
    while size <= blocks:
        found.append(size)
        size += max(size // FINE, 1)
    return found
