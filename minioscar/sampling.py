"""From logits to the next token: penalties, then greedy, or drawn after temperature, top-k, top-p and min-p, in this
order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from . import penalties
from .checks import number, whole
from .errors import Failure

NOT_FINITE = "the model's logits are not finite; run again with --debug to see which layer and operation they come from"


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. The same seed draws the same tokens. None is the
    default.

    top_p: nucleus sampling (arXiv 1904.09751), the smallest set of likeliest tokens whose probability reaches p.
    min_p: (arXiv 2407.01082) tokens at least min_p times as likely as the likeliest.
    repetition_penalty: (CTRL, arXiv 1909.05858) the logits of tokens of the prompt and the answer are divided by it,
    negative ones multiplied. presence_penalty and frequency_penalty, as OpenAI has them: subtracted from the logits of
    the answer's tokens, once, and for each time. All three also where temperature is 0. Raises UserError for a wrong
    type or a number out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check, good, want = CHECKS[field.name]
            value = getattr(self, field.name)
            value = field.default if value is None else value
            object.__setattr__(self, field.name, check(field.name, value, good, want))

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


CHECKS: dict[str, tuple[Callable, Callable, str]] = {
    "temperature": (number, lambda x: 0 <= x < math.inf, "0 (greedy) or a positive number"),
    "top_k": (whole, lambda x: x >= 0, "0 (off) or a positive number of tokens"),
    "top_p": (number, lambda x: 0 < x <= 1, "above 0 and at most 1 (off)"),
    "min_p": (number, lambda x: 0 <= x <= 1, "between 0 (off) and 1"),
    "seed": (whole, lambda x: 0 <= x < 2**64, "a whole number from 0 to 2^64 - 1"),
    "repetition_penalty": (number, lambda x: 0.01 <= x <= 100, "from 0.01 to 100; 1 is off"),
    "presence_penalty": (number, lambda x: -2 <= x <= 2, "from -2 to 2; 0 is off"),
    "frequency_penalty": (number, lambda x: -2 <= x <= 2, "from -2 to 2; 0 is off"),
}


@dataclass(frozen=True)
class RowSampling:
    """How one sequence of a batch draws.

    sequence: the number under which it gets its random numbers. prompt: token ids that repetition_penalty counts beside
    the drawn ones. ends: token ids that are not drawn before there are min_tokens drawn ones. bias: (token id, what is
    added to its logit), each id once.
    """

    sampling: Sampling = Sampling()
    sequence: int = 0
    prompt: Sequence[int] = ()
    ends: Sequence[int] = ()
    min_tokens: int = 0
    bias: Sequence[tuple[int, float]] = ()

    @property
    def masks(self) -> bool:
        return self.min_tokens > 0 and len(self.ends) > 0


def next_token(
    logits: np.ndarray, row: RowSampling, step: int, drawn: Sequence[int] = (), allowed: np.ndarray | None = None
) -> int:
    """The token that a sequence draws at `step` after those that it has drawn: logits float32 [vocab]. allowed: as in
    `penalties.adjusted`. Raises Failure as `sample`."""
    seen = penalties.history(row, drawn, len(logits)) if row.sampling.penalizes else None
    return sample(penalties.adjusted(logits, row, step, seen, allowed), row.sampling, row.sequence, step)


def sample(logits: np.ndarray, sampling: Sampling, sequence: int, step: int) -> int:
    """The next token id of one sequence, without penalties: logits float32 [vocab].

    Drawn by Gumbel-max: the remaining token of the largest logit / temperature - log(e), e from `exponentials` for each
    token by itself. That is a draw from the softmax of the remaining tokens, and a rounding of the logits moves it only
    where two tokens are nearly equal in that sum: what a sequence draws depends on neither the others of its batch nor,
    but for such near-ties, on its back end. Raises Failure where the logits hold a NaN or an infinity.
    """
    if not np.isfinite(logits.max()):
        raise Failure(NOT_FINITE)
    if sampling.temperature == 0:
        return int(logits.argmax())
    remaining = np.flatnonzero(probabilities(logits, sampling))
    noise = np.log(exponentials(sampling.seed, sequence, step, len(logits))[remaining])
    return int(remaining[(_scaled(logits, sampling)[remaining] - noise).argmax()])


def exponentials(seed: int, sequence: int, step: int, vocab: int) -> np.ndarray:
    """A random number of the exponential distribution for every token, float64 [vocab], none of them 0.

    They come from a counter (Philox4x64-10, Salmon et al., SC 2011, keyed by the seed): token i has word i % 4 of block
    i // 4 of the counter [., 0, sequence, step].
    """
    words = np.random.Philox(key=seed, counter=[0, 0, sequence, step]).random_raw(vocab)
    return -np.log1p(-np.maximum((words >> np.uint64(11)) * 2.0**-53, 2.0**-54))


def _scaled(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """(logit - largest) / temperature; float64 [vocab]."""
    x = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature next to 0 leaves the likeliest alone
        return (x - x.max()) / sampling.temperature


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What a token is drawn from at a temperature above 0, float64 [vocab]: 0 where it is left out; the rest is not
    scaled up again."""
    x = _scaled(logits, sampling)
    if 0 < sampling.top_k < len(x):
        x[x < np.partition(x, -sampling.top_k)[-sampling.top_k]] = -np.inf
    p = np.exp(x)
    p /= p.sum()
    if sampling.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]  # probability of everything likelier
        p[order[before >= sampling.top_p]] = 0
    if sampling.min_p > 0:
        p[p < sampling.min_p * p.max()] = 0
    return p
