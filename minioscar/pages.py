"""The packed layout of kernels/LAYOUT.md: which schemes have it, and where each number of 64 tokens lies in a page.

One table, `positions`, serves both directions: whatever reads or writes pages outside the kernels goes through
`from_pages` and `to_pages`, so a cache saved on one back end serves on the other, bit for bit. A page's bytes are those
of `Scheme.packed_layout` in another order.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from . import oscar
from .config import Config
from .errors import UserError
from .hadamard import hadamard
from .layer_cache import BLOCK_TOKENS, PackedCache
from .oscar import Scheme

Array = Any
HEAD_DIMS = (64, 128, 256)
PAGE_TOKENS = 64
CODES = ("key_codes", "value_codes")
NAMES = (*CODES, "key_step", "key_min", "value_step", "value_min")


def check_scheme(config: Config, scheme: Scheme) -> None:
    """Raises UserError where the model's head_dim does not fit the scheme's groups or has no Hadamard matrix."""
    if scheme.quantized and config.head_dim % 16:
        raise UserError(
            f"head_dim {config.head_dim} is not a multiple of 16, so --kv {scheme.name} has no groups for it; use "
            "--kv bf16"
        )
    if scheme.rotate:
        try:
            hadamard(config.head_dim)
        except ValueError as error:
            raise UserError(f"--kv {scheme.name}: {error}; use --kv bf16 or kivi") from None


def unsupported(scheme: Scheme, head_dim: int) -> str | None:
    """Why there are no kernels for this cache, or None."""
    if type(scheme) is not Scheme:
        return f"{scheme.name}: pack.cu does not know how to choose its codes"
    if scheme.quantized and scheme.key_axis != "token":
        return f"{scheme.name}: key groups run along the channels of a token; the packed layout wants them along tokens"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if not scheme.quantized:
        return None
    bits, value_group = {scheme.key_bits, scheme.value_bits}, scheme.value_group(head_dim)
    if not bits <= {2, 3, 4} or scheme.group not in (32, 64, 128) or value_group not in (32, 64):
        keys = f"keys in {scheme.key_bits} bits and groups of {scheme.group}"
        values = f"values in {scheme.value_bits} bits and groups of {value_group}"
        return f"{scheme.name}: {keys}, {values}, have no packed layout"
    if scheme.flush % PAGE_TOKENS or scheme.sinks > scheme.flush:
        window = f"a window that packs {scheme.flush} tokens at a time"
        return f"{scheme.name}: {window} needs pages of less than {PAGE_TOKENS} or first tokens (sinks) in two of them"
    return None


def layout_defines(scheme: Scheme, head_dim: int) -> tuple[str, ...]:
    """Macros of layout.cuh. Raises ValueError where `unsupported` has a reason."""
    if reason := unsupported(scheme, head_dim):
        raise ValueError(reason)
    group = scheme.value_group(head_dim)
    keys = f"KEY_BITS={scheme.key_bits}", f"KEY_GROUP={scheme.group}", f"SCALED={scheme.scale:d}"
    values = f"VALUE_BITS={scheme.value_bits}", f"VALUE_GROUP={group}", f"SYMMETRIC={scheme.symmetric_values:d}"
    return f"HEAD_DIM={head_dim}", *keys, *values, f"FLUSH={scheme.flush}", f"KEEP={scheme.keep}"


def page_bytes(scheme: Scheme, head_dim: int) -> int:
    """Bytes of 64 tokens of one kv head, keys and values; half of what two pages share is in it."""
    both = scheme.packed_layout(2 * PAGE_TOKENS, head_dim).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in both) // 2


def from_pages(pages: Array, scheme: Scheme, dim: int, xp: Any = np) -> dict[str, Array]:
    """pages uint8 [kv_heads, n, page_bytes] -> the arrays of `Scheme.packed_layout`, each with kv heads in front."""
    heads, tables, found, begin = len(pages), positions(scheme, dim), {}, 0
    blocks = pages.reshape(heads, -1, page_bytes(scheme, dim) * _pages_of_block(scheme))
    for name, size in _sections(scheme, dim):
        section, bits = xp.ascontiguousarray(blocks[..., begin : begin + size]), _code_bits(scheme, name)
        numbers = _codes(section, bits, xp) if bits else section.view(np.float16)
        found.setdefault(name, []).append(numbers[..., xp.asarray(tables[name])])
        begin += size
    arrays = {}
    for name, parts in found.items():
        array = xp.stack(parts, axis=2).reshape(heads, -1, tables[name].shape[1])
        arrays[name] = oscar.pack(array, _code_bits(scheme, name), xp) if name in CODES else array
    return arrays


def to_pages(arrays: dict[str, Array], scheme: Scheme, xp: Any = np) -> Array:
    """The inverse of `from_pages`."""
    heads, tokens, packed = arrays["key_codes"].shape
    dim, blocks = packed * 8 // scheme.key_bits, tokens // (PAGE_TOKENS * _pages_of_block(scheme))
    parts = {}
    for name, table in positions(scheme, dim).items():
        bits, x = _code_bits(scheme, name), xp.ascontiguousarray(arrays[name])
        x = (oscar.unpack(x, bits, xp) if bits else x).reshape(heads, blocks, -1, *table.shape)
        section = xp.empty((*x.shape[:3], table.size), x.dtype)
        section[..., xp.asarray(table)] = x
        section = _code_bytes(section, bits, xp) if bits else section.view(np.uint8)
        parts[name] = iter(section.swapaxes(0, 2).swapaxes(1, 2))  # [heads, blocks, bytes] of each page that has one
    sections = [next(parts[name]) for name, _ in _sections(scheme, dim)]
    return xp.concatenate(sections, axis=-1).reshape(heads, tokens // PAGE_TOKENS, -1)


def packed_row(layer_cache: PackedCache, slot: int, tokens: int) -> dict[str, Array]:
    """`PackedCache.packed_row` of a cache that keeps pages."""
    of_blocks = layer_cache["pages"][layer_cache.block_ids(slot, tokens)].swapaxes(0, 1)  # [kv_heads, blocks, 2, bytes]
    pages = of_blocks.reshape(len(of_blocks), -1, of_blocks.shape[3])[:, : tokens // PAGE_TOKENS]
    return from_pages(pages, layer_cache.scheme, layer_cache["window_keys"].shape[3], layer_cache.xp)


def import_packed(layer_cache: PackedCache, slot: int, row: dict[str, np.ndarray], packed: int) -> None:
    """The inverse of `packed_row`."""
    xp, halves = layer_cache.xp, BLOCK_TOKENS // PAGE_TOKENS
    pages = to_pages({name: xp.asarray(x) for name, x in row.items() if name in NAMES}, layer_cache.scheme, xp)
    for half in range(halves):
        part = pages[:, half::halves].swapaxes(0, 1)
        layer_cache["pages"][:, :, half][layer_cache.block_ids(slot, packed)[: len(part)]] = part


def _pages_of_block(scheme: Scheme) -> int:
    """Pages that share steps and minima of keys, those of one group of tokens."""
    return max(scheme.group // PAGE_TOKENS, 1)


def _code_bits(scheme: Scheme, name: str) -> int:
    """Of a section's numbers if they are codes, else 0."""
    return {"key_codes": scheme.key_bits, "value_codes": scheme.value_bits}.get(name, 0)


def _sections(scheme: Scheme, dim: int) -> list[tuple[str, int]]:
    """Name and bytes of the sections of a page, or of the two pages that share parameters of keys, in their order."""
    tables = positions(scheme, dim)
    params, values = ["key_step", "key_min"], [name for name in tables if name.startswith("value")]
    names = ["key_codes", *params, *values]
    if _pages_of_block(scheme) == 2:
        names = ["key_codes", *values, *params, "key_codes", *values]
    return [(name, tables[name].size * (_code_bits(scheme, name) or 16) // 8) for name in names]


def _codes(section: Array, bits: int, xp: Any) -> Array:
    """The codes of a section in the order of `_code_position`: uint8 [..., numbers]."""
    if bits != 3:
        return oscar.unpack(section, bits, xp)
    octets = section.reshape(*section.shape[:-1], -1, 768)  # of tiles: 4 words a lane, then 2 words a lane
    four, two = octets[..., :512].reshape(*octets.shape[:-1], 32, 4, 4), octets[..., 512:]
    words = xp.concatenate([four, two.reshape(*octets.shape[:-1], 32, 2, 4)], axis=-2)  # [..., lanes, 6, 4 bytes]
    pairs = (words & xp.uint8(3)).reshape(*words.shape[:-2], 2, 3, 4) << xp.asarray([[2], [4], [6]], xp.uint8)
    words = xp.concatenate([words, pairs.sum(axis=-2, dtype=xp.uint8)], axis=-2)
    words = words.reshape(*words.shape[:-2], 2, 4, 4).swapaxes(-3, -4)  # [..., 2 loads, lanes, 4 words, 4 bytes]
    codes = words[..., None] >> xp.asarray([2, 5], xp.uint8) & xp.uint8(7)
    return codes.reshape(*section.shape[:-1], -1)


def _code_bytes(codes: Array, bits: int, xp: Any) -> Array:
    """The inverse of `_codes`."""
    if bits != 3:
        return oscar.pack(codes, bits, xp)
    words = codes.reshape(*codes.shape[:-1], -1, 2, 32, 4, 4, 2) << xp.asarray([2, 5], xp.uint8)
    words = words.sum(axis=-1, dtype=xp.uint8).swapaxes(-3, -4)  # [..., octets, lanes, 2 loads, 4 words, 4 bytes]
    words = words.reshape(*words.shape[:-3], 8, 4)
    pairs = words[..., 6:, None, :] >> xp.asarray([[2], [4], [6]], xp.uint8) & xp.uint8(3)
    words = words[..., :6, :] | pairs.reshape(*words.shape[:-2], 6, 4)
    parts = (part.reshape(*part.shape[:-3], -1) for part in (words[..., :4, :], words[..., 4:, :]))
    return xp.concatenate(list(parts), axis=-1).reshape(*codes.shape[:-1], -1)


@cache
def positions(scheme: Scheme, dim: int) -> dict[str, np.ndarray]:
    """Name -> index in its section of each number of its array, [tokens or groups of a page, ...]."""
    groups, value_groups = max(PAGE_TOKENS // scheme.group, 1), dim // scheme.value_group(dim)
    keys, values = np.arange(groups * dim), np.arange(PAGE_TOKENS * value_groups)
    tables = {"key_codes": _key_positions(scheme.key_bits, dim)}
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
    tables["value_codes"] = _value_positions(scheme.value_bits, dim)
    for name in ("value_step",) if scheme.symmetric_values else ("value_step", "value_min"):
        tables[name] = order.reshape(PAGE_TOKENS, value_groups)[_rows()]
    return tables


def _rows() -> np.ndarray:
    """Row of each token of a page in its four token tiles, as 16 * tile + row; int64 [64]."""
    t = np.arange(PAGE_TOKENS)
    return 16 * (t // 32 * 2 + t % 4 // 2) + 8 * (t % 2) + t % 32 // 4


def _code_position(bits: int, tile: np.ndarray, lane: np.ndarray, word: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Of a code in its MMA tile, lane, word 0 ... 3 of the lane's 16 bytes, half of the word."""
    tiles = 8 if bits == 2 else 4  # in the four words of a lane
    return (((tile // tiles * 32 + lane) * 4 + word) * 2 + half) * tiles + tile % tiles


def _key_positions(bits: int, dim: int) -> np.ndarray:
    """Of the codes of keys, [64 tokens, dim]: tile (row / 16, 16 channels = half k / 4 of chunk), lane (row % 8, c),
    word (k half k / 2 % 2, row half)."""
    t, channel = np.meshgrid(_rows(), np.arange(dim), indexing="ij")  # t is a row
    chunk, c, k = channel // 32, channel % 32 // 8, channel % 8
    lane, word = t % 8 * 4 + c, k // 2 % 2 * 2 + t // 8 % 2
    return _code_position(bits, (2 * chunk + k // 4) * 4 + t // 16, lane, word, k % 2)


def _value_positions(bits: int, dim: int) -> np.ndarray:
    """Of the codes of values, [64 tokens, dim]: tile (row / 16, channel tile), whose rows are channels 8 (row / 2 % 4)
    + 4 (tile % 2) + 2 (row / 8) + row % 2 of the chunk."""
    t, channel = np.meshgrid(_rows(), np.arange(dim), indexing="ij")
    chunk, c, k = channel // 32, channel % 32 // 8, channel % 8
    row = 8 * (k // 2 % 2) + 2 * c + k % 2
    tile, lane = t // 16 * (dim // 16) + 2 * chunk + k // 4, row % 8 * 4 + t % 8 // 2
    return _code_position(bits, tile, lane, t // 8 % 2 * 2 + row // 8, t % 2)
