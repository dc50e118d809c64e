"""The blocks of a cache: which rows hold each, which are free, and what is known to stand in them.

A block is room for BLOCK_TOKENS tokens of a row, under one number in all layers. What is packed in one never changes,
so rows whose tokens begin alike hold the same blocks, and a free block can be held again until it is taken for other
tokens. A key says what a block holds: it is chained over the token ids from the row's first on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from ..layer_cache import BLOCK_TOKENS


def chained_keys(ids: Sequence[int], parent: bytes = b"") -> Iterator[bytes]:
    """A key of 16 bytes for each whole block of these ids, which follow the block with key `parent` (none: they are a
    row's first)."""
    for first in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        tokens = np.array(ids[first : first + BLOCK_TOKENS], np.int64)  # those of media need as many bits
        parent = blake2b(parent + tokens.tobytes(), digest_size=16).digest()
        yield parent


class BlockPool:
    """size: blocks. holders[b]: rows that hold block b. generations[b]: how often it was taken: as long as that stays,
    its content does."""

    def __init__(self, size: int):
        self.size, self.holders, self.generations = size, [0] * size, [0] * size
        # In the order in which they are taken: first those that nobody can ask for, then the oldest ones
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(size))
        self.keys: list[bytes | None] = [None] * size
        self.by_key: dict[bytes, int] = {}

    @property
    def num_shared(self) -> int:
        """Blocks that several rows hold."""
        return sum(holders > 1 for holders in self.holders)

    @property
    def num_known(self) -> int:
        """Free blocks that a row can still ask for by their key."""
        return sum(self.keys[block] is not None for block in self.free)

    def next_known(self, count: int) -> dict[bytes, int]:
        """Which blocks the next `take` makes unknown: their keys -> blocks."""
        keys = ((self.keys[block], block) for block in islice(self.free, count))
        return {key: block for key, block in keys if key is not None and self.by_key.get(key) == block}

    def take(self, count: int) -> list[int]:
        """Free blocks, from now on of one row; what was known of them is forgotten. Raises ValueError for more than
        there are."""
        if count > len(self.free):
            raise ValueError(f"{count} blocks are more than the {len(self.free)} of {self.size} that are free")
        blocks = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.holders[block] = 1
            self.generations[block] += 1
            key, self.keys[block] = self.keys[block], None
            if self.by_key.get(key) == block:
                del self.by_key[key]
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more row holds these blocks, free ones or others' too."""
        for block in blocks:
            self.holders[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """A row gives its blocks up, in the order in which it has them; the last one is taken first, since it is of no
        use without those before it."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free[block] = None
                if self.keys[block] is None:
                    self.free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Says what a block holds, which will not change; of two with one key the first one is found."""
        self.keys[block] = key
        self.by_key.setdefault(key, block)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks with these keys, up to the first that there is none with."""
        found = []
        for key in keys:
            if key not in self.by_key:
                break
            found.append(self.by_key[key])
        return found
