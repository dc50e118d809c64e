"""The plain form of a quantized matrix: a byte for each code. Every reader makes it, every internal form is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    0 ... 256 for int8) or, where this project quantized, any number that float16 represents.
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
        rows, columns = self.shape
        values = xp.asarray(E4M3)[self.codes] if self.kind == "e4m3" else self.codes.astype(xp.float32)
        scale, zero = (None if x is None else xp.repeat(x, self.group, 1)[:, :columns] for x in (self.scale, self.zero))
        return (values if zero is None else values - zero) * scale


def joined(parts: Sequence[Plain], xp: Any) -> Plain:
    """Their rows one below the other. Raises ValueError where kind, group or columns differ, or only some have zeros."""
    first = parts[0]
    if any(_key(part) != _key(first) for part in parts):
        raise ValueError("only matrices of one kind, group and number of columns stand in one")
    if len(parts) == 1:
        return first
    zero = None if first.zero is None else xp.concatenate([part.zero for part in parts])
    codes, scale = (xp.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scale"))
    return Plain(first.kind, codes, scale, zero, first.group, _common([part.scale_dtype for part in parts]))


def _key(plain: Plain) -> tuple:
    return plain.kind, plain.group, plain.shape[1], plain.zero is None


def _common(dtypes: Sequence[np.dtype]) -> np.dtype:
    return dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)
