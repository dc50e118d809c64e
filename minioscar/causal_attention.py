"""Attention as a formula in array code, on NumPy and CuPy."""

from __future__ import annotations

from typing import Any

Array = Any
QUERIES = 256  # queries of one sequence whose scores are in memory at once


def causal_attention(q: Array, keys: Array, values: Array, xp: Any) -> Array:
    """The last queries of a sequence over all its tokens: q [n, q_heads, d], already times 1 / sqrt(d); keys, values
    [kv_heads, seen, d].

    float32 [n, q_heads, d]. Query i of n sees the first seen - n + i + 1 tokens.
    """
    (n, q_heads, dim), (kv_heads, seen, _) = q.shape, keys.shape
    x = q.reshape(n, kv_heads, -1, dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, dim)  # [kv_heads, group * n, d]
    scores = (x @ keys.swapaxes(1, 2)).reshape(kv_heads, -1, n, seen)
    if n > 1:
        scores[..., seen - n :] += xp.triu(xp.full((n, n), -xp.inf, xp.float32), 1)
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    y = (scores.reshape(kv_heads, -1, seen) @ values).reshape(kv_heads, -1, n, dim) / total
    return y.transpose(2, 0, 1, 3).reshape(n, q_heads, dim)
