"""The packed layout in NumPy (kernels/LAYOUT.md), written from the drawing and not from the kernels, and attention in float64."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from minioscar import oscar
from minioscar.oscar import WINDOW, Scheme

BF16 = np.dtype(ml_dtypes.bfloat16)
PAGE = 64


def bf16_bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.astype(BF16)).view(np.uint16)


def from_bits(x: np.ndarray) -> np.ndarray:
    return x.view(BF16).astype(np.float32)


def _places(bits: int, first: np.ndarray, tile: np.ndarray, lane: np.ndarray, word: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the 32-bit word, lowest bit) of a code: tile of a row of tiles, lane, word 0..3 of its 16 bytes, half of the word."""
    tiles = 16 // bits
    return first + (tile // tiles * 32 + lane) * 4 + word, 16 * half + tile % tiles * bits


def code_places(scheme: Scheme, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Word and bit of every code of a page, [64 tokens, dim]: of keys, then of values."""
    t, ch = np.meshgrid(np.arange(PAGE), np.arange(dim), indexing="ij")
    chunk, c, k = ch // 32, ch % 32 // 8, ch % 8
    zero = np.zeros_like(t)
    # keys: tile (token / 16, 16 channels = half k/4 of chunk), lane (token % 8, c), word (k half k/2%2, token half)
    key = _places(scheme.bits, zero, (2 * chunk + k // 4) * 4 + t // 16, t % 8 * 4 + c, k // 2 % 2 * 2 + t // 8 % 2, k % 2)
    # values: tile (token / 16, channel tile); rows of a tile are channels: 8(row/2%4) + 4(tile%2) + 2(row/8) + row%2 of the chunk
    row = 8 * (k // 2 % 2) + 2 * c + k % 2
    tile = t // 16 * (dim // 16) + 2 * chunk + k // 4
    value = _places(scheme.bits, zero, tile, row % 8 * 4 + t % 8 // 2, t // 8 % 2 * 2 + row // 8, t % 2)
    return *key, *value


def unpack_page(page: np.ndarray, scheme: Scheme, dim: int) -> dict[str, np.ndarray | None]:
    """uint8 [..., page_bytes] -> key_codes, value_codes [..., 64, dim], key_step, key_min [..., 64/group, dim], value_step, value_min."""
    codes = PAGE * dim * scheme.bits // 8
    n, g = dim // scheme.value_group(dim), PAGE // scheme.group
    kp, vp = 2 * g * dim, 2 * PAGE * n
    ends = np.cumsum([codes, kp, kp, codes, vp] + ([] if scheme.symmetric_values else [vp]))
    assert ends[-1] == page.shape[-1]
    parts = [np.ascontiguousarray(p) for p in np.split(page, ends[:-1], axis=-1)]
    kw, kb, vw, vb = code_places(scheme, dim)
    top = 2**scheme.bits - 1
    keys, values = parts[0].view(np.uint32)[..., kw] >> kb.astype(np.uint32) & top, parts[3].view(np.uint32)[..., vw] >> vb.astype(np.uint32) & top
    lead = page.shape[:-1]

    def key_params(x: np.ndarray) -> np.ndarray:  # [chunk][c][half e][group][4 channels]
        x = x.view(np.float16).reshape(*lead, dim // 32, 4, 2, g, 4)
        return np.moveaxis(x, -2, len(lead)).reshape(*lead, g, dim)

    def value_params(x: np.ndarray) -> np.ndarray:  # [token/16][token%8/2][group][token/8%2][token%2]
        x = x.view(np.float16).reshape(*lead, 4, 4, n, 2, 2)
        at = len(lead)
        return x.transpose(*range(at), at, at + 3, at + 1, at + 4, at + 2).reshape(*lead, PAGE, n)

    return {
        "key_codes": keys.astype(np.uint8), "value_codes": values.astype(np.uint8), "key_step": key_params(parts[1]), "key_min": key_params(parts[2]),
        "value_step": value_params(parts[4]), "value_min": None if scheme.symmetric_values else value_params(parts[5]),
    }  # fmt: skip


def past(cache: dict[str, np.ndarray], row: int, tokens: int, scheme: Scheme, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """What attention takes `tokens` tokens of a row to be, the last of them new: keys, values float32 [kv_heads, tokens, dim]."""
    packed = max(tokens - 1, 0) // WINDOW * WINDOW
    window = (from_bits(cache[n][row])[:, : tokens - packed] for n in ("window_keys", "window_values"))
    if not packed:
        return tuple(window)
    p = unpack_page(cache["pages"][row][:, : packed // PAGE], scheme, dim)  # [heads, pages, ...]
    p = {n: None if x is None else x.reshape(x.shape[0], -1, x.shape[-1]) for n, x in p.items()}
    norms = cache["norms"][row, :packed] if scheme.scale else None
    keys = oscar.dequantize_keys(p["key_codes"], p["key_step"], p["key_min"], norms, scheme)
    values = oscar.dequantize_values(p["value_codes"], p["value_step"], p["value_min"], scheme)
    if scheme.sinks:
        keys[:, : scheme.sinks], values[:, : scheme.sinks] = (from_bits(cache[n][row]) for n in ("sink_keys", "sink_values"))
    return tuple(np.concatenate(pair, axis=1) for pair in zip((keys, values), window, strict=True))


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One query token in float64: q [q_heads, d], keys, values [kv_heads, n, d] -> out [q_heads, d], log-sum-exp [q_heads]."""
    heads, _, d = keys.shape
    x = q.reshape(heads, -1, d).astype(np.float64) @ keys.astype(np.float64).swapaxes(1, 2) / math.sqrt(d)
    top = x.max(axis=-1, keepdims=True)
    p = np.exp(x - top)
    total = p.sum(axis=-1, keepdims=True)
    return (p @ values / total).reshape(-1, d), (np.log(total) + top).reshape(-1)
