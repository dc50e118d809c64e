"""OScaR in a page of NumPy: the specification that every kernel is tested against (arXiv 2605.19660).

Keys and values of one layer are `[kv_heads, tokens, head_dim]`, keys after RoPE (and QK-norm). A block of tokens is
quantized at once, in three steps: rotate keys by a Hadamard matrix (hadamard.py), divide each token by its norm, round
groups of numbers to a few bits. Every function takes float32 (NumPy or CuPy arrays alike) and is the
textbook formula. Read down to `Scheme`, which says which steps are taken and puts a block together. Beside the page:
error_feedback.py is another way to round keys and dither.py one for values, evaluation/baselines.py has other published
quantizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np

from . import dither
from .error_feedback import shaped_codes
from .hadamard import hadamard

Array = Any  # numpy.ndarray or cupy.ndarray: the code below runs on either

WINDOW = 128  # R: the paper's newest tokens stay in BF16 until there are this many, then all are quantized at once


# --- 1. canalized rotation


def rotate(x: Array, xp: Any = np) -> Array:
    """Canalized rotation: x @ H along the last axis, in float32. Norms and inner products are preserved.

    x: [..., head_dim]. Raises ValueError where `hadamard` does. OScaR, "Canalized Rotation".
    """
    return x.astype(xp.float32) @ xp.asarray(hadamard(x.shape[-1]))


# --- 2. omni-token scaling


def token_norms(keys: Array, xp: Any = np) -> Array:
    """n_t = the 2-norm of token t over all kv heads and channels; 1 where it is 0.

    keys: [tokens, kv_heads, head_dim]. Returns float32 [tokens]. OScaR, "Omni-Token Scaling".
    """
    keys = keys.astype(xp.float32)
    norms = xp.sqrt((keys * keys).sum(axis=(1, 2)))
    return xp.where(norms == 0, xp.float32(1), norms)


# --- 3. quantization of groups


def quantize(
    x: Array, axis: int, group: int, bits: int, shrink: float = 1.0, xp: Any = np
) -> tuple[Array, Array, Array]:
    """Asymmetric quantization in groups of `group` along `axis`.

    x: float. Returns codes uint8 (shape of x), step and minimum float16 (that axis divided by `group`).
    step = (max - min) / (2^bits - 1), code = clip(round((x - min) / step), 0, 2^bits - 1), with max and min first moved
    to mid +- shrink * (max - min) / 2, and step and min rounded to float16 before codes are chosen. A step of 0 gives
    codes 0.
    """
    x, axis = _split(x.astype(xp.float32), axis, group)
    top = 2**bits - 1
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    span = (high - low) * xp.float32(shrink)
    step = (span / xp.float32(top)).astype(xp.float16)
    minimum = (low + (high - low - span) * xp.float32(0.5)).astype(xp.float16)
    codes = _round((x - minimum) / _nonzero(step, xp), step, top, xp)
    return _join(codes, axis), step.squeeze(axis), minimum.squeeze(axis)


def dequantize(codes: Array, step: Array, minimum: Array, axis: int, group: int, xp: Any = np) -> Array:
    """x = step * code + minimum. Shapes as `quantize` returns them; float32."""
    codes, axis = _split(codes, axis, group)
    x = codes.astype(xp.float32)
    x *= xp.expand_dims(step.astype(xp.float32), axis)
    x += xp.expand_dims(minimum.astype(xp.float32), axis)
    return _join(x, axis)


def quantize_symmetric(
    x: Array, axis: int, group: int, bits: int, shrink: float = 1.0, xp: Any = np, offsets: Array | None = None
) -> tuple[Array, Array]:
    """Symmetric quantization: the levels are step * (code - c), c = (2^bits - 1) / 2, so there is no minimum to store.

    step = shrink * max|x| / c rounded to float16 first, code = clip(round(x / step + c), 0, 2^bits - 1). For 2 bits
    c = 1.5. Returns codes uint8 and step float16, shapes as in `quantize`. A step of 0 gives codes 0. offsets: of
    `dither.offsets`, are added to c before rounding; a group that has one has its whole range, as if shrink were 1.
    """
    x, axis = _split(x.astype(xp.float32), axis, group)
    top = 2**bits - 1
    middle, factor, whole = (xp.float32(value) for value in (top / 2, shrink / (top / 2), 1 / (top / 2)))
    if offsets is not None:
        middle, factor = middle + offsets, xp.where(offsets == 0, factor, whole)
    step = (abs(x).max(axis=axis, keepdims=True) * factor).astype(xp.float16)
    codes = _round(x / _nonzero(step, xp) + middle, step, top, xp)
    return _join(codes, axis), step.squeeze(axis)


def dequantize_symmetric(codes: Array, step: Array, axis: int, group: int, bits: int, xp: Any = np) -> Array:
    """x = step * (code - (2^bits - 1) / 2); float32."""
    codes, axis = _split(codes, axis, group)
    x = codes.astype(xp.float32)
    x -= xp.float32((2**bits - 1) / 2)
    x *= xp.expand_dims(step.astype(xp.float32), axis)
    return _join(x, axis)


def _split(x: Array, axis: int, group: int) -> tuple[Array, int]:
    """Splits `axis`, a negative one, into [..., groups, group, ...]; the second is the new axis to reduce."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // group, group, *x.shape[at + 1 :]), axis


def _join(x: Array, axis: int) -> Array:
    at = x.ndim + axis
    return x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])


def _nonzero(step: Array, xp: Any) -> Array:
    return xp.where(step == 0, step.dtype.type(1), step).astype(xp.float32)


def _round(x: Array, step: Array, top: int, xp: Any) -> Array:
    return xp.where(step == 0, xp.uint8(0), xp.clip(xp.rint(x), 0, top).astype(xp.uint8))


# --- codes in bytes


def pack(codes: Array, bits: int, xp: Any = np) -> Array:
    """uint8 codes [..., n] -> bytes [..., n * bits / 8]; the first code stands in the lowest bits. bits: 1, 2, 3, 4, 6
    or 8."""
    ones = xp.unpackbits(codes.ravel(), bitorder="little").reshape(*codes.shape, 8)[..., :bits]
    return xp.packbits(ones.ravel(), bitorder="little").reshape(*codes.shape[:-1], -1)


def unpack(packed: Array, bits: int, xp: Any = np) -> Array:
    """The inverse of `pack`: uint8 bytes [..., m] -> uint8 codes [..., m * 8 / bits]."""
    if 8 % bits:
        size = math.lcm(bits, 8)  # bits of so many codes that they fill bytes
        words = packed.reshape(*packed.shape[:-1], -1, size // 8).astype(xp.uint32)
        words = (words << xp.arange(0, size, 8, dtype=xp.uint32)).sum(axis=-1, dtype=xp.uint32)
        codes = (words[..., None] >> xp.arange(0, size, bits, dtype=xp.uint32)) & xp.uint32(2**bits - 1)
        return codes.astype(xp.uint8).reshape(*packed.shape[:-1], -1)
    table = xp.asarray(_codes_of_byte(bits))
    return xp.take(table, packed).view(xp.uint8).reshape(*packed.shape[:-1], -1)  # faster than table[packed]


@cache
def _codes_of_byte(bits: int) -> np.ndarray:
    """The codes in each of the 256 bytes, as one word a byte, so that unpacking is a single look-up."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.view(f"u{8 // bits}").reshape(256)


# --- a block, as a scheme wants it


@dataclass(frozen=True)
class Scheme:
    """How keys and values are kept. `name` is what `--kv` takes; the fields are the switches of the method.

    key_bits, value_bits: per code; 16 in both means BF16, nothing quantized.
    rotate: Hadamard on keys (online) and values (in the weights).
    scale: divide keys by the token's norm.  key_axis: "token" = a group is `group` tokens of one channel (per-channel
    quantization), "channel" = `group` channels of one token.  symmetric_values: step only, no minimum.
    shrink: the range is narrowed to this fraction about its middle; that of values to value_shrink (None: shrink).
    max_value_group: channels in a group of values (None: `group`).  sinks: first tokens kept in BF16.
    shaped: rounding errors of keys are fed back, so that they avoid what queries look at (`shaped_codes`).
    dithered: symmetric values are rounded after an offset where they repeat (`dither.offsets`).
    pair_scaled: RoPE pairs of keys are scaled toward equal variance, in the weights (`key_shaping.pair_scales`).
    flush, keep: whenever the number of tokens is a multiple of `flush`, the oldest `flush` tokens of the BF16 window
    are packed, if it has `keep` more than these. The paper's window is emptied: keep = 0.
    A subclass may keep a block in another way: it says so in `packed_layout`, `pack` and `unpack`
    (evaluation/baselines.py). calibrated: its rotations come out of `prepare`.
    """

    calibrated: ClassVar[bool] = False

    name: str
    key_bits: int = 2
    value_bits: int = 2
    rotate: bool = False
    scale: bool = False
    group: int = 32
    key_axis: str = "token"
    symmetric_values: bool = False
    shrink: float = 1.0
    sinks: int = 0
    shaped: bool = False
    value_shrink: float | None = None
    max_value_group: int | None = None
    pair_scaled: bool = False
    dithered: bool = False
    flush: int = WINDOW
    keep: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for one of keys and values in BF16, for a dither of values that have a minimum, and for a
        window whose packed tokens are no whole blocks."""
        if (self.key_bits < 16) != (self.value_bits < 16):
            raise ValueError(f"{self.name}: keys have {self.key_bits} bits, values {self.value_bits}; 16 is for both")
        if self.dithered and not self.symmetric_values:
            raise ValueError(f"{self.name}: values that are dithered must be symmetric")
        for of, parts in (WINDOW, self.flush), (self.flush, self.block), (self.keep, self.flush):
            if parts < 1 or of < 0 or of % parts:
                window = f"a window that packs {self.flush} tokens and keeps {self.keep}"
                raise ValueError(f"{self.name}: {window}: {of} is not a multiple of {parts}")

    @property
    def block(self) -> int:
        """Tokens that are quantized together: `pack` takes a multiple of them."""
        return self.group if self.key_axis == "token" else 1

    @property
    def ring(self) -> int:
        """Slots of the BF16 window: token t is in slot t % ring."""
        return self.flush + self.keep

    def packed_tokens(self, length: int) -> int:
        """How many of a row's first `length` tokens are packed; the others are in the window."""
        return max(length - length % self.flush - self.keep, 0) if self.quantized else 0

    def prepare(self, weights: Any, config: Any, ops: Any) -> Any:
        """Weights with what a calibrated scheme wants to know of the model, from those that hold H where it rotates."""
        return weights

    def rotated(self, x: Array, rotations: Array | None, xp: Any = np) -> Array:
        """Queries or keys, float32 [tokens, heads, head_dim]. rotations: `Layer.rotations`, of a calibrated scheme."""
        return rotate(x, xp) if self.rotate else x

    @property
    def quantized(self) -> bool:
        return self.key_bits < 16

    def value_group(self, head_dim: int) -> int:
        """Channels in a group: what is asked for, or the largest power of two below it that divides head_dim (32 for
        96, 16 for 80)."""
        return math.gcd(self.max_value_group or self.group, head_dim)

    @property
    def shrink_of_values(self) -> float:
        return self.shrink if self.value_shrink is None else self.value_shrink

    def bits_per_element(self, head_dim: int) -> float:
        """Codes, steps and minima, averaged over keys and values; the norm of a token is not in it."""
        if not self.quantized:
            return 16.0
        key = self.key_bits + 32 / (self.group if self.key_axis == "token" else self.value_group(head_dim))
        value = self.value_bits + (16 if self.symmetric_values else 32) / self.value_group(head_dim)
        return (key + value) / 2

    def packed_layout(self, tokens: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> (shape, dtype) of what one kv head keeps of whole blocks of so many tokens."""
        groups = tokens, head_dim // self.value_group(head_dim)
        key_groups = (tokens // self.group, head_dim) if self.key_axis == "token" else groups
        found = dict.fromkeys(("key_step", "key_min"), (key_groups, np.float16))
        found = {"key_codes": ((tokens, head_dim * self.key_bits // 8), np.uint8), **found}
        values = tokens, head_dim * self.value_bits // 8
        found |= {"value_codes": (values, np.uint8), "value_step": (groups, np.float16)}
        return found if self.symmetric_values else found | {"value_min": (groups, np.float16)}

    def pack(
        self, keys: Array, values: Array, norms: Array | None, xp: Any = np, feedback: Array | None = None
    ) -> dict[str, Array]:
        """Whole blocks [kv_heads, tokens, head_dim] -> the arrays of `packed_layout`, with the axis of kv heads in
        front.

        norms: [tokens], where the scheme scales. feedback: what `shaped_codes` takes, for a shaped scheme.
        """
        parts = {
            "key": (self.key_bits, *quantize_keys(keys, norms, self, xp, feedback)),
            "value": (self.value_bits, *quantize_values(values, self, xp)),
        }
        found = {}
        for kind, (bits, codes, step, minimum) in parts.items():
            found |= {f"{kind}_codes": pack(codes, bits, xp), f"{kind}_step": step}
            found |= {} if minimum is None else {f"{kind}_min": minimum}
        return found

    def unpack(self, row: dict[str, Array], norms: Array | None, xp: Any = np) -> tuple[Array, Array]:
        """What attention takes keys and values to be: the inverse of `pack`; float32 [kv_heads, tokens, head_dim]."""
        keys = unpack(row["key_codes"], self.key_bits, xp)
        keys = dequantize_keys(keys, row["key_step"], row["key_min"], norms, self, xp)
        values = unpack(row["value_codes"], self.value_bits, xp)
        return keys, dequantize_values(values, row["value_step"], row.get("value_min"), self, xp)


INT2 = Scheme(
    "int2", rotate=True, scale=True, shaped=True, pair_scaled=True, shrink=0.9, symmetric_values=True, dithered=True,
    max_value_group=64, value_shrink=0.7, sinks=32, flush=64, keep=64,
)  # fmt: skip
COMPACT = replace(INT2, name="int2-compact", group=64, shrink=0.85, sinks=64)
LONG = replace(COMPACT, group=128, flush=128, keep=128)  # groups of keys are two pages, and so is what a flush packs
MORE_BITS = replace(LONG, pair_scaled=False)
K4V2 = replace(MORE_BITS, name="k4v2", key_bits=4, shrink=1.0, value_shrink=0.75)
K3V3 = replace(MORE_BITS, name="k3v3", key_bits=3, value_bits=3, shrink=0.95, value_shrink=0.85)
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16", key_bits=16, value_bits=16),
        Scheme("kivi"),
        Scheme("quarot", rotate=True, key_axis="channel"),
        Scheme("rotation", rotate=True),
        Scheme("scaling", scale=True),
        Scheme("oscar", rotate=True, scale=True),
        INT2,
        COMPACT,
        replace(LONG, name="int2-long", shrink=0.8),
        replace(K3V3, name="k3v2", value_bits=2, value_shrink=0.75),
        K3V3,
        K4V2,
        replace(K4V2, name="k4v4", value_bits=4, value_shrink=0.9),
        Scheme("int4", key_bits=4, value_bits=4, rotate=True, scale=True),
    )
}
DEFAULT_SCHEME = "int2"


def quantize_keys(
    keys: Array, norms: Array | None, scheme: Scheme, xp: Any = np, feedback: Array | None = None
) -> tuple[Array, Array, Array]:
    """keys [kv_heads, tokens, head_dim] (rotated if the scheme does), norms [tokens] -> codes, step, min of keys /
    norm.

    The codes have the keys' shape; step and min are [kv_heads, tokens/group, head_dim], or, for quantization per token,
    [kv_heads, tokens, head_dim/group]. `tokens` must be a multiple of the group. feedback: what `shaped_codes` takes,
    for a shaped scheme only. Raises ValueError where it is missing.
    """
    keys = keys.astype(xp.float32)
    if scheme.scale:
        keys = keys / norms[:, None]
    codes, step, minimum = quantize(keys, *_key_groups(scheme, keys.shape[-1]), scheme.key_bits, scheme.shrink, xp)
    if scheme.shaped:
        if feedback is None:
            where = "key_shaping.shape_keys puts it into the weights"
            raise ValueError(f"{scheme.name} needs the feedback matrix of its layer; {where}")
        codes = shaped_codes(keys, step, minimum, feedback, scheme.key_bits, xp)
    return codes, step, minimum


def dequantize_keys(
    codes: Array, step: Array, minimum: Array, norms: Array | None, scheme: Scheme, xp: Any = np
) -> Array:
    """What attention takes the keys to be: the inverse of `quantize_keys`, norms multiplied back; float32."""
    keys = dequantize(codes, step, minimum, *_key_groups(scheme, codes.shape[-1]), xp)
    if scheme.scale:
        keys *= norms[:, None]
    return keys


def quantize_values(values: Array, scheme: Scheme, xp: Any = np) -> tuple[Array, Array, Array | None]:
    """values [kv_heads, tokens, head_dim] -> codes, step, min (None if symmetric): groups of channels of one token."""
    group, shrink = scheme.value_group(values.shape[-1]), scheme.shrink_of_values
    if scheme.symmetric_values:
        offsets = dither.offsets(values, group, xp) if scheme.dithered else None
        return *quantize_symmetric(values, -1, group, scheme.value_bits, shrink, xp, offsets), None
    return quantize(values, -1, group, scheme.value_bits, shrink, xp)


def dequantize_values(codes: Array, step: Array, minimum: Array | None, scheme: Scheme, xp: Any = np) -> Array:
    """The inverse of `quantize_values`; float32."""
    group = scheme.value_group(codes.shape[-1])
    if scheme.symmetric_values:
        return dequantize_symmetric(codes, step, -1, group, scheme.value_bits, xp)
    return dequantize(codes, step, minimum, -1, group, xp)


def _key_groups(scheme: Scheme, head_dim: int) -> tuple[int, int]:
    return (-2, scheme.group) if scheme.key_axis == "token" else (-1, scheme.value_group(head_dim))
