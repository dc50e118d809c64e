"""AWQ (arXiv 2306.00978) in the three layouts of AutoAWQ 0.2: W = (code - zero) * scale, 4 bits.

gemm       qweight int32 [columns, rows / 8], qzeros int32 [groups, rows / 8], scales [groups, rows]; nibble j of a word
           is row (0, 2, 4, 6, 1, 3, 5, 7)[j] of its eight
gemv       qweight int32 [rows, columns / 8], qzeros int32 [rows, width], scales [rows, 8 * width]; nibbles in order;
           `width` words have room for at least all groups
gemv_fast  qweight int16 [rows / 4, columns], scales and qzeros [8 * width, rows]; qzeros is -scale * zero. Four rows
           share words: see `_interleaved`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import FLOATS, Format, Linear, Tensor, Unfit, kinds, named, plain, scales, unpack
from .plain import Plain

Array = Any
SCALES = FLOATS[:2]
VERSIONS = {"gemm": ("gemm",), "gemv": ("gemv",), "gemv_fast": ("gemv_fast",), "llm-awq": ("gemv", "gemv_fast")}


@dataclass(frozen=True)
class Awq(Format):
    version: str  # of VERSIONS

    def layout(self, linear: Linear) -> dict[str, Tensor | tuple[Tensor, ...]]:
        group, (rows, columns) = self.groups[0] or linear.columns, linear[:2]
        if columns % group or rows % 8 or columns % 8:
            raise Unfit(f"[{rows}, {columns}] does not consist of groups of {group} and of words of 8")
        count, kind = columns // group, self._kind(linear)
        if kind == "gemm":
            layout = {"qweight": Tensor("I32", (columns, rows // 8)), "scales": kinds(SCALES, (count, rows))}
            zeros = Tensor("I32", (count, rows // 8))
        elif kind == "gemv":
            width = _width(count, group)
            layout = {"qweight": Tensor("I32", (rows, columns // 8)), "scales": kinds(SCALES, (rows, 8 * width))}
            zeros = Tensor("I32", (rows, width))
        else:
            if columns % 64:
                raise Unfit(f"{columns} columns are not a multiple of 64, which {self.name} needs")
            shape = 8 * _width(count, group), rows
            layout = {"qweight": Tensor("I16", (rows // 4, columns)), "scales": kinds(SCALES, shape)}
            zeros = kinds(SCALES, shape)
        return layout | ({"qzeros": zeros} if kind == "gemv_fast" or "qzeros" in linear.tensors else {})

    def _kind(self, linear: Linear) -> str:
        """Of the layouts that config.json allows, the one that qweight has."""
        shapes = {"gemm": (linear.columns, linear.rows // 8), "gemv": (linear.rows, linear.columns // 8)}
        shapes["gemv_fast"] = linear.rows // 4, linear.columns
        allowed = VERSIONS[self.version]
        return next((kind for kind in allowed if shapes[kind] == linear.shape("qweight")), allowed[0])

    def read(self, linear: Linear, xp: Any) -> Plain:
        x, group, kind = linear.tensors, self.groups[0] or linear.columns, self._kind(linear)
        count = linear.columns // group
        if kind == "gemm":
            zero = _rows(x["qzeros"], xp) if "qzeros" in x else None
            return plain(4, _rows(x["qweight"], xp), x["scales"].T, zero, group, xp)
        if kind == "gemv":
            zero = unpack(x["qzeros"], 4, xp)[:, :count] if "qzeros" in x else None
            return plain(4, unpack(x["qweight"], 4, xp), x["scales"][:, :count], zero, group, xp)
        return plain(4, _interleaved(x["qweight"], xp), x["scales"][:count].T, _whole(x, count, xp).T, group, xp)


def read_config(raw: dict, name: str) -> Awq:
    """Raises Unfit for what is not implemented."""
    version = str(raw.get("version", raw.get("format", "gemm"))).lower()
    bits, group = raw.get("bits", raw.get("w_bit", 4)), raw.get("group_size", raw.get("q_group_size", 128))
    if version not in VERSIONS:
        raise Unfit(f"version {version!r} of {name} is not supported, only {', '.join(VERSIONS)}")
    if bits != 4:
        raise Unfit(f"{name} of {bits} bits is not supported, only of 4")
    if isinstance(group, bool) or not isinstance(group, int) or group not in (-1, 16, 32, 64, 128, 256):
        raise Unfit(f"group_size {group!r} of {name} is not supported, only {named([16, 32, 64, 128, 256])} or -1")
    return Awq(f"{name} ({version})", (4,), (max(group, 0),), version)


def _width(count: int, group: int) -> int:
    """Words that hold the zeros of a row in gemv."""
    multiple = {64: 2, 32: 4}.get(group, 1)
    return round_up(round_up(count, 8) // 8, multiple)


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _rows(words: Array, xp: Any) -> Array:
    """int32 [n, rows / 8] of gemm -> codes uint8 [rows, n]: nibble 4i + 2j + h of a word is its row 4j + 2h + i.

    Words are transposed, not codes, of which a card would read 32 bytes for each.
    """
    down = xp.ascontiguousarray(words.T)
    nibbles = (4 * (row % 2) + 2 * (row // 4) + row // 2 % 2 for row in range(8))
    return xp.stack([(down >> 4 * i & 15).astype(np.uint8) for i in nibbles], axis=1).reshape(-1, len(words))


def _interleaved(words: Array, xp: Any) -> Array:
    """int16 [rows / 4, columns] -> codes uint8 [rows, columns].

    Of four rows, 64 columns at a time stand one row after the other; number 4i + j of these 256 is nibble j of word i.
    Within a row, 32 columns make 4 runs of 8: run r has columns 2r, 2r + 1 of each 8, the even ones first.
    """
    quarter, columns = words.shape
    x = unpack(words, 4, xp).reshape(quarter, columns // 64, 4, 2, 4, 2, 4)  # [.., row, 32 columns, run, odd, eight]
    x = x.transpose(0, 2, 1, 3, 6, 4, 5)  # [quarter, row, 64 columns, 32 columns, eight, run, odd]
    return xp.ascontiguousarray(x).reshape(4 * quarter, columns)


def _whole(x: dict[str, Array], count: int, xp: Any) -> Array:
    """The zeros of gemv_fast, [groups, rows], of which it keeps -scale * zero. Raises Unfit where they are no whole
    numbers."""
    scale, shift = (scales(x[name][:count], xp)[0] for name in ("scales", "qzeros"))
    zero = xp.rint(-shift / xp.where(scale == 0, np.float32(1), scale))
    again = (-(zero * scale)).astype(x["qzeros"].dtype).astype(xp.float32)
    if not bool((xp.abs(again - shift) <= 2e-3 * xp.abs(shift) + 1e-7).all()) or not bool((abs(zero - 8) <= 8).all()):
        raise Unfit("qzeros are not -scales times whole numbers")
    return zero.astype(np.float32)
