"""Pages (kernels/LAYOUT.md) <-> the plain arrays of cache.py, bit for bit, so that a cache saved on one back end
serves on the other.

`pages.unpack` alone knows the layout; the inverse is derived from it, by unpacking pages that number their own bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .. import oscar
from ..oscar import Scheme
from .pages import PAGE_TOKENS, unpack

Array = Any
CODES = ("key_codes", "value_codes")
NAMES = (*CODES, "key_step", "key_min", "value_step", "value_min")


def plain(pages: Array, scheme: Scheme, dim: int, xp: Any = np) -> dict[str, Array]:
    """pages uint8 [kv_heads, n, page_bytes] -> the arrays of `cache.layout` of one row, [kv_heads, tokens or groups,
    ...]."""
    arrays = {name: array for name, array in unpack(pages, scheme, dim, xp).items() if array is not None}
    return arrays | {name: oscar.pack(arrays[name], scheme.bits, xp) for name in CODES}


def pages(row: dict[str, Array], scheme: Scheme, size: int, xp: Any = np) -> Array:
    """The inverse of `plain`; size: bytes of a page."""
    heads, tokens, packed = row["key_codes"].shape
    n, positions = tokens // PAGE_TOKENS, _positions(scheme, packed * 8 // scheme.bits, size)
    # The page as codes; steps and minima are added below
    slots = xp.zeros((heads, n, size * 8 // scheme.bits), np.uint8)
    for name in CODES:
        slots[..., xp.asarray(positions[name])] = oscar.unpack(row[name], scheme.bits, xp).reshape(heads, n, -1)
    page = oscar.pack(slots, scheme.bits, xp)
    halves = page.view(np.uint16)
    for name in row.keys() & set(NAMES) - set(CODES):
        halves[..., xp.asarray(positions[name])] = xp.ascontiguousarray(row[name]).view(np.uint16).reshape(heads, n, -1)
    return page


@cache
def _positions(scheme: Scheme, dim: int, size: int) -> dict[str, np.ndarray]:
    """Name -> position in a page of each number of a plain array, in its order: counted in codes of `bits` bits, or in
    16-bit halves."""
    bit = np.arange(size * 8)
    bits = dict.fromkeys(CODES, 0)
    for power in range((size * 8).bit_length()):  # probes: every bit of a page holds one bit of its own index
        probe = np.packbits(bit >> power & 1, bitorder="little").reshape(1, 1, size)
        answer = unpack(probe, scheme, dim)
        for name in CODES:
            bits[name] = bits[name] + ((answer[name].reshape(-1).astype(np.int64) & 1) << power)
    numbered = np.arange(size // 2, dtype=np.uint16).view(np.uint8).reshape(1, 1, size)
    answer = unpack(numbered, scheme, dim)
    halves = {name: array for name, array in answer.items() if name not in CODES and array is not None}
    return {name: position // scheme.bits for name, position in bits.items()} | {
        name: np.ascontiguousarray(array).view(np.uint16).reshape(-1).astype(np.int64) for name, array in halves.items()
    }
