"""Numbers to codes, for --weights: round to nearest, no calibration.

int8: symmetric, scale = max|w| / 127. int4: from the smallest to the largest number of a group, with a zero that need
not be whole: on SmolLM2-135M that is worth as much as half the group (docs/weights.md). Groups are of 64 columns where
that divides them. Scales and zeros are rounded to float16 first and codes are chosen for what is left.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .plain import BITS, Plain, joined

Array = Any
MODES = ("int8", "int4")
GROUP = 64
CHUNK = 1 << 25  # numbers at a time: the float32 arrays of a chunk take four times its bytes in float32
F16 = np.dtype(np.float16)


def quantize(w: Array, mode: str, xp: Any, group: int | None = None) -> Plain:
    """w: [rows, columns], floats. mode: of MODES. group: columns of a group (None: `group_of`)."""
    rows, columns = w.shape
    step, group = max(CHUNK // columns, 1), group or group_of(columns)
    return joined([_rounded(w[i : i + step], mode, group, xp) for i in range(0, rows, step)], xp)


def _rounded(w: Array, mode: str, group: int, xp: Any) -> Plain:
    x = w.astype(xp.float32).reshape(len(w), -1, group)
    low, high = x.min(axis=-1), x.max(axis=-1)
    if mode == "int8":
        top, scale = 255, _to_float16(xp.maximum(high, -low) / 127)
        zero = xp.full(scale.shape, 128, xp.float32)
    else:
        top, spread = 15, high - low
        scale = _to_float16(xp.where(spread == 0, xp.abs(low), spread / 15))  # equal numbers: code 0 is the number
        zero = _to_float16(-low / xp.where(scale == 0, np.float32(1), scale))
    inverse = (1 / xp.where(scale == 0, np.float32(1), scale))[..., None]
    codes = xp.clip(xp.rint(x * inverse + zero[..., None]), 0, top).astype(xp.uint8)
    return Plain(mode, codes.reshape(w.shape), scale, zero, group, F16)


def group_of(columns: int) -> int:
    return next((group for group in (GROUP, 32) if columns % group == 0), columns)


def stored_bits(mode: str, columns: int = 0) -> float:
    """Of a number, its share of a scale and a zero of 16 bits included. columns: as `Format.stored_bits` has them."""
    return BITS[mode] + 32 / math.gcd(GROUP, columns)


def _to_float16(x: Array) -> Array:
    """Rounded to float16, as float32."""
    return x.astype(F16).astype(np.float32)
