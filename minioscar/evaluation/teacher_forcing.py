"""Feeding a model known tokens through its quantized cache: what every measure of fidelity is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..cache import Cache
from ..engine import Engine

Done = Callable[[int], object]  # told how many tokens went through the model since it was last called


def teacher_forced(
    engine: Engine, ids: Sequence[int], prefill: int, done: Done = lambda tokens: None, piece: int = 0
) -> Iterator[np.ndarray]:
    """Logits, in chunks, at positions prefill ... len(ids) - 2 of a decode that is fed the true tokens.

    piece: the prompt is read in pieces that end at multiples of so many tokens, each of which attends to itself in full
    precision and to those before it as the cache has them, as the server reads it; 0: whole.

    Tokens are packed only when their number is a multiple of the scheme's `flush`, so all tokens up to the next flush
    can go through the model at once and see exactly what they would see one by one: the packed blocks, the window, and
    each other unquantized.
    """
    cache = Cache(engine.config, engine.scheme, 1, len(ids) - 1, engine.ops)
    bounds = [*range(0, prefill, piece or prefill), prefill]
    for start, end in zip(bounds, bounds[1:], strict=False):
        engine.model.forward(np.array(ids[start:end]), cache, cache.batch_for([0], [end - start]))
        done(end - start)
    yield from followed(engine, ids, cache, done)


def followed(
    engine: Engine, ids: Sequence[int], cache: Cache, done: Done = lambda tokens: None
) -> Iterator[np.ndarray]:
    """The same from where row 0 of a cache stands, with as many of ids in it as it is long."""
    feed = np.array(ids[:-1])
    while int(cache.lengths[0]) < len(feed):
        chunk = feed[int(cache.lengths[0]) : next_flush(cache)]
        yield engine.model.forward(chunk, cache, cache.batch_for([0], [len(chunk)]), every=True)
        done(len(chunk))


def next_flush(cache: Cache, slot: int = 0) -> int:
    """The length of a row at which some of its window is quantized next."""
    return (int(cache.lengths[slot]) // cache.scheme.flush + 1) * cache.scheme.flush


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [n, vocab], accumulated in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def divergence(truth: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """KL(truth || ours) at each position, in nats: log-probabilities float32 [n, vocab] -> float64 [n]."""
    return (np.exp(truth) * (truth - ours)).sum(axis=1, dtype=np.float64)
