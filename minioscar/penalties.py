"""What is done to logits before a token is drawn from them: penalties, masks, biases, ends that come too early.

row: a `sampling.RowSampling`. ops/sample.py launches the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def history(row: Any, drawn: Sequence[int], vocab: int) -> np.ndarray:
    """What penalties look back at, int32 [vocab]: twice how often a token was drawn, and 1 more if the prompt has
    it."""
    seen = 2 * np.bincount(np.asarray(drawn, np.int64), minlength=vocab).astype(np.int32)
    seen[np.asarray(row.prompt, np.int64)] += 1
    return seen


def mask_words(vocab: int) -> int:
    """Of a mask of allowed tokens, in numbers of 32 bits."""
    return -(-vocab // 32)


def adjusted(
    logits: np.ndarray, row: Any, step: int, seen: np.ndarray | None, allowed: np.ndarray | None = None
) -> np.ndarray:
    """Logits after the penalties of `seen` (`history`), a mask, the row's bias, and without end tokens where it is too
    early for them; float32 [vocab].

    allowed: int32 [mask_words(vocab)], bit i % 32 of word i // 32 is token i; None: all are.
    """
    if seen is None and not row.masks and not row.bias and allowed is None:
        return logits
    x, s = logits.astype(np.float32), row.sampling
    if seen is not None:
        at = np.flatnonzero(seen)
        times, factor = (seen[at] >> 1).astype(np.float32), np.float32(s.repetition_penalty)
        x[at] = np.where(x[at] > 0, x[at] / factor, x[at] * factor)
        x[at] -= np.float32(s.frequency_penalty) * times + np.float32(s.presence_penalty) * (times > 0)
    if allowed is not None:
        x[np.unpackbits(allowed.view(np.uint8), count=len(x), bitorder="little") == 0] = -np.inf
    for token, bias in row.bias:
        x[token] += np.float32(bias)
    if step < row.min_tokens:
        x[list(row.ends)] = -np.inf
    return x
