"""Published baselines as quantizers of their own, registered beside the schemes of oscar.py; on every back end they run
as array code.

OTT (arXiv 2505.10938): of each block and kv head the tokens with the smallest keys stay in BF16. TurboQuant (arXiv
2504.19874, its MSE variant): a random rotation makes the coordinates of any vector nearly normal; so one codebook, the
best for a normal variable, serves all of them, and the vector's norm in float16 is all that is stored beside the codes.
KVarN (arXiv 2606.03458): after a Hadamard rotation the standard deviations of a block's tokens and channels are made
equal, in turns. Together's OSCAR (arXiv 2605.17757; not the OScaR of oscar.py): calibrated rotations, own_samples.py.
llama.cpp's q4_0 with its Hadamard rotation: blocks of 32 and a scale. All of them have this cache's window, which is
not theirs: OSCAR keeps the newest 256 tokens in BF16, q4_0 none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .. import oscar
from ..layer_cache import BF16, widen
from ..oscar import SCHEMES, WINDOW, Scheme
from . import own_samples

Array = Any
Layout = dict[str, tuple[tuple[int, ...], Any]]
# J. Max, Quantizing for minimum distortion (1960), table 1, N = 4
LEVELS = np.array([-1.510, -0.4528, 0.4528, 1.510], np.float32)
LIMITS = np.exp([-0.3, 10.0]).astype(np.float32)  # of KVarN's scales, those of its authors' code


@dataclass(frozen=True)
class Ott(Scheme):
    """outliers: tokens of a block and kv head that are kept in BF16 beside it."""

    outliers: int = 3
    block = WINDOW

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
class StepOnly(Scheme):
    """Keys and values alike, in groups of channels of one token, with a step and no minimum."""

    def bits_per_element(self, head_dim: int) -> float:
        return (self.key_bits + self.value_bits) / 2 + 16 / self.value_group(head_dim)

    def packed_layout(self, tokens: int, head_dim: int) -> Layout:
        return {name: of for name, of in super().packed_layout(tokens, head_dim).items() if not name.endswith("min")}

    def pack(
        self, keys: Array, values: Array, norms: Array | None, xp: Any = np, feedback: Array | None = None
    ) -> dict[str, Array]:
        found = {}
        for kind, x, bits in (("key", keys, self.key_bits), ("value", values, self.value_bits)):
            codes, found[f"{kind}_step"] = self.quantize(x, self.value_group(x.shape[-1]), xp)
            found[f"{kind}_codes"] = oscar.pack(codes, bits, xp)
        return found

    def unpack(self, row: dict[str, Array], norms: Array | None, xp: Any = np) -> tuple[Array, Array]:
        keys, values = (
            self.dequantize(oscar.unpack(row[f"{kind}_codes"], bits, xp), row[f"{kind}_step"], xp)
            for kind, bits in (("key", self.key_bits), ("value", self.value_bits))
        )
        return keys, values

    def quantize(self, x: Array, group: int, xp: Any) -> tuple[Array, Array]:
        """x [..., channels] -> codes uint8 of the same shape, step float16 [..., channels / group]."""
        raise NotImplementedError

    def dequantize(self, codes: Array, step: Array, xp: Any) -> Array:
        raise NotImplementedError


@dataclass(frozen=True)
class TurboQuant(StepOnly):
    """A vector is a group of channels, a whole head where `group` is as large."""

    def quantize(self, x: Array, group: int, xp: Any) -> tuple[Array, Array]:
        return quantize(x, group, xp)

    def dequantize(self, codes: Array, step: Array, xp: Any) -> Array:
        return dequantize(codes, step, xp)


@dataclass(frozen=True)
class Q4(StepOnly):
    """ggml's q4_0 (quantize_row_q4_0_ref): the number of largest size becomes the level -8 of 16, whatever its sign.

    step = that number / -8, code = floor(x / step + 8.5), at most 15, from the step before it is rounded to float16.
    """

    def quantize(self, x: Array, group: int, xp: Any) -> tuple[Array, Array]:
        blocks = x.astype(xp.float32).reshape(*x.shape[:-1], -1, group)
        largest = xp.take_along_axis(blocks, abs(blocks).argmax(axis=-1)[..., None], axis=-1)
        step = largest / xp.float32(-8)
        codes = xp.minimum(xp.floor(blocks / xp.where(step == 0, xp.float32(1), step) + xp.float32(8.5)), 15)
        return codes.astype(xp.uint8).reshape(x.shape), step[..., 0].astype(xp.float16)

    def dequantize(self, codes: Array, step: Array, xp: Any) -> Array:
        levels = codes.reshape(*step.shape, -1).astype(xp.float32) - xp.float32(8)
        return (levels * step.astype(xp.float32)[..., None]).reshape(codes.shape)


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


@dataclass(frozen=True)
class Kvarn(Scheme):
    """A block of one kv head is a tile [tokens, channels].

    Keys are rounded per channel over the tile's tokens, values per token over the head's channels; the scale of that
    axis goes into step and min, the other axis keeps its own in float16. All of them are billed. The first 128 tokens
    stay in BF16. As in the authors' code (github.com/huawei-csl/KVarN) codes are chosen before scales are rounded.
    """

    rounds: int = 16
    block = WINDOW

    def bits_per_element(self, head_dim: int) -> float:
        key = self.key_bits + 32 / WINDOW + 16 / head_dim
        return (key + self.value_bits + 32 / head_dim + 16 / WINDOW) / 2

    def packed_layout(self, tokens: int, head_dim: int) -> Layout:
        of_tokens, of_channels = ((tokens, 1), np.float16), ((tokens // WINDOW, head_dim), np.float16)
        return {
            "key_codes": ((tokens, head_dim * self.key_bits // 8), np.uint8), "key_scale": of_tokens,
            "value_codes": ((tokens, head_dim * self.value_bits // 8), np.uint8), "value_scale": of_channels,
            "key_step": of_channels, "key_min": of_channels, "value_step": of_tokens, "value_min": of_tokens,
        }  # fmt: skip

    def pack(
        self, keys: Array, values: Array, norms: Array | None, xp: Any = np, feedback: Array | None = None
    ) -> dict[str, Array]:
        found = {}
        for kind, x, bits, axis in (("key", keys, self.key_bits, -2), ("value", values, self.value_bits, -1)):
            tiles = x.astype(xp.float32).reshape(len(x), -1, WINDOW, x.shape[-1])
            along, across = equal_deviations(tiles, axis, self.rounds, xp)
            y, top = tiles / along / across, 2**bits - 1
            low, high = y.min(axis=axis, keepdims=True), y.max(axis=axis, keepdims=True)
            step = xp.maximum((high - low) / xp.float32(top), xp.float32(1e-10))
            codes = xp.clip(xp.rint((y - low) / step), 0, top).astype(xp.uint8)
            found[f"{kind}_codes"] = oscar.pack(codes.reshape(x.shape), bits, xp)
            for name, scale in (("step", step * along), ("min", low * along), ("scale", across)):
                last = 1 if scale.shape[-1] == 1 else x.shape[-1]
                found[f"{kind}_{name}"] = scale.astype(xp.float16).reshape(len(x), -1, last)
        return found

    def unpack(self, row: dict[str, Array], norms: Array | None, xp: Any = np) -> tuple[Array, Array]:
        keys, values = (self._unpacked(row, *of, xp) for of in (("key", self.key_bits), ("value", self.value_bits)))
        return keys, values

    def _unpacked(self, row: dict[str, Array], kind: str, bits: int, xp: Any) -> Array:
        codes = oscar.unpack(row[f"{kind}_codes"], bits, xp)
        heads, tokens, dim = codes.shape
        tiles = codes.reshape(heads, -1, WINDOW, dim).astype(xp.float32)
        step, low, scale = (
            x.astype(xp.float32).reshape(heads, tokens // WINDOW, -1, x.shape[-1])
            for x in (row[f"{kind}_{name}"] for name in ("step", "min", "scale"))
        )
        return ((tiles * step + low) * scale).reshape(codes.shape)


def equal_deviations(tiles: Array, axis: int, rounds: int, xp: Any = np) -> tuple[Array, Array]:
    """Scales (along, across) of tiles [..., tokens, channels]: in tiles / along / across all rows and all columns have
    nearly one standard deviation.

    axis: -1 or -2, over which numbers will be rounded together: `along` has length 1 there, `across` on the other one.
    Each round divides by the deviations over the other axis, then over `axis`; scales are kept within LIMITS, and those
    after the round are taken for which largest over smallest deviation, of rows and of columns, add up to the least.
    Once these are equal a round only moves a factor from `across` to `along`, and a rounding decides which round is
    taken: of `across` the mean is made 1, so that the same numbers have the same scales whoever sums them.
    """
    other = -3 - axis
    scales = {over: xp.ones_like(tiles.sum(axis=over, keepdims=True)) for over in (axis, other)}
    best, least = dict(scales), _imbalance(tiles, xp)
    for _ in range(rounds):
        for over in (other, axis):
            deviation = (tiles / scales[axis] / scales[other]).std(axis=over, ddof=1, keepdims=True)
            scales[over] = xp.clip(scales[over] * xp.clip(deviation, 1e-3, 1e3), *LIMITS)
        imbalance = _imbalance(tiles / scales[axis] / scales[other], xp)
        best = {over: xp.where(imbalance <= least, scales[over], kept) for over, kept in best.items()}
        least = xp.minimum(imbalance, least)
    factor = best[other].mean(axis=(-2, -1), keepdims=True)
    return best[axis] * factor, best[other] / factor


def _imbalance(tiles: Array, xp: Any) -> Array:
    found = 0
    for over in (-2, -1):
        deviations = tiles.std(axis=over, ddof=1, keepdims=True)
        found = found + deviations.max(axis=(-2, -1), keepdims=True) / xp.maximum(
            deviations.min(axis=(-2, -1), keepdims=True), xp.float32(1e-8)
        )
    return found


@dataclass(frozen=True)
class OscarCov(Scheme):
    """Of each group of channels the smallest and largest numbers are clipped, as many as in the authors' code
    (github.com/FutureMLS-Lab/OSCAR): 4 % of keys and 8 % of values at each end. rotate: H is part of the rotations.
    """

    calibrated = True
    key_clip: float = 0.96
    value_clip: float = 0.92

    def prepare(self, weights: Any, config: Any, ops: Any) -> Any:
        return own_samples.calibrate(weights, config, ops)

    def rotated(self, x: Array, rotations: Array | None, xp: Any = np) -> Array:
        """Each head times the matrix of its kv head: rotations [2, kv_heads, d, d], of keys and of values."""
        return (x.reshape(len(x), rotations.shape[1], -1, x.shape[-1]) @ rotations[0]).reshape(x.shape)

    def pack(
        self, keys: Array, values: Array, norms: Array | None, xp: Any = np, feedback: Array | None = None
    ) -> dict[str, Array]:
        clipped = (
            clip_to_ranks(x, self.value_group(x.shape[-1]), share, xp)
            for x, share in ((keys, self.key_clip), (values, self.value_clip))
        )
        return super().pack(*clipped, norms, xp, feedback)


def clip_to_ranks(x: Array, group: int, share: float, xp: Any = np) -> Array:
    """x [..., channels], each group of channels clipped to those of its numbers at 1 - share and share of its order."""
    groups = x.astype(xp.float32).reshape(*x.shape[:-1], -1, group)
    ordered = xp.sort(groups, axis=-1)
    low, high = max(0, int((1 - share) * group) - 1), min(group - 1, int(share * group))
    return xp.clip(groups, ordered[..., low : low + 1], ordered[..., high : high + 1]).reshape(x.shape)


RIVALS = (
    Ott("ott"),
    TurboQuant("turboquant", key_axis="channel", group=256),
    Kvarn("kvarn-2", rotate=True, group=WINDOW, sinks=128),
    Kvarn("kvarn-k4v2", rotate=True, group=WINDOW, sinks=128, key_bits=4),
    OscarCov("oscar-cov", rotate=True, key_axis="channel", group=128, sinks=64),
    Q4("q4_0", key_bits=4, value_bits=4, rotate=True, key_axis="channel"),
)
SCHEMES |= {scheme.name: scheme for scheme in RIVALS}
