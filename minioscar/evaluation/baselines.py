"""Published baselines as quantizers of their own, registered beside the schemes of oscar.py; on every back end they run
as array code.

OTT (arXiv 2505.10938): of each block and kv head the tokens with the smallest keys stay in BF16. TurboQuant (arXiv
2504.19874, its MSE variant): a random rotation makes the coordinates of any vector nearly normal; so one codebook, the
best for a normal variable, serves all of them, and the vector's norm in float16 is all that is stored beside the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .. import oscar
from ..cache import BF16, widen
from ..oscar import SCHEMES, WINDOW, Scheme

Array = Any
Layout = dict[str, tuple[tuple[int, ...], Any]]
# J. Max, Quantizing for minimum distortion (1960), table 1, N = 4
LEVELS = np.array([-1.510, -0.4528, 0.4528, 1.510], np.float32)


@dataclass(frozen=True)
class Ott(Scheme):
    """outliers: tokens of a block and kv head that are kept in BF16 beside it."""

    outliers: int = 3

    def bits_per_element(self, head_dim: int) -> float:
        return super().bits_per_element(head_dim) + self.outliers * (16 + 8 / (2 * head_dim)) / WINDOW

    def packed_layout(self, tokens: int, head_dim: int) -> Layout:
        outliers = tokens // WINDOW, self.outliers
        found = dict.fromkeys(("outlier_keys", "outlier_values"), ((*outliers, head_dim), BF16))
        return super().packed_layout(tokens, head_dim) | found | {"outlier_offsets": (outliers, np.uint8)}

    def pack(
        self, keys: Array, values: Array, norms: Array | None, xp: Any = np, feedback: Array | None = None
    ) -> dict[str, Array]:
        """The keys with the smallest 1-norms are replaced by the mean of their block's others, so that they stretch no
        group's range."""
        blocks = keys.astype(xp.float32).reshape(len(keys), -1, WINDOW, keys.shape[-1])
        offsets = xp.argsort(abs(blocks).sum(axis=-1), axis=-1)[..., : self.outliers]  # [heads, blocks, outliers]
        index = _block_index(offsets, xp)
        kept = {
            f"outlier_{kind}": x.reshape(blocks.shape)[index].astype(BF16)
            for kind, x in (("keys", keys), ("values", values))
        }
        others = (blocks.sum(axis=2) - blocks[index].sum(axis=2)) / (WINDOW - self.outliers)
        blocks[index] = others[:, :, None]
        packed = super().pack(blocks.reshape(keys.shape), values, norms, xp, feedback)
        return packed | kept | {"outlier_offsets": offsets.astype(np.uint8)}

    def unpack(self, row: dict[str, Array], norms: Array | None, xp: Any = np) -> tuple[Array, Array]:
        keys, values = super().unpack(row, norms, xp)
        index = _block_index(row["outlier_offsets"], xp)
        for x, name in ((keys, "outlier_keys"), (values, "outlier_values")):
            x.reshape(len(x), -1, WINDOW, x.shape[-1])[index] = widen(row[name])
        return keys, values


def _block_index(offsets: Array, xp: Any) -> tuple[Array, Array, Array]:
    """offsets [heads, blocks, n] of tokens in their blocks -> what picks them from [heads, blocks, WINDOW, d]."""
    heads, blocks, _ = offsets.shape
    return xp.arange(heads)[:, None, None], xp.arange(blocks)[:, None], offsets


@dataclass(frozen=True)
class TurboQuant(Scheme):
    """Keys and values alike; a vector is a group of channels, a whole head where `group` is as large."""

    def bits_per_element(self, head_dim: int) -> float:
        return self.bits + 16 / self.value_group(head_dim)

    def packed_layout(self, tokens: int, head_dim: int) -> Layout:
        return {name: of for name, of in super().packed_layout(tokens, head_dim).items() if not name.endswith("min")}

    def pack(
        self, keys: Array, values: Array, norms: Array | None, xp: Any = np, feedback: Array | None = None
    ) -> dict[str, Array]:
        found = {}
        for kind, x in (("key", keys), ("value", values)):
            codes, found[f"{kind}_step"] = quantize(x, self.value_group(x.shape[-1]), xp)
            found[f"{kind}_codes"] = oscar.pack(codes, self.bits, xp)
        return found

    def unpack(self, row: dict[str, Array], norms: Array | None, xp: Any = np) -> tuple[Array, Array]:
        keys, values = (
            dequantize(oscar.unpack(row[f"{kind}_codes"], self.bits, xp), row[f"{kind}_step"], xp)
            for kind in ("key", "value")
        )
        return keys, values


@cache
def rotation(n: int) -> np.ndarray:
    """A random orthogonal matrix, float32 [n, n]: the Q of a normal matrix, columns with the signs that make it
    uniform."""
    q, r = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def quantize(x: Array, group: int, xp: Any = np) -> tuple[Array, Array]:
    """x [..., channels], float -> codes uint8 of the same shape, step float16 [..., channels / group].

    Each group of channels is one vector: rotated, divided by step = its norm / sqrt(group), and every coordinate
    replaced by the index of the nearest of LEVELS. A step of 0 gives codes 0.
    """
    vectors = x.astype(xp.float32).reshape(*x.shape[:-1], -1, group)
    step = xp.sqrt((vectors * vectors).mean(axis=-1, keepdims=True)).astype(xp.float16)
    y = vectors @ xp.asarray(rotation(group)) / xp.where(step == 0, xp.float16(1), step).astype(xp.float32)
    codes = sum((y > float(edge)).astype(xp.uint8) for edge in (LEVELS[1:] + LEVELS[:-1]) / 2)
    return xp.where(step == 0, xp.uint8(0), codes).reshape(x.shape), step[..., 0]


def dequantize(codes: Array, step: Array, xp: Any = np) -> Array:
    """step * level, rotated back; float32."""
    group = codes.shape[-1] // step.shape[-1]
    y = xp.asarray(LEVELS)[codes].reshape(*step.shape, group) * step.astype(xp.float32)[..., None]
    return (y @ xp.asarray(rotation(group)).T).reshape(codes.shape)


SCHEMES |= {scheme.name: scheme for scheme in (Ott("ott"), TurboQuant("turboquant", key_axis="channel", group=256))}
