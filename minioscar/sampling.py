"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p and min-p, in this order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import Failure, UserError

NOT_FINITE = "the model's logits are not finite; run again with --debug to see which layer and operation they come from"


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. The same seed draws the same tokens.

    top_p: nucleus sampling (arXiv 1904.09751), the smallest set of likeliest tokens whose probability reaches p.
    min_p: (arXiv 2407.01082) tokens at least min_p times as likely as the likeliest.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, want in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or a positive number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("seed", 0 <= self.seed < 2**64, "a whole number from 0 to 2^64 - 1"),
        ):
            if not good:
                raise UserError(f"{name} {getattr(self, name)} is out of range; it must be {want}")


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
