"""The new tokens of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """The new tokens of one forward pass, sequence after sequence, without padding.

    slots[i] is the cache row of sequence i, starts[i] its length before this pass and packed[i] its packed tokens,
    counts[i] its new tokens.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    packed: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def positions(self) -> np.ndarray:
        """The position of every new token; int64 [tokens]."""
        return np.concatenate([np.arange(s, s + n) for s, n in zip(self.starts, self.counts, strict=True)])

    @property
    def last(self) -> np.ndarray | None:
        """Where each sequence's last new token stands among the tokens, int64 [sequences]; None: every token is one."""
        return None if set(self.counts) == {1} else np.cumsum(self.counts) - 1

    @property
    def end(self) -> int:
        """The longest a row becomes: so many positions are needed."""
        return int(np.add(self.starts, self.counts).max())

    def spans(self) -> list[tuple[int, int, slice]]:
        """(slot, start, where its tokens stand) of each sequence."""
        ends = np.cumsum(self.counts).tolist()
        return [(s, p, slice(e - n, e)) for s, p, n, e in zip(self.slots, self.starts, self.counts, ends, strict=True)]
