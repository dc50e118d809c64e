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
NEAR = 0.25  # how much two tokens of a pair may differ: in any channel, as a share of the group's largest value


def offsets(values: Array, group: int, xp: Any = np) -> Array:
    """What is added to values, in steps, before they are rounded: 0 where they do not repeat.

    values [kv_heads, tokens, d], the number of tokens and that of the first one multiples of 8. Tokens t and t ^ 1 are
    a pair, whatever stands before them: what is compared is always packed at once. A group of `group` channels of t is
    near where max |v_t - v_(t^1)| <= NEAR max |v_t|, in float32, and repeats where that of t ^ 4 is near as well: the
    two line breaks of a paragraph do not make a text that repeats itself. Returns float32 [kv_heads, tokens, d / group,
    1].
    """
    heads, tokens, dim = values.shape
    pairs = values.astype(xp.float32).reshape(heads, tokens // 2, 2, dim // group, group)
    distance = abs(pairs[:, :, :1] - pairs[:, :, 1:]).max(axis=-1, keepdims=True)
    near = distance <= xp.float32(NEAR) * abs(pairs).max(axis=-1, keepdims=True)
    near = near.reshape(heads, tokens // 8, 2, 4, dim // group, 1)
    repeats = (near & near[:, :, ::-1]).reshape(heads, tokens, dim // group, 1)
    return xp.where(repeats, xp.asarray(np.resize(OFFSETS, tokens))[:, None, None], xp.float32(0))
