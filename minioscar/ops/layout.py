"""The packed layout of kernels/LAYOUT.md in array code: bytes of a page -> codes, steps and minima.

Whatever reads pages outside the kernels (a saved cache, a test) goes through here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .. import oscar
from ..oscar import Scheme

Array = Any
PAGE_TOKENS = 64


def rows() -> np.ndarray:
    """Row of each token of a page in its four token tiles, as 16 * tile + row; int64 [64]."""
    t = np.arange(PAGE_TOKENS)
    return 16 * (t // 32 * 2 + t % 4 // 2) + 8 * (t % 2) + t % 32 // 4


@cache
def code_bits(bits: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """32-bit word and lowest bit of every code of a page, each [64 tokens, dim]: of keys, then of values."""
    t, ch = np.meshgrid(rows(), np.arange(dim), indexing="ij")
    chunk, c, k = ch // 32, ch % 32 // 8, ch % 8
    # t is a row. Keys: tile (row / 16, 16 channels = half k/4 of chunk), lane (row % 8, c), word (k half k/2%2, row
    # half)
    key = _bit(bits, (2 * chunk + k // 4) * 4 + t // 16, t % 8 * 4 + c, k // 2 % 2 * 2 + t // 8 % 2, k % 2)
    # Values: tile (row / 16, channel tile), whose rows are channels 8(row/2%4) + 4(tile%2) + 2(row/8) + row%2 of the
    # chunk
    row = 8 * (k // 2 % 2) + 2 * c + k % 2
    tile, lane = t // 16 * (dim // 16) + 2 * chunk + k // 4, row % 8 * 4 + t % 8 // 2
    value = _bit(bits, tile, lane, t // 8 % 2 * 2 + row // 8, t % 2)
    return *key, *value


def _bit(
    bits: int, tile: np.ndarray, lane: np.ndarray, word: np.ndarray, half: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Word and bit of a code: its MMA tile, lane, word 0..3 of the lane's 16 bytes, half of the word."""
    tiles = 16 // bits  # in one 16-byte load a lane
    return (tile // tiles * 32 + lane) * 4 + word, (16 * half + tile % tiles * bits).astype(np.uint32)


def unpack(pages: Array, scheme: Scheme, dim: int, xp: Any = np) -> dict[str, Array | None]:
    """pages uint8 [kv_heads, n, page_bytes] -> the arrays of `oscar.quantize_keys` and `quantize_values` for n * 64
    tokens.

    key_codes, value_codes [kv_heads, tokens, dim]; key_step, key_min [kv_heads, tokens/group, dim]; value_step,
    value_min [kv_heads, tokens, dim/group], value_min None where values are symmetric.
    """
    heads, n, _ = pages.shape
    groups, value_groups = PAGE_TOKENS // scheme.group, dim // scheme.value_group(dim)
    codes = PAGE_TOKENS * dim * scheme.bits // 8
    sizes = {"key_codes": codes, "key_step": 2 * groups * dim, "key_min": 2 * groups * dim}
    sizes |= {"value_codes": codes, "value_step": 2 * PAGE_TOKENS * value_groups}
    sizes |= {} if scheme.symmetric_values else {"value_min": sizes["value_step"]}
    raw, at = {}, 0
    for name, size in sizes.items():
        raw[name] = xp.ascontiguousarray(pages[..., at : at + size])
        at += size
    arrays: dict[str, Array | None] = {"value_min": None}
    words, bits = {}, {}
    words["key"], bits["key"], words["value"], bits["value"] = map(xp.asarray, code_bits(scheme.bits, dim))
    for kind in ("key", "value"):
        codes = raw[f"{kind}_codes"].view(np.uint32)[..., words[kind]] >> bits[kind]
        arrays[f"{kind}_codes"] = (codes & np.uint32(2**scheme.bits - 1)).astype(np.uint8).reshape(heads, -1, dim)
    # [chunk of 32 channels][group][quarter][8 channels]
    x = raw["key_step"].view(np.float16).reshape(heads, n, dim // 32, groups, 4, 8)
    arrays["key_step"] = x.swapaxes(2, 3).reshape(heads, n * groups, dim)
    x = raw["key_min"].view(np.float16)
    if groups == 2:  # [chunk][half of 16 channels][quarter][pair][group][2 channels]
        x = x.reshape(heads, n, dim // 32, 2, 4, 2, 2, 2).transpose(0, 1, 6, 2, 4, 3, 5, 7)
    else:  # [chunk][quarter][pair][half][2 channels]
        x = x.reshape(heads, n, dim // 32, 4, 2, 2, 2).transpose(0, 1, 2, 3, 5, 4, 6)
    arrays["key_min"] = x.reshape(heads, n * groups, dim)
    order = xp.asarray(np.argsort(np.r_[0:value_groups:2, 1:value_groups:2]))  # even groups come first
    for name in ("value_step", "value_min"):  # [row/16][row%8/2][group][row/8%2][row%2]
        if name in raw:
            x = raw[name].view(np.float16).reshape(heads, n, 4, 4, value_groups, 2, 2)[:, :, :, :, order]
            x = x.transpose(0, 1, 2, 5, 3, 6, 4).reshape(heads, n, PAGE_TOKENS, value_groups)
            arrays[name] = x[:, :, xp.asarray(rows())].reshape(heads, n * PAGE_TOKENS, value_groups)
    return arrays


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
