"""Pages (kernels/LAYOUT.md) <-> the plain arrays of cache.py, bit for bit, so that a cache saved on one back end serves on the other.

`pages.unpack` alone knows the layout; the way back is learned by asking it where everything of a page comes from.
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
    """pages uint8 [kv_heads, n, page_bytes] -> the arrays of `cache.layout` of one row, [kv_heads, tokens or groups, ...]."""
    found = {name: array for name, array in unpack(pages, scheme, dim, xp).items() if array is not None}
    return found | {name: oscar.pack(found[name], scheme.bits, xp) for name in CODES}


def pages(row: dict[str, Array], scheme: Scheme, size: int, xp: Any = np) -> Array:
    """The inverse of `plain`; size: bytes of a page."""
    heads, tokens, packed = row["key_codes"].shape
    n, places = tokens // PAGE_TOKENS, _places(scheme, packed * 8 // scheme.bits, size)
    slots = xp.zeros((heads, n, size * 8 // scheme.bits), np.uint8)  # a page is so many codes; steps and minima come on top
    for name in CODES:
        slots[..., xp.asarray(places[name])] = oscar.unpack(row[name], scheme.bits, xp).reshape(heads, n, -1)
    page = oscar.pack(slots, scheme.bits, xp)
    halves = page.view(np.uint16)
    for name in row.keys() & set(NAMES) - set(CODES):
        halves[..., xp.asarray(places[name])] = xp.ascontiguousarray(row[name]).view(np.uint16).reshape(heads, n, -1)
    return page


@cache
def _places(scheme: Scheme, dim: int, size: int) -> dict[str, np.ndarray]:
    """Of every number of a page, in the order of its plain array: the code (of `bits` bits) or the 16-bit half that it is."""
    bit = np.arange(size * 8)
    found = dict.fromkeys(CODES, 0)
    for power in range((size * 8).bit_length()):  # pages in which each bit says one bit of its own number
        probe = np.packbits(bit >> power & 1, bitorder="little").reshape(1, 1, size)
        answer = unpack(probe, scheme, dim)
        for name in CODES:
            found[name] = found[name] + ((answer[name].reshape(-1).astype(np.int64) & 1) << power)
    numbered = np.arange(size // 2, dtype=np.uint16).view(np.uint8).reshape(1, 1, size)
    halves = {name: array for name, array in unpack(numbered, scheme, dim).items() if name not in CODES and array is not None}
    return {name: place // scheme.bits for name, place in found.items()} | {
        name: np.ascontiguousarray(array).view(np.uint16).reshape(-1).astype(np.int64) for name, array in halves.items()
    }
