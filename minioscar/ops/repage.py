"""Pages (kernels/LAYOUT.md) <-> the plain arrays of cache.py, bit for bit, so that a cache saved on one back end serves on the other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .. import oscar
from ..oscar import Scheme
from .pages import PAGE_TOKENS, code_places, unpack

Array = Any
NAMES = ("key_codes", "key_step", "key_min", "value_codes", "value_step", "value_min")


def plain(pages: Array, scheme: Scheme, dim: int, xp: Any = np) -> dict[str, Array]:
    """pages uint8 [kv_heads, n, page_bytes] -> the arrays of `cache.layout` of one row, [kv_heads, tokens or groups, ...]."""
    found = {name: array for name, array in unpack(pages, scheme, dim, xp).items() if array is not None}
    return found | {name: oscar.pack(found[name], scheme.bits, xp) for name in ("key_codes", "value_codes")}


def pages(row: dict[str, Array], scheme: Scheme, xp: Any = np) -> Array:
    """The inverse of `plain`."""
    heads, tokens, packed = row["key_codes"].shape
    dim, n = packed * 8 // scheme.bits, tokens // PAGE_TOKENS
    groups, value_groups = PAGE_TOKENS // scheme.group, dim // scheme.value_group(dim)
    parts = {}
    for kind, order in zip(("key", "value"), map(xp.asarray, _order(scheme.bits, dim)), strict=True):
        codes = oscar.unpack(row[f"{kind}_codes"], scheme.bits, xp).reshape(heads, n, -1)[..., order]  # [heads, n, words, codes]
        shifts = xp.arange(codes.shape[-1], dtype=np.uint32) * np.uint32(scheme.bits)
        words = (codes.astype(np.uint32) << shifts).sum(axis=-1, dtype=np.uint32)
        parts[f"{kind}_codes"] = _bytes(words, heads, n, xp)
    for name in ("key_step", "key_min"):  # [chunk of 32 channels][quarter][half][group][4 channels]
        x = row[name].reshape(heads, n, groups, dim // 32, 4, 2, 4)
        parts[name] = _bytes(xp.moveaxis(x, 2, 5), heads, n, xp)
    for name in ("value_step", "value_min"):  # [token/16][token%8/2][group][token/8%2][token%2]
        if name in row:
            x = row[name].reshape(heads, n, 4, 2, 4, 2, value_groups)
            parts[name] = _bytes(x.transpose(0, 1, 2, 4, 6, 3, 5), heads, n, xp)
    return xp.concatenate([parts[name] for name in NAMES if name in parts], axis=-1)


def _bytes(x: Array, heads: int, n: int, xp: Any) -> Array:
    return xp.ascontiguousarray(x).reshape(heads, n, -1).view(np.uint8)


@cache
def _order(bits: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Of keys and of values: which code of a page, token * dim + channel, stands in each place of each word; [words, codes a word]."""
    found = []
    places = code_places(bits, dim)
    for word, bit in (places[:2], places[2:]):
        by_place = np.lexsort((bit.ravel(), word.ravel()))
        found.append(by_place.reshape(-1, 32 // bits))
    return found[0], found[1]
