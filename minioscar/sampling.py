"""From logits to the next token: penalties, then greedy, or drawn after temperature, top-k, top-p and min-p, in this order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .errors import Failure, UserError

NOT_FINITE = "the model's logits are not finite; run again with --debug to see which layer and operation they come from"


def number(name: str, value: Any, good: Callable[[float], bool], want: str) -> float:
    """The value as a float. Raises UserError, which names it, for another type (bool, text) and where it is not good; NaN never is."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise UserError(f"{name} {shown(value)} is not a number; it must be {want}")
    try:
        found = float(value)
    except OverflowError:  # an int may be larger than any float
        found = math.inf if value > 0 else -math.inf
    if math.isnan(found) or not good(found):
        raise UserError(f"{name} {shown(value)} is out of range; it must be {want}")
    return found


def whole(name: str, value: Any, good: Callable[[int], bool], want: str) -> int:
    """The same for whole numbers, Python's and NumPy's, as an int."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name} {shown(value)} is not a whole number; it must be {want}")
    if not good(int(value)):
        raise UserError(f"{name} {shown(value)} is out of range; it must be {want}")
    return int(value)


def shown(value: Any) -> str:
    """A value in a line of an error: short, whatever it is."""
    try:
        text = str(value) if isinstance(value, np.generic) else repr(value)
    except Exception:  # Python prints no number of more than 4,300 digits
        return f"({type(value).__name__})"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. The same seed draws the same tokens. None is the default.

    top_p: nucleus sampling (arXiv 1904.09751), the smallest set of likeliest tokens whose probability reaches p.
    min_p: (arXiv 2407.01082) tokens at least min_p times as likely as the likeliest.
    repetition_penalty: (CTRL, arXiv 1909.05858) the logits of tokens of the prompt and the answer are divided by it, negative ones
    multiplied. presence_penalty and frequency_penalty, as OpenAI has them: subtracted from the logits of the answer's tokens, once, and
    for each time. All three also where temperature is 0. Raises UserError for a wrong type or a number out of range.
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
            check, good, want = SETTINGS[field.name]
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, check(field.name, field.default if value is None else value, good, want))

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


SETTINGS: dict[str, tuple[Callable, Callable, str]] = {
    "temperature": (number, lambda x: 0 <= x < math.inf, "0 (greedy) or a positive number"),
    "top_k": (whole, lambda x: x >= 0, "0 (off) or a positive number of tokens"),
    "top_p": (number, lambda x: 0 < x <= 1, "above 0 and at most 1 (off)"),
    "min_p": (number, lambda x: 0 <= x <= 1, "between 0 (off) and 1"),
    "seed": (whole, lambda x: 0 <= x < 2**64, "a whole number from 0 to 2^64 - 1"),
    "repetition_penalty": (number, lambda x: 0.01 <= x <= 100, "from 0.01 to 100; 1 is off"),
    "presence_penalty": (number, lambda x: -2 <= x <= 2, "from -2 to 2; 0 is off"),
    "frequency_penalty": (number, lambda x: -2 <= x <= 2, "from -2 to 2; 0 is off"),
}


def sample(logits: np.ndarray, sampling: Sampling, sequence: int, step: int) -> int:
    """The next token id of one sequence: logits float32 [vocab].

    The random number comes from a counter (Philox, keyed by the seed, at [sequence, step]), so what a sequence draws does
    not depend on the others of its batch. Raises Failure where the logits hold a NaN or an infinity.
    """
    if not np.isfinite(logits.max()):
        raise Failure(NOT_FINITE)
    if sampling.temperature == 0:
        return int(logits.argmax())
    total = np.cumsum(probabilities(logits, sampling))
    return int(np.searchsorted(total, uniform(sampling, sequence, step) * total[-1], side="right"))


def uniform(sampling: Sampling, sequence: int, step: int) -> float:
    """The random number, 0 <= u < 1, that decides about a token."""
    return np.random.Generator(np.random.Philox(key=sampling.seed, counter=[0, 0, sequence, step])).random()


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What a token is drawn from at a temperature above 0, float64 [vocab]: 0 where it is left out; the rest is not scaled up again."""
    with np.errstate(over="ignore"):  # a temperature next to 0 leaves the likeliest alone
        x = (logits - logits.max()).astype(np.float64) / sampling.temperature
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


def likeliest(logits: np.ndarray, token: int, k: int) -> list[tuple[int, float]]:
    """(id, log-probability) of `token`, then of the k likeliest tokens in order; logits float32 [vocab], natural logarithms."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    k = min(k, len(x))
    top = np.argpartition(-x, k - 1)[:k] if k else np.empty(0, int)
    top = top[np.lexsort((top, -x[top]))]
    return [(i, float(x[i])) for i in (token, *top.tolist())]
