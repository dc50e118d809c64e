"""What a run needs in memory, worked out before anything is allocated, and what this machine has.

need = weights + cache (exact, cache.py) + work, the arrays of one forward pass (`ops.work_bytes`: work_bytes.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import Config
from .errors import Failure, UserError
from .ops.reference import Reference
from .oscar import SCHEMES, WINDOW, Scheme
from .tables import size

NONE_FIT = f"not even {WINDOW} tokens fit"


@dataclass(frozen=True)
class Need:
    """Bytes."""

    weights: int  # still to be loaded
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


def weight_bytes(config: Config, scheme: Scheme, ops: Reference) -> int:
    """Of a loaded model: its weights, and the feedback tables of a shaped scheme (`Weights.key_feedback`)."""
    tables = 4 * config.num_layers * config.num_kv_heads * config.head_dim**2 if scheme.shaped else 0
    return ops.weight_bytes(config) + tables


def needed(
    config: Config, scheme: Scheme, ops: Reference, batch: int, context: int, tokens: int | None = None,
    weights: int = 0, penalties: bool | None = False,
) -> Need:
    """For `batch` sequences of `context` tokens; tokens: the most that one forward pass takes in (None: the whole
    context of one). penalties: whether a token is drawn from other logits than the model's (`Options.adjusts`); None:
    rows join and leave (`Decoder`)."""
    work = ops.work_bytes(config, context if tokens is None else tokens, context, batch, penalties)
    return Need(weights, ops.cache_bytes(config, scheme, batch, context), work)


def check(
    config: Config, scheme: Scheme, ops: Reference, batch: int, context: int, tokens: int | None = None,
    weights: int = 0, penalties: bool | None = False,
) -> None:
    """Raises UserError, with the longest context that does fit, where `needed` exceeds what is free."""
    need, free = needed(config, scheme, ops, batch, context, tokens, weights, penalties), ops.free_bytes()
    if need.total > free:
        what = f"context {context}" if batch == 1 else f"{batch} x context {context}"
        fits = longest_context(config, scheme, ops, batch, free - weights, tokens, penalties)
        ways = [f"--ctx {fits} fits" if fits else NONE_FIT]
        if _int2_fits(config, scheme, ops, batch, context, tokens, free - weights):
            ways.append("so does --kv int2")
        if batch > 1:
            ways.append("fewer sequences at once need less")
        raise UserError(f"{what} {_exceeds(need, free, scheme, ops)}; {', '.join(ways)}")


def as_far_as_it_fits(
    config: Config, scheme: Scheme, ops: Reference, context: int, prompt: int, tokens: int, penalties: bool = False
) -> int:
    """`context`, or the longest that fits what is free: of one sequence, whose prompt must fit. tokens, penalties: as
    in `needed`.

    Raises UserError for a prompt that does not.
    """
    free = ops.free_bytes()
    fits = longest_context(config, scheme, ops, 1, free, tokens, penalties)
    context = max(min(context, fits), prompt)
    need = needed(config, scheme, ops, 1, context, tokens, penalties=penalties)
    if need.total > free:
        ways = [f"{fits} tokens fit, shorten it" if fits else NONE_FIT]
        if _int2_fits(config, scheme, ops, 1, context, tokens, free):
            ways.append("or take --kv int2")
        raise UserError(f"the prompt of {prompt} tokens {_exceeds(need, free, scheme, ops)}; {', '.join(ways)}")
    return context


def _exceeds(need: Need, free: int, scheme: Scheme, ops: Reference) -> str:
    before = f"weights {size(need.weights)}, " if need.weights else ""
    parts = f"{before}{scheme.name} cache {size(need.cache)}, work {size(need.work)}"
    return f"needs {size(need.total)} ({parts}) but {size(free)} of {ops.name} memory are free"


def _int2_fits(
    config: Config, scheme: Scheme, ops: Reference, batch: int, context: int, tokens: int | None, free: int
) -> bool:
    """Whether a 2-bit cache is the way out for one in BF16."""
    return scheme is SCHEMES["bf16"] and needed(config, SCHEMES["int2"], ops, batch, context, tokens).total <= free


def longest_context(
    config: Config, scheme: Scheme, ops: Reference, batch: int, free: int, tokens: int | None = None,
    penalties: bool | None = False
) -> int:
    """The most tokens (a multiple of 128, at most the model's context) that fit `free` bytes with their work; 0 if none
    do."""
    low, high = 0, -(-config.max_context // WINDOW)
    while low < high:
        middle = (low + high + 1) // 2
        context = middle * WINDOW
        fed = None if tokens is None else min(tokens, batch * context)
        fits = needed(config, scheme, ops, batch, context, fed, penalties=penalties).total <= free
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(low * WINDOW, config.max_context)


def out_of_memory(config: Config, scheme: Scheme, ops: Reference, reason: str) -> Failure:
    """What to raise where memory ran out after all; whoever calls this has let go of the cache."""
    ops.release()
    fits = longest_context(config, scheme, ops, 1, ops.free_bytes())
    way_out = f"by its arithmetic --ctx {fits} fits now, a shorter prompt surely"
    return Failure(f"out of {ops.name} memory ({reason}); {way_out}")
