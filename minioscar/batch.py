"""The new tokens of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from .towers.media import Inputs, Medium, placed


@dataclass(frozen=True)
class Batch:
    """The new tokens of one forward pass, sequence after sequence, without padding.

    slots[i] is the cache row of sequence i, starts[i] its length before this pass and packed[i] its packed tokens,
    counts[i] its new tokens. shifts[i] is what their positions are more than their places in the row, behind media.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    packed: tuple[int, ...]
    counts: tuple[int, ...]
    shifts: tuple[int, ...] | None = field(default=None, repr=False)  # None: all are 0
    inputs: Inputs | None = field(default=None, repr=False)  # of a pass over rows with media
    rotates_back: ClassVar[bool] = False  # whether attention returns rotated values rotated back

    def reading(self, rows: Sequence[Sequence[int]], media: Sequence[Medium]) -> Batch:
        """The same with what the media of these rows make of it. rows: as in `placed`."""
        return replace(self, inputs=placed(rows, self.starts, self.counts, media))

    @property
    def positions(self) -> np.ndarray:
        """The position of every new token; int64 [tokens]."""
        return np.concatenate([np.arange(s, s + n) for s, n in zip(self.starts, self.counts, strict=True)])

    @property
    def table_rows(self) -> np.ndarray:
        """Which row of the tables of RoPE each new token has: its position, or in a pass with media, whose tables are
        of its tokens, its number; int64 [tokens]."""
        if self.inputs is not None:
            return np.arange(sum(self.counts))
        return self.positions if self.shifts is None else self.positions + np.repeat(self.shifts, self.counts)

    @property
    def last(self) -> np.ndarray | None:
        """Where each sequence's last new token stands among the tokens, int64 [sequences]; None: every token is one."""
        return None if set(self.counts) == {1} else np.cumsum(self.counts) - 1

    @property
    def end(self) -> int:
        """The longest a row becomes: so many positions are needed."""
        return max(start + count for start, count in zip(self.starts, self.counts, strict=True))

    def spans(self) -> list[tuple[int, int, slice]]:
        """(slot, start, where its tokens stand) of each sequence."""
        ends = np.cumsum(self.counts).tolist()
        return [(s, p, slice(e - n, e)) for s, p, n, e in zip(self.slots, self.starts, self.counts, ends, strict=True)]
