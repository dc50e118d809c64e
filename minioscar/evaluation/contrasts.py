"""What the window and the feedback are worth in one layer: the same codes beside other windows, the same scheme with
and without shaped rounding (`inspect`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..causal_attention import causal_attention
from ..oscar import WINDOW, Scheme

WINDOWS = (WINDOW, 0), (64, 64), (32, 96)  # flush, keep
BIN = 16  # queries whose errors are averaged
Back = tuple[np.ndarray, np.ndarray]  # keys and values, [kv_heads, tokens, d]


def windows_of(scheme: Scheme) -> dict[str, Scheme]:
    """The scheme with its own window and with each of WINDOWS that its groups allow, by "flush/keep"."""
    own = (scheme.flush, scheme.keep)
    found = dict.fromkeys((own, *(window for window in WINDOWS if window[0] % scheme.block == 0)))
    return {f"{flush}/{keep}": replace(scheme, flush=flush, keep=keep) for flush, keep in found}


def by_window(q: np.ndarray, exact: Back, back: Back, scheme: Scheme) -> dict[str, list[float]]:
    """Relative error of what the last WINDOW queries get, BIN by BIN, for each of `windows_of`.

    q: [WINDOW, q_heads, d], of the last WINDOW tokens. back: all tokens as they are read from codes, a multiple of
    WINDOW. Query p sees the first P(p) tokens from codes and the others as they are: whole cycles of every window. The
    codes of a group do not depend on the window.
    """
    tokens, q = exact[0].shape[1], q / np.float32(math.sqrt(q.shape[-1]))
    truth, found = causal_attention(q, *exact, np), {}
    for name, windowed in windows_of(scheme).items():
        out = np.empty_like(truth)
        for first in range(0, WINDOW, windowed.flush):  # of the queries between two flushes
            end = first + windowed.flush
            start, seen = (tokens - WINDOW + i for i in (first, end))
            packed = windowed.packed_tokens(start)
            past = (np.concatenate([b[:, :packed], x[:, packed:seen]], 1) for b, x in zip(back, exact, strict=True))
            out[first:end] = causal_attention(q[first:end], *past, np)
        error, size = (np.square(x).reshape(-1, BIN * x[0].size).sum(axis=1) for x in (out - truth, truth))
        found[name] = np.sqrt(error / size).tolist()
    return found


def feedback_effect(
    q: np.ndarray, k: np.ndarray, scheme: Scheme, through_cache: Callable[[Scheme], Back]
) -> dict[str, dict]:
    """The error of keys by RoPE pair, and of logits, of a shaped scheme ("shaped") and of its twin ("plain").

    q [kv_heads, q_per_kv, n, d], k [kv_heads, tokens, d]. pairs: mean square, those that queries weigh most first (by
    head), over the mean of the twin; "energy" has that of the queries, over its mean. logits: root of the mean square
    about each query's mean, which softmax does not see, in nats.
    """
    half = k.shape[-1] // 2

    def by_pair(x: np.ndarray) -> np.ndarray:
        """Mean square, [kv_heads, pairs]."""
        return np.square(x).reshape(len(x), -1, 2, half).mean(axis=(1, 2))

    energy = by_pair(q)
    order = np.argsort(-energy, axis=1)
    found = {"energy": {"pairs": _by_rank(energy, order, energy.mean())}}
    twins = {"plain": replace(scheme, shaped=False), "shaped": scheme}
    errors = {name: through_cache(twin)[0][:, scheme.sinks :] - k[:, scheme.sinks :] for name, twin in twins.items()}
    unit = by_pair(errors["plain"]).mean()
    for name, error in errors.items():
        logits = q @ error[:, None].swapaxes(-1, -2) / math.sqrt(k.shape[-1])
        found[name] = {
            "pairs": _by_rank(by_pair(error), order, unit), "logits": float(logits.std(axis=-1).mean())
        }  # fmt: skip
    return found


def _by_rank(values: np.ndarray, order: np.ndarray, unit: float) -> list[float]:
    return (np.take_along_axis(values, order, axis=1).mean(axis=0) / unit).tolist()
