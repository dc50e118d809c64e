"""The packed layout of kernels/LAYOUT.md in array code: where each number of 64 tokens lies in a page.

One table, `positions`, serves both directions: whatever reads or writes pages outside the kernels goes through
`from_pages` and `to_pages`, so a cache saved on one back end serves on the other, bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .. import oscar
from ..oscar import Scheme

Array = Any
PAGE_TOKENS = 64
CODES = ("key_codes", "value_codes")
NAMES = (*CODES, "key_step", "key_min", "value_step", "value_min")


def from_pages(pages: Array, scheme: Scheme, dim: int, xp: Any = np) -> dict[str, Array]:
    """pages uint8 [kv_heads, n, page_bytes] -> the arrays of `Scheme.packed_layout`, each with kv heads in front."""
    pages, heads, arrays = xp.ascontiguousarray(pages), len(pages), {}
    codes, halves = oscar.unpack(pages, scheme.bits, xp), pages.view(np.float16)
    for name, table in positions(scheme, dim).items():
        array = (codes if name in CODES else halves)[..., xp.asarray(table)].reshape(heads, -1, table.shape[1])
        arrays[name] = oscar.pack(array, scheme.bits, xp) if name in CODES else array
    return arrays


def to_pages(arrays: dict[str, Array], scheme: Scheme, xp: Any = np) -> Array:
    """The inverse of `from_pages`."""
    heads, tokens, packed = arrays["key_codes"].shape
    dim, n = packed * 8 // scheme.bits, tokens // PAGE_TOKENS
    table = positions(scheme, dim)
    codes = xp.zeros((heads, n, page_bytes(scheme, dim) * 8 // scheme.bits), np.uint8)
    for name in CODES:
        x = oscar.unpack(arrays[name], scheme.bits, xp)
        codes[..., xp.asarray(table[name])] = x.reshape(heads, n, PAGE_TOKENS, dim)
    pages = oscar.pack(codes, scheme.bits, xp)
    for name in table.keys() - set(CODES):
        x = xp.ascontiguousarray(arrays[name])
        pages.view(np.float16)[..., xp.asarray(table[name])] = x.reshape(heads, n, *table[name].shape)
    return pages


def page_bytes(scheme: Scheme, head_dim: int) -> int:
    """Bytes of 64 tokens of one kv head, keys and values."""
    return sum(_section_bytes(scheme, head_dim).values())


def _section_bytes(scheme: Scheme, dim: int) -> dict[str, int]:
    """The sections of a page, in their order."""
    codes, values = PAGE_TOKENS * dim * scheme.bits // 8, 2 * PAGE_TOKENS * dim // scheme.value_group(dim)
    keys = 2 * PAGE_TOKENS // scheme.group * dim
    sections = {"key_codes": codes, "key_step": keys, "key_min": keys, "value_codes": codes, "value_step": values}
    return sections if scheme.symmetric_values else {**sections, "value_min": values}


@cache
def positions(scheme: Scheme, dim: int) -> dict[str, np.ndarray]:
    """Name -> index in a page of each number of its array, [tokens or groups, ...], among codes or 16-bit numbers."""
    groups, value_groups = PAGE_TOKENS // scheme.group, dim // scheme.value_group(dim)
    keys, values = np.arange(groups * dim), np.arange(PAGE_TOKENS * value_groups)
    tables = dict(zip(CODES, _code_positions(scheme.bits, dim), strict=True))
    # [chunk of 32 channels][group][quarter][8 channels]
    tables["key_step"] = keys.reshape(dim // 32, groups, 4, 8).swapaxes(0, 1).reshape(groups, dim)
    if groups == 2:  # [chunk][half of 16 channels][quarter][pair][group][2 channels]
        order = keys.reshape(dim // 32, 2, 4, 2, 2, 2).transpose(4, 0, 2, 1, 3, 5)
    else:  # [chunk][quarter][pair][half][2 channels]
        order = keys.reshape(dim // 32, 4, 2, 2, 2).transpose(0, 1, 3, 2, 4)
    tables["key_min"] = order.reshape(groups, dim)
    even_first = np.argsort(np.r_[0:value_groups:2, 1:value_groups:2])  # even groups come first
    # [row / 16][row % 8 / 2][group][row / 8 % 2][row % 2]
    order = values.reshape(4, 4, value_groups, 2, 2)[:, :, even_first].transpose(0, 3, 1, 4, 2)
    tables["value_step"] = tables["value_min"] = order.reshape(PAGE_TOKENS, value_groups)[_rows()]
    begin, in_page = 0, {}
    for name, size in _section_bytes(scheme, dim).items():
        in_page[name] = tables[name] + (begin * 8 // scheme.bits if name in CODES else begin // 2)
        begin += size
    return in_page


def _rows() -> np.ndarray:
    """Row of each token of a page in its four token tiles, as 16 * tile + row; int64 [64]."""
    t = np.arange(PAGE_TOKENS)
    return 16 * (t // 32 * 2 + t % 4 // 2) + 8 * (t % 2) + t % 32 // 4


def _code_positions(bits: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the codes of keys and of values, each in its section: [64 tokens, dim]."""

    def position(tile: np.ndarray, lane: np.ndarray, word: np.ndarray, half: np.ndarray) -> np.ndarray:
        """Of a code in its MMA tile, lane, word 0 ... 3 of the lane's 16 bytes, half of the word."""
        tiles = 16 // bits  # in one 16-byte load a lane
        return (((tile // tiles * 32 + lane) * 4 + word) * 2 + half) * tiles + tile % tiles

    t, channel = np.meshgrid(_rows(), np.arange(dim), indexing="ij")  # t is a row
    chunk, c, k = channel // 32, channel % 32 // 8, channel % 8
    # Keys: tile (row / 16, 16 channels = half k / 4 of chunk), lane (row % 8, c), word (k half k / 2 % 2, row half)
    keys = position((2 * chunk + k // 4) * 4 + t // 16, t % 8 * 4 + c, k // 2 % 2 * 2 + t // 8 % 2, k % 2)
    # Values: tile (row / 16, channel tile), whose rows are channels 8 (row / 2 % 4) + 4 (tile % 2) + 2 (row / 8) +
    # row % 2 of the chunk
    row = 8 * (k // 2 % 2) + 2 * c + k % 2
    tile, lane = t // 16 * (dim // 16) + 2 * chunk + k // 4, row % 8 * 4 + t % 8 // 2
    return keys, position(tile, lane, t // 8 % 2 * 2 + row // 8, t % 2)
