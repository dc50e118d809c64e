"""The plain form of a quantized matrix, a byte for each code: readers make it, internal forms are made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

Array = Any
BITS = {"int4": 4, "int8": 8, "e4m3": 8}
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # the value of each code


@dataclass(frozen=True)
class Plain:
    """W[row, k] = (value(code[row, k]) - zero[row, k // group]) * scale[row, k // group], in float32.

    value: the code itself, or E4M3[code], which has no zero. Arrays are on the back end. `group` may be `columns`: one
    scale a row. The last group may be short. A scale may be negative or 0. A zero is a whole number (0 ... 16 for int4,
    0 ... 255 for int8) or, where this project quantized, any number that float16 represents.
    """

    kind: str  # of BITS
    codes: Array  # uint8 [rows, columns]
    scale: Array  # float32 [rows, ceil(columns / group)]
    zero: Array | None  # float32, shaped like scale; None: 0, for e4m3 always
    group: int  # columns that share a scale and a zero
    scale_dtype: np.dtype  # float16, bfloat16 or float32: the smallest that is known to represent every scale exactly

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    def dequantize(self, xp: Any) -> Array:
        """float32 [rows, columns]."""
        values = xp.asarray(E4M3)[self.codes] if self.kind == "e4m3" else self.codes.astype(xp.float32)
        scale, zero = (self.in_groups(name, 1, xp) for name in ("scale", "zero"))
        return (values if zero is None else values - zero) * scale

    def in_groups(self, name: str, group: int, xp: Any) -> Array | None:
        """`scale` or `zero` of smaller groups, of a size that divides this one's: [rows, ceil(columns / group)]."""
        array = getattr(self, name)
        if array is None or group == self.group:
            return array
        return xp.repeat(array, self.group // group, axis=1)[:, : -(-self.shape[1] // group)]

    def rows(self, of: slice) -> Plain:
        """Some rows, in memory of their own."""
        if of == slice(None):
            return self
        codes, scale, zero = (x if x is None else x[of].copy() for x in (self.codes, self.scale, self.zero))
        return replace(self, codes=codes, scale=scale, zero=zero)

    def cut_columns(self, of: slice, xp: Any) -> Plain:
        """The columns first ... last - 1 of all rows, exactly: where a group has columns of two shares of this width,
        in smaller groups, whose size divides both."""
        if of == slice(None):
            return self
        group, codes = math.gcd(self.group, of.stop - of.start), xp.ascontiguousarray(self.codes[:, of])
        if self.scale.shape[1] == 1:
            return replace(self, codes=codes, group=of.stop - of.start)
        groups = slice(of.start // group, -(-of.stop // group))
        parts = (self.in_groups(name, group, xp) for name in ("scale", "zero"))
        scale, zero = (x if x is None else xp.ascontiguousarray(x[:, groups]) for x in parts)
        return replace(self, codes=codes, scale=scale, zero=zero, group=group)


def joined(parts: Sequence[Plain | Array], xp: Any) -> Plain | Array:
    """Their rows one below the other, exactly: of unequal bits or groups in the larger form with the smaller groups.

    float32 [rows, columns] where that does not exist: numbers beside codes, E4M3 beside integers.
    """
    if len(parts) == 1:
        return parts[0]
    if not any(isinstance(part, Plain) for part in parts):
        return xp.concatenate(parts)
    if not all(isinstance(part, Plain) for part in parts) or len({part.zero is None for part in parts}) > 1:
        numbers = [part.dequantize(xp) if isinstance(part, Plain) else part.astype(xp.float32) for part in parts]
        return xp.concatenate(numbers)
    group = math.gcd(*(part.group for part in parts))
    scales, zeros = ([part.in_groups(name, group, xp) for part in parts] for name in ("scale", "zero"))
    return Plain(
        max((part.kind for part in parts), key=lambda kind: BITS[kind]),
        xp.concatenate([part.codes for part in parts]),
        xp.concatenate(scales),
        None if zeros[0] is None else xp.concatenate(zeros),
        group,
        parts[0].scale_dtype if len({part.scale_dtype for part in parts}) == 1 else np.dtype(np.float32),
    )
