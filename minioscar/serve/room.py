"""Who gets blocks where the pool is empty: rows without an answer give theirs up, the one unused for longest first;
then the newest answers wait on the host. So the oldest answer always goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..decoding import Decoder
from . import prefixes
from .jobs import Job, Row
from .metrics import Metrics
from .pooled import PooledCache


class Room:
    """Within `Decoder.ordered` only: blocks are copied behind the steps that write them."""

    def __init__(self, cache: PooledCache, rows: Sequence[Row], metrics: Metrics):
        self.cache, self.rows, self.metrics = cache, rows, metrics

    def slots(self) -> list[dict[str, Any]]:
        """Of each row, what it does and how many tokens it holds."""
        return [
            {"id": row.slot, "state": row.state, "n_ctx": self.cache.context, "n_tokens": length,
             "is_processing": row.job is not None}
            for row, length in zip(self.rows, self.cache.lengths.tolist(), strict=True)
        ]  # fmt: skip

    def held(self) -> list[list[int]]:
        """Of each row, the tokens that another prompt could take over."""
        return [row.held[:length] for row, length in zip(self.rows, self.cache.lengths.tolist(), strict=True)]

    def admits(self, job: Job) -> bool:
        """Whether a prompt can be read without taking blocks from running answers; the only one always can."""
        running = [row for row in self.rows if row.job]
        pool, idle = self.cache.pool, sum(len(self.cache.blocks[row.slot]) for row in self.rows if not row.job)
        unread = sum(self.cache.missing(row.slot, len(row.job.ids)) for row in running if row.state == "read")
        swapped = sum(self.cache.missing(row.slot, 0) for row in running)
        shared = sum(pool.holders[block] > 0 for block in pool.find(self.cache.match(job.keys, len(job.usable))))
        needed = self.cache.blocks_of(len(job.ids)) - shared + self.cache.blocks_of(1) * job.rows
        return not running or needed <= len(pool.free) + idle - unread - swapped

    def fits(self, job: Job) -> bool:
        """Whether a prompt and the beginning of its answers fit at all."""
        return self.cache.blocks_of(len(job.ids)) + self.for_answers(job) <= self.cache.pool.size

    def for_answers(self, job: Job) -> int:
        """Blocks that the answers but the first take for themselves when they begin."""
        whole = self.cache.scheme.packed_tokens(len(job.ids)) // self.cache.BLOCK_TOKENS
        return (job.rows - 1) * (self.cache.blocks_of(len(job.ids)) - whole)

    def rows_for(self, job: Job, free: Sequence[Row], decoder: Decoder) -> list[Row]:
        """Free rows for the answers of a job: the one that suits its prompt, and those unused for longest; but rows
        further in front where a step pays for fewer then: what they hold changes places with what the others do."""
        first = max(free, key=lambda row: prefixes.fit(self.cache, job.usable, row))
        others = sorted((row for row in free if row is not first), key=lambda row: row.used)
        chosen = [first, *others[: job.rows - 1]]
        for i, row in enumerate(chosen):
            front = min((other for other in free if other not in chosen), key=lambda other: other.slot, default=row)
            if decoder.rows_with(front.slot) < decoder.rows_with(row.slot):
                with decoder.ordered():
                    self.cache.swap(front.slot, row.slot)
                row.swap(front)
                chosen[i] = front
        return chosen

    def for_step(self, rows: Sequence[Row], decoder: Decoder) -> list[Row]:
        """Those whose next token has a block; the others wait. Older ones are asked first, and may take newer ones'."""
        ends = {row: int(self.cache.lengths[row.slot]) + row.in_flight + 1 for row in rows}
        with decoder.ordered():
            for row in sorted(rows, key=lambda row: row.used):
                self.give(row, ends[row])
        return [row for row in rows if not self.cache.missing(row.slot, ends[row])]

    def give(self, row: Row, tokens: int, more: int = 0) -> bool:
        """The row has blocks for so many tokens, and `more` are free besides. False: it waits."""
        while self.cache.missing(row.slot, tokens) + more > len(self.cache.pool.free):
            if not (self._drop_idle() or self._drop_own(row) or self._swap_newest(row)):
                return False
        if row.slot in self.cache.swapped:
            self.metrics.swapped_in += 1
        self.cache.reserve(row.slot, tokens)
        return True

    def _drop_idle(self) -> bool:
        idle = [row for row in self.rows if row.state == "free" and self.cache.blocks[row.slot]]
        if idle:
            row = min(idle, key=lambda row: row.used)
            self.cache.reset(row.slot)
            row.held = []
        return bool(idle)

    def _drop_own(self, row: Row) -> bool:
        """What a row holds of an answer that has ended, where a prompt is about to begin in it."""
        is_old = row.state == "read" and not row.is_matched and bool(self.cache.blocks[row.slot])
        if is_old:
            self.cache.reset(row.slot)
            row.held = []
        return is_old

    def _swap_newest(self, older: Row) -> bool:
        newer = [row for row in self.rows if row.job and row.used > older.used and self.cache.blocks[row.slot]]
        if newer:
            self.cache.swap_out(max(newer, key=lambda row: row.used).slot)
            self.metrics.swapped_out += 1
        return bool(newer)
