"""Q4 and Q8: quantized matrices as the kernels read them, every load of a warp a run of neighbouring bytes.

    W[n, k] = (value(code[n, k]) - zero[n, g]) * scale[n, g] * row_scale[n]        g: the group of k

A matrix is padded with codes 0 to tiles of 16 rows and runs of 64 columns. Lane 4r + c of a warp multiplies rows 2r
and 2r + 1 of a tile and, of every 32 columns, 8c ... 8c + 7: two steps s of mma.m16n8k16, whose registers a0 ... a3
hold row 2r + i, columns 8c + 4s + 2p + {0, 1}, as a(2p + i). The same order of columns makes a lane's share of x 16
neighbouring bytes.

Q4  codes uint32 [tiles][runs][32 lanes][4]: the word of step s of half h of a run is number 2h + s; nibble a of its low
    (high) half is the first (second) number of register a.
Q8  codes uint32 [tiles][runs][2][32 lanes][4]: the word of registers 2p and 2p + 1 of step s is number 2s + p; a 16-bit
    half has two codes. int8: the low byte is register 2p's. e4m3: bits 15, 10 ... 4 are register 2p's code, bits 11,
    14 ... 12, 3 ... 0 register 2p + 1's, so that a mask, or a shift and a mask, gives a BF16 number, value * 2^-120.
scales  int4, int8: uint32 [tiles][groups][16], the float16 scale in the low half, the float16 zero in the high one.
    e4m3: float32 [tiles][groups], of all 16 rows. row_scale: float32 [tiles * 16].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..formats.plain import E4M3, Plain

Array = Any
Repack = Callable[[Plain], Array]  # codes -> words, on a card
ROWS, RUN = 16, 64  # of a tile; columns that a tile has in one place


@dataclass(frozen=True)
class Quantized:
    kind: str  # of plain.BITS
    shape: tuple[int, int]
    group: int  # columns: a power of two, at least 32, or all of them
    codes: Array = None  # None: a form alone, for plans
    scales: Array = None
    row_scale: Array = None
    split: str | None = None  # of a matrix of several cards, whose arrays are `Ranks`: as those have it (parallel/)

    word_axes: ClassVar[tuple[int, ...]]  # of (tile, r, i, run, h, c, s, p, e): their order in memory

    @classmethod
    def from_plain(cls, plain: Plain, xp: Any = np, repack: Repack | None = None) -> Quantized:
        """Equal to plain.dequantize bit for bit where each scale has at most 11 significant bits, as those in float16
        and bfloat16 have, or stands for a whole row; zeros are rounded to float16.

        Raises ValueError for groups that are no power of two from 32 on, for codes of e4m3 that are no numbers, and
        for groups of e4m3 whose scales differ within 16 rows. repack: what puts codes into their order, in place of
        array code.
        """
        (rows, columns), group, groups = plain.shape, plain.group, plain.scale.shape[1]
        if groups > 1 and not has_form(group):
            raise ValueError(f"groups of {group} columns are neither a power of two from 32 on nor whole rows")
        padding = (0, -rows % ROWS), (0, -columns % RUN)
        scale = xp.pad(plain.scale, (padding[0], (0, 0)), mode="edge")
        if plain.kind == "e4m3":
            if bool((plain.codes & 0x7F == 0x7F).any()):
                raise ValueError("codes of e4m3 that are no numbers")
            scales, row_scale = _e4m3_scales(scale, xp)
        else:
            scales, row_scale = _scale_and_zero(scale, xp.pad(plain.zero, (padding[0], (0, 0))), xp)
        if repack is not None:
            words = repack(plain)
        else:
            codes = xp.pad(plain.codes, padding) if any(map(any, padding)) else plain.codes
            axes = codes.reshape(-1, 8, 2, codes.shape[1] // RUN, 2, 4, 2, 2, 2).transpose(cls.word_axes)
            words = _e4m3_words(axes) if plain.kind == "e4m3" else cls._words(axes)
        return cls(plain.kind, plain.shape, columns if groups == 1 else group, words, scales, row_scale)

    @staticmethod
    def _words(axes: Array) -> Array:
        """uint32 [..., 4] of codes in the order of memory."""
        raise NotImplementedError

    def _codes(self, xp: Any) -> Array:
        """uint8, the codes in the order of memory, in the shape of `word_axes`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> tuple[Array, Array, Array]:
        return self.codes, self.scales, self.row_scale

    def map(self, change: Callable[[Array], Array]) -> Quantized:
        """The same of other arrays: copies, or on another device."""
        return replace(self, codes=change(self.codes), scales=change(self.scales), row_scale=change(self.row_scale))

    def rows(self, first: int, last: int) -> Quantized:
        """Rows first ... last - 1, both multiples of 16: views."""
        tiles, of_rows = slice(first // ROWS, last // ROWS), slice(first, last)
        arrays = {"codes": self.codes[tiles], "scales": self.scales[tiles], "row_scale": self.row_scale[of_rows]}
        return replace(self, shape=(last - first, self.shape[1]), **arrays)

    def dequantize(self, xp: Any = np) -> Array:
        """float32 [rows, columns]. xp: of the arrays."""
        (rows, columns), tiles, runs = self.shape, *self.codes.shape[:2]
        sizes = tiles, 8, 2, runs, 2, 4, 2, 2, 2
        axes = self._codes(xp).reshape([sizes[axis] for axis in self.word_axes])
        codes = axes.transpose(np.argsort(self.word_axes).tolist()).reshape(tiles * ROWS, runs * RUN)[:rows, :columns]
        row_scale = self.row_scale[:rows, None]
        if self.kind == "e4m3":
            return xp.asarray(E4M3)[codes] * self._spread(self.scales[:, :, None]) * row_scale
        scale, zero = (half.view(np.float16).astype(np.float32) for half in _halves(self.scales))
        return (codes.astype(np.float32) - self._spread(zero)) * self._spread(scale) * row_scale

    def _spread(self, x: Array) -> Array:
        """[tiles, groups, 16 or 1] -> [rows, columns]."""
        by_row = x.swapaxes(1, 2).repeat(ROWS // x.shape[2], axis=1).reshape(-1, x.shape[1])[: self.shape[0]]
        return by_row.repeat(self.group, axis=1)[:, : self.shape[1]]


class Q4(Quantized):
    word_axes = 0, 3, 1, 5, 4, 6, 8, 7, 2  # tile, run, lane (r, c), word (h, s), nibble (e, p, i)

    @staticmethod
    def _words(axes: Array) -> Array:
        pairs = axes.reshape(*axes.shape[:6], 4, 2)
        octets = pairs[..., 0] | pairs[..., 1] << 4
        return octets.ravel().view(np.uint32).reshape(*axes.shape[:2], 32, 4)

    def _codes(self, xp: Any) -> Array:
        octets = self.codes.view(np.uint8)
        return xp.stack([octets & 15, octets >> 4], axis=-1)


class Q8(Quantized):
    word_axes = 0, 3, 4, 1, 5, 6, 7, 8, 2  # tile, run, h, lane (r, c), word (s, p), half e, byte i

    @staticmethod
    def _words(axes: Array) -> Array:
        return axes.ravel().view(np.uint32).reshape(*axes.shape[:3], 32, 4)

    def _codes(self, xp: Any) -> Array:
        if self.kind == "int8":
            return self.codes.view(np.uint8)
        halves = self.codes.view(np.uint16)
        first = halves >> 8 & 0x80 | halves >> 4 & 0x7F
        second = halves >> 4 & 0x80 | halves >> 8 & 0x70 | halves & 0xF
        return xp.stack([first, second], axis=-1).astype(np.uint8)


def has_form(group: int) -> bool:
    """Whether kernels read groups of so many columns, of which a row has several."""
    return group >= 32 and group & group - 1 == 0


def mapped(x: Any, change: Callable[[Array], Array]) -> Any:
    """`change` of an array, of those of a quantized matrix, or of None: nothing."""
    return x if x is None else x.map(change) if isinstance(x, Quantized) else change(x)


def of_expert(weight: Array | Quantized, expert: int, count: int) -> Array | Quantized:
    """The matrix of one of `count` experts: of an array [experts, out, in], or quantized of [experts * out, in]."""
    if not isinstance(weight, Quantized):
        return weight[expert]
    rows = weight.shape[0] // count
    return weight.rows(expert * rows, (expert + 1) * rows)


def from_plain(plain: Plain, xp: Any = np, repack: Repack | None = None) -> Quantized:
    """The internal form of a matrix; as `Quantized.from_plain`."""
    return (Q4 if plain.kind == "int4" else Q8).from_plain(plain, xp, repack)


def _halves(words: Array) -> tuple[Array, Array]:
    return (words & 0xFFFF).astype(np.uint16), (words >> 16).astype(np.uint16)


def _scale_and_zero(scale: Array, zero: Array, xp: Any) -> tuple[Array, Array]:
    """[rows, groups] -> words, row scales: the scale of a row that has one group, else a power of two, which takes the
    row's largest scale into float16's highest binade but one."""
    if scale.shape[1] == 1:
        row_scale, scale = scale[:, 0], xp.ones_like(scale)
    else:
        largest = abs(scale).max(axis=1)
        row_scale = xp.ldexp(xp.ones_like(largest), xp.frexp(largest)[1] - 15)
        scale = scale / row_scale[:, None]
    halves = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (scale, zero))
    words = next(halves) | next(halves) << 16  # [rows, groups]
    return _of_tiles(words, xp), xp.ascontiguousarray(row_scale)


def _of_tiles(x: Array, xp: Any) -> Array:
    """[rows, groups] -> [tiles, groups, 16]."""
    return xp.ascontiguousarray(x.reshape(-1, ROWS, x.shape[1]).swapaxes(1, 2))


def _e4m3_words(axes: Array) -> Array:
    first, second = axes[..., 0].astype(np.uint16), axes[..., 1].astype(np.uint16)
    halves = (first & 0x80) << 8 | (first & 0x7F) << 4 | (second & 0x80) << 4 | (second & 0x70) << 8 | second & 0xF
    return halves.ravel().view(np.uint32).reshape(*axes.shape[:3], 32, 4)


def _e4m3_scales(scale: Array, xp: Any) -> tuple[Array, Array]:
    """[rows, groups] -> those of tiles, and of rows: one or the other is 1."""
    ones = xp.ones((len(scale), 1), np.float32)
    if scale.shape[1] == 1:
        return ones[::ROWS], xp.ascontiguousarray(scale[:, 0])
    tiles = _of_tiles(scale, xp)
    if bool((tiles != tiles[:, :, :1]).any()):
        raise ValueError("groups of e4m3 whose scales differ within 16 rows")
    return xp.ascontiguousarray(tiles[:, :, 0]), ones[:, 0]
