"""Which pieces of prompts are read in the next pass."""

from __future__ import annotations

from collections import deque

from . import prefixes
from .jobs import Row
from .room import Room

SCORED_PIECE = 128  # tokens whose logits are on the host at once
Piece = tuple[Row, list[int]]


class Pieces:
    """rows: those whose prompts are being read, in their order. Within `Decoder.ordered` only, as `Room`."""

    def __init__(self, room: Room, chunk: int):
        self.room, self.cache, self.chunk = room, room.cache, chunk
        self.rows: deque[Row] = deque()

    def next(self) -> list[Piece]:
        """Of at most `chunk` tokens together; each ends at a multiple of it, or with its prompt."""
        pieces: list[Piece] = []
        left, room = self.chunk, self.cache.context
        for row in self.rows:
            if not row.is_matched:
                if any(prefixes.begins(other.job.ids, row.job.usable) for other, _ in pieces):
                    break  # it could take over what another one is about to read
                if not self.room.give(row, 0, prefixes.own_blocks(self.cache, row.job)):
                    break
                self._match(row)
            start = int(self.cache.lengths[row.slot])
            size = SCORED_PIECE if row.job.prompt_logprobs is not None else self.chunk
            piece = row.job.ids[start : start + size - start % size]
            left, room = left - len(piece), room - start - len(piece)  # what a pass allocates is for one whole row
            if min(left, room) < 0 or pieces and row.job.prompt_logprobs is not None:
                break
            end = start + len(piece)
            if not self.room.give(row, end, self.room.for_answers(row.job) * (end == len(row.job.ids))):
                break
            pieces.append((row, piece))
            if row.job.prompt_logprobs is not None or row.job.rows > 1:  # nobody else takes their blocks
                break
        return pieces

    def _match(self, row: Row) -> None:
        """The row takes over what any row holds of the beginning of its prompt."""
        row.job.cached = prefixes.take_over(self.cache, self.room.rows, row)
        row.held, row.is_matched = list(row.job.ids), True
        self.room.metrics.hit_tokens += row.job.cached
