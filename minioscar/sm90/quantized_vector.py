"""Plans and launches of kernels/sm90/quantized_vector.cu: products of few tokens with matrices in 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ops.launch import Card, Launch
from ..quantized import ROWS, RUN, Quantized

Array = Any

MAX_TOKENS, MAX_STAGES, WARPS, TILES, CHUNK = 8, 16, 16, 2, 128  # as the kernel has them
UNIT = 1024  # columns of 16 rows that are copied together
IN_FLIGHT = 4  # units
BARRIER_BYTES = 256


def _unit_bytes(weight: Quantized) -> int:
    """Codes and scales."""
    return ROWS * UNIT + UNIT // weight.group * (4 if weight.kind == "e4m3" else 64)


def _x_bytes(tokens: int, size: int) -> int:
    return -(-tokens * (2 * size + 64) // 128) * 128


def _stages(tokens: int, weight: Quantized, card: Card) -> int:
    sums = 2 * WARPS * TILES * ROWS * tokens * 4
    room = card.max_shared_bytes - BARRIER_BYTES - sums - _x_bytes(tokens, weight.shape[1])
    return min(room // _unit_bytes(weight), MAX_STAGES)


def fits(tokens: int, weight: Quantized, silu: bool, card: Card) -> bool:
    """Whether the kernel takes this many tokens: copies are of whole 16-byte vectors, scales of groups that registers
    allow. 4 bits are faster in quantized/linear.cu."""
    rows, size = weight.shape
    if card.capability != 90 or weight.kind == "int4" or not RUN <= weight.group <= CHUNK:
        return False
    whole = size % (512 if weight.kind == "e4m3" else CHUNK) == 0 and rows % (ROWS * (2 if silu else 1)) == 0
    return whole and 1 <= tokens <= MAX_TOKENS and _stages(tokens, weight, card) >= 2 * TILES


def linear(
    x: Array, weight: Quantized, out: Array, card: Card, *, norm: tuple[Array, float] | None = None,
    bias: Array | None = None, residual: Array | None = None, silu: bool = False,
) -> Launch:
    """`plans.linear` of tokens and matrices that `fits` takes."""
    (tokens, size), (rows, _) = x.shape, weight.shape
    tiles, stages = rows // (ROWS * (2 if silu else 1)), _stages(tokens, weight, card)
    blocks, (weights, eps) = min(tiles, card.multiprocessors), norm or (None, 0.0)
    sizes = tokens, size, rows, *divmod(tiles, blocks), stages, _x_bytes(tokens, size)
    args = (x, weights, *weight.arrays(), bias, residual, out, *map(np.int32, sizes), np.float32(eps))
    kind = f"KIND={weight.kind.upper()}", f"GROUP={weight.group}", f"IN_FLIGHT={IN_FLIGHT}"
    to = f"NORM={norm is not None:d}", f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    threads = (WARPS + 4) * 32
    return Launch("sm90/quantized_vector.cu", "linear", (*kind, *to), (blocks,), threads, args, card.max_shared_bytes)
