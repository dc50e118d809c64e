"""What the rows of a cache hold of the beginning of a prompt, and how one row takes it over from another."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache import Cache
from ..prompt_cache import common
from .jobs import Row

LEAST = 32  # tokens: a shorter prefix is read again rather than copied


def begins(held: Sequence[int], ids: Sequence[int]) -> bool:
    """Whether two prompts have so much in common that one can take it over from the other."""
    return len(ids) >= LEAST and held[:LEAST] == ids[:LEAST]


def shared(cache: Cache, ids: Sequence[int], row: Row) -> int:
    """Tokens at the beginning of a prompt that need not be fed again if they are taken from a row."""
    held = row.held[: int(cache.lengths[row.slot])]
    if len(held) < LEAST or not begins(held, ids):
        return 0
    return cache.left_after_cut(row.slot, common(ids, held), row.in_flight)


def take_over(cache: Cache, ids: Sequence[int], source: Row, target: Row) -> int:
    """Row `target`, in which nothing runs, holds what `source` has of the beginning of a prompt; so many tokens."""
    if shared(cache, ids, source) < LEAST:
        cache.reset(target.slot)
        return 0
    length = common(ids, source.held[: int(cache.lengths[source.slot])])
    if source is not target:
        cache.copy(source.slot, target.slot)
    return cache.truncate(target.slot, length, source.in_flight)


def fit(cache: Cache, ids: Sequence[int], row: Row) -> tuple[int, int]:
    """How well a free row suits a prompt: it holds mostly the beginning of it, or it was used long ago."""
    found = shared(cache, ids, row)
    goes_on = found >= LEAST and 2 * found >= cache.lengths[row.slot]
    return found if goes_on else 0, -row.used
