"""Dither for values that repeat: equal tokens have equal rounding errors, which no average over them takes away.

Where a group of a token's values is nearly that of its neighbour, it is rounded after an offset that runs through the
eighths of a step with the position, so that the errors of eight equal tokens nearly cancel. Only the codes and the
range change: such a group is stored and read like any other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

OFFSETS = np.array([-7, 1, -3, 5, -5, 3, -1, 7], np.float32) / 16  # in steps, of token t: number t % 8
NEAR = 0.25  # a pair of tokens repeats where no channel differs by more than this share of the group's largest value


def offsets(values: Array, group: int, xp: Any = np) -> Array:
    """What is added to values, in steps, before they are rounded: 0 where they do not repeat.

    values [kv_heads, tokens, d], the first of them a token number that 8 divides, tokens even. Tokens t and t ^ 1 are a
    pair, whatever stands before them, so a pair is always packed at once. A group of `group` channels of token t
    repeats where max |v_t - v_(t^1)| <= NEAR max |v_t|, in float32. Returns float32 [kv_heads, tokens, d / group, 1].
    """
    heads, tokens, dim = values.shape
    pairs = values.astype(xp.float32).reshape(heads, tokens // 2, 2, dim // group, group)
    distance = abs(pairs[:, :, :1] - pairs[:, :, 1:]).max(axis=-1, keepdims=True)
    repeats = (distance <= xp.float32(NEAR) * abs(pairs).max(axis=-1, keepdims=True)).reshape(heads, tokens, -1, 1)
    return xp.where(repeats, xp.asarray(np.resize(OFFSETS, tokens))[:, None, None], xp.float32(0))
