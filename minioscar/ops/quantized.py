"""Plans and launches of products with quantized matrices (minioscar/quantized.py): kernels/quantized/."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..quantized import ROWS, RUN, Quantized
from .launch import Card, Launch

Array = Any

LINEAR_TOKENS = 8  # of quantized/linear.cu: the columns of an MMA
WARPS = 8  # of a multiprocessor, of one block or two
MOST_COLUMNS = 128  # whose sum is scaled at once
ONE_GROUP = 31  # the shift of a column to its group where a row has one


def split(weight: Quantized) -> tuple[int, int]:
    """Warps of a block, which split k, and runs of 64 columns that each has in a round: as many as fit into registers
    and have codes to load in most rounds. Kind, group and columns alone decide, since it is the order of sums."""
    runs, most = -(-weight.shape[1] // RUN), 4 if weight.kind == "int8" else 8

    def used(choice: tuple[int, int]) -> float:
        return runs / (-(-runs // math.prod(choice)) * math.prod(choice))

    if weight.kind == "int4" and weight.group >= MOST_COLUMNS and used((WARPS, 12)) > 0.9:
        return WARPS, 12
    return next((c for c in ((WARPS, most), (WARPS // 2, most)) if used(c) >= 0.6), (WARPS // 2, 4))


def row_tiles(weight: Quantized, norm: bool, silu: bool, card: Card) -> int:
    """Tiles of 16 rows of a pass: of those whose codes and sums fit into registers the number that leaves the fewest
    multiprocessors idle; where several do, the largest, which loads x least often."""
    (warps, runs), columns = split(weight), min(weight.group, MOST_COLUMNS)
    older, is_int4 = card.capability < 100, weight.kind == "int4"  # the compiler takes more registers for newer ones
    most = 1 if silu or is_int4 and (columns == 32 or runs == 12 and not older) else 2
    if not silu and is_int4 and columns == MOST_COLUMNS and runs < 12 and older:
        most = 3
    tiles, slots = -(-weight.shape[0] // (ROWS * (2 if silu else 1))), card.multiprocessors * (WARPS // warps)

    def used(n: int) -> float:
        passes = -(-tiles // n)
        return tiles / (-(-passes // slots) * slots * n)

    return max(range(1, most + 1), key=lambda n: (round(used(n), 2), n))


def _shared_bytes(tokens: int, weight: Quantized, norm: bool, silu: bool, card: Card) -> int:
    tiles = row_tiles(weight, norm, silu, card) * (2 if silu else 1)
    size = weight.shape[1]
    sums = 2 * tiles * split(weight)[0] * ROWS * LINEAR_TOKENS * 4
    return sums + tokens * (-(-size // 64) * 128 + 64)


def fits(tokens: int, weight: Quantized, norm: bool, silu: bool, card: Card) -> bool:
    """Whether quantized/linear.cu takes this many tokens; normed, they stay in shared memory."""
    rows, size = weight.shape
    shared = _shared_bytes(tokens, weight, norm, silu, card)
    return 1 <= tokens <= LINEAR_TOKENS and has_kernels(weight, silu) and shared <= card.max_shared_bytes


def has_kernels(weight: Quantized, silu: bool) -> bool:
    """Whether tiles of 16 rows are of gate or of up alone, and rows of x consist of 16-byte vectors."""
    return weight.shape[1] % 8 == 0 and not (silu and weight.shape[0] % (2 * ROWS))


def linear(
    x: Array, weight: Quantized, out: Array, card: Card, *, norm: tuple[Array, float] | None = None,
    bias: Array | None = None, residual: Array | None = None, silu: bool = False,
) -> Launch:
    """`Reference.linear` of x [tokens, in], bf16, at most LINEAR_TOKENS of them; out bf16 or float32.

    Raises ValueError where `fits` says no.
    """
    (tokens, size), rows, normed = x.shape, weight.shape[0], norm is not None
    if not fits(tokens, weight, normed, silu, card):
        where = f"a card of capability {card.capability / 10}"
        raise ValueError(f"{tokens} tokens of {size} numbers do not fit quantized/linear.cu on {where}")
    (warps, runs), tiles = split(weight), row_tiles(weight, normed, silu, card)
    shared = _shared_bytes(tokens, weight, normed, silu, card)
    resident = min(WARPS // warps, card.max_shared_bytes // (shared + 1024) or 1)  # blocks a multiprocessor
    blocks = min(-(-rows // (ROWS * tiles * (2 if silu else 1))), card.multiprocessors * resident)
    weights, eps = norm or (None, 0.0)
    numbers = *map(np.int32, (tokens, size, rows, shift(weight))), np.float32(eps)
    args = (x, weights, *weight.arrays(), bias, residual, out, *numbers)
    shape = f"BLOCK_WARPS={warps}", f"NORM={normed:d}", f"ROW_TILES={tiles}", f"RUNS={runs}", *_defines(weight)
    defines = *shape, f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    return Launch("quantized/linear.cu", "linear", defines, (blocks,), 32 * warps, args, shared)


def dequantize(weight: Quantized, out: Array) -> Launch:
    """`weight.dequantize()` in out [rows, columns], bf16, columns a multiple of 8."""
    rows, columns = weight.shape
    grid = -(-columns // (8 * RUN)), -(-rows // ROWS)
    args = (*weight.arrays(), out, *map(np.int32, (rows, columns, shift(weight))))
    return Launch("quantized/dequantize.cu", "dequantize", (_defines(weight)[0],), grid, 256, args)


def shift(weight: Quantized) -> int:
    """Of a column to its group."""
    return ONE_GROUP if weight.group >= weight.shape[1] else weight.group.bit_length() - 1


def _defines(weight: Quantized) -> tuple[str, str]:
    return f"KIND={weight.kind.upper()}", f"GROUP={min(1 << shift(weight), MOST_COLUMNS)}"
