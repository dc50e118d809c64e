"""Attention of towers by kernels: each of the tokens of a picture, or of a stretch of sound, over all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..ops.attention import Heads, PrefillTokens
from ..ops.launch import Card, Launch
from ..ops.prefill import PREFILL_CONFIGS, prefill_attention

Array = Any


def padded(head_dim: int) -> int | None:
    """The smallest head that has a kernel and room for one of this size."""
    return next((d for d in PREFILL_CONFIGS if d >= head_dim), None)


def attention(ops: Any, q: Array, keys: Array, values: Array) -> Array:
    """`Reference.full_attention` of heads that `padded` has a size for: zeros change no sum. ops: the back end."""
    tokens, heads, dim = q.shape
    arrays = ops.xp.zeros((4, tokens, heads, padded(dim)), ops.dtype)
    for to, x in zip(arrays, (q, keys, values), strict=False):
        to[..., :dim] = x
    zero, count = (ops.xp.asarray(np.array([n], np.int32)) for n in (0, tokens))
    ops.run(full_attention(arrays, zero, count, ops.card, dim**-0.5))
    return arrays[3][..., :dim]


def full_attention(arrays: Array, zero: Array, count: Array, card: Card, scale: float) -> Launch:
    """Each of the tokens of a picture over all of them. arrays: q, keys, values, and what becomes of them, bf16 [4,
    tokens, heads, d]; d one of PREFILL_CONFIGS. zero, count: int32 [1] of 0, and of the number of tokens."""
    q, keys, values, out = arrays
    tokens, heads, d = q.shape
    new = PrefillTokens(keys, values, heads * d, heads * d, zero, None, zero, count, tokens)
    launch = prefill_attention(Heads(heads, heads, d), q, new, None, out, card, scale=scale)
    return replace(launch, defines=(*launch.defines, "FULL=1"))
