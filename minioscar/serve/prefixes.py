"""What is cached of the beginning of a prompt, and how a row takes it over: from a row, with its window, or from the
blocks that the pool knows, or the host has, behind which the window is fed again."""

from __future__ import annotations

from collections.abc import Sequence

from ..prompt_cache import common
from .jobs import Job, Row
from .pooled import PooledCache

LEAST = 32  # tokens: a shorter prefix is read again


def begins(held: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether two prompts have so much in common that one can take it over from the other."""
    return len(ids) >= LEAST and held[:LEAST] == ids[:LEAST]


def shared(cache: PooledCache, ids: Sequence[int], row: Row) -> int:
    """Tokens at the beginning of a prompt that need not be fed again if they are taken from a row."""
    length = int(cache.lengths[row.slot])
    if length < LEAST or not begins(row.held, ids):
        return 0
    return cache.left_to_share(row.slot, min(common(ids, row.held), length), row.in_flight)


def take_over(cache: PooledCache, rows: Sequence[Row], target: Row) -> int:
    """Row `target`, in which nothing runs yet, holds what any of `rows`, or the pool, has of the beginning of its
    prompt; so many tokens."""
    ids = target.job.usable
    source = max(rows, key=lambda row: (shared(cache, ids, row), row is target))
    of_row, keys = shared(cache, ids, source), cache.match(target.job.keys, len(ids))
    if len(keys) * cache.BLOCK_TOKENS > max(of_row, LEAST - 1):
        return cache.begin_with(target.slot, keys)
    if of_row < LEAST:
        cache.reset(target.slot)
        return 0
    length = min(common(ids, source.held), int(cache.lengths[source.slot]))
    return cache.take_over(source.slot, target.slot, length, source.in_flight)


def own_blocks(cache: PooledCache, job: Job) -> int:
    """How many blocks must be free when a row takes over the beginning of a prompt."""
    return max(cache.most_own, cache.free_for(cache.match(job.keys, len(job.usable))))


def fit(cache: PooledCache, ids: Sequence[int], row: Row) -> tuple[int, int]:
    """How well a free row suits a prompt: it holds mostly the beginning of it, or it was used long ago."""
    found = shared(cache, ids, row)
    goes_on = found >= LEAST and 2 * found >= cache.lengths[row.slot]
    return found if goes_on else 0, -row.used
