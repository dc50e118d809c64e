"""What towers are made of, in array code: float32 inside, the dtype of x outside. `Layers` is a tower's transformer; on
a card on_card.py computes the same by kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Backend

Array = Any
Weights = Mapping[str, Array]
QUERIES = 512  # whose scores are in memory at once


@dataclass(frozen=True)
class Shape:
    """Of a tower's layers: x += out(attention(norm1(x))), x += down(activation(up(norm2(x)))). Names are those of its
    tensors behind a layer's prefix."""

    hidden: int
    inner: int
    heads: int
    eps: float
    activation: str  # of ACTIVATIONS
    norm1: str
    qkv: tuple[str, ...]  # one matrix, or three
    out: str
    norm2: str
    up: str
    down: str

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Places:
    """Of the patches of a picture, and the rotary angles of these: a half of the pairs by row, the other by column."""

    host: np.ndarray  # int32 [patches, 2]: row and column
    there: Array  # the same on the back end
    cos: Array  # float32 [the longer side, d/4]
    sin: Array

    @classmethod
    def of(cls, host: np.ndarray, frequencies: np.ndarray, xp: Any) -> Places:
        host = host.astype(np.int32)
        angles = np.arange(host.max() + 1)[:, None] * frequencies
        tables = (xp.asarray(of(angles).astype(np.float32)) for of in (np.cos, np.sin))
        return cls(host, xp.asarray(host), *tables)

    def angles(self) -> tuple[Array, Array]:
        """cos and sin of every pair of every patch; float32 [patches, d/2]."""
        return tuple(table[self.there].reshape(len(self.host), -1) for table in (self.cos, self.sin))


class Layers:
    """In array code."""

    on_host = True  # arrays of back end and host are in one memory

    def __init__(self, ops: Backend, shape: Shape, tokens: int, segment: int, wide: int = 0):
        """tokens: the most of a call. segment: as many at a time attend to each other. wide: numbers of the widest
        array of an MLP that is not a layer's."""
        self.ops, self.shape, self.segment = ops, shape, segment

    @staticmethod
    def nbytes(shape: Shape, tokens: int, segment: int, ops: Backend, wide: int = 0) -> int:
        """Of the widest moment of a layer, in attention or in the MLP."""
        itemsize, heads = ops.dtype.itemsize, shape.heads
        attending = itemsize * 6 * tokens * shape.hidden + attention_bytes(min(segment, tokens), heads, shape.head_dim)
        mlp = itemsize * tokens * (2 * shape.hidden + 2 * shape.inner) + 4 * tokens * 4 * shape.inner
        return max(attending, mlp, wide * (2 * itemsize + 4 * 4))

    @staticmethod
    def array_bytes(*sizes: int) -> int:
        """Of arrays of so many bytes each."""
        return sum(sizes)

    def patches(self, vision: Any, pixels: np.ndarray) -> Array:
        """`QwenVision.patches` in the back end's dtype."""
        return vision.patches(self.ops.xp.asarray(pixels), self.ops.xp).astype(self.ops.dtype)

    def placed(self, x: Array, table: Array, places: Places, side: int) -> Array:
        """x [patches, hidden], which may be overwritten, and the learned places of the patches."""
        return self.ops.sum(x, stretched(table, places.host, side, self.ops.xp))

    def tiles(self, pixels: Array, kernel: Array, first: Array, places: Array) -> Array:
        """pixels [tiles, patches, numbers] by `kernel`, behind `first` [hidden] in every tile, and `places` [1 +
        patches, hidden]: [tiles * (1 + patches), hidden]."""
        ops, xp, (n, count, size) = self.ops, self.ops.xp, pixels.shape
        x = ops.linear(pixels.reshape(-1, size), kernel).reshape(n, count, -1)
        x = xp.concatenate([xp.broadcast_to(first, (n, 1, len(first))), x], axis=1)
        return ops.sum(x, places).reshape(-1, len(first))

    def norm(self, x: Array, w: Weights, name: str, in_place: bool = False) -> Array:
        """in_place: x may be overwritten."""
        return layer_norm(x, w, name, self.shape.eps, self.ops.xp)

    def linear(self, x: Array, w: Weights, name: str) -> Array:
        return linear(x, w, name, self.ops)

    def gelu_linear(self, x: Array, weight: Array, bias: Array) -> Array:
        return gelu(self.ops.linear(x, weight, bias), self.ops.xp)

    def mlp(self, x: Array, w: Weights, up: str, down: str) -> Array:
        """With a GELU between two matrices."""
        return linear(gelu(linear(x, w, up, self.ops), self.ops.xp), w, down, self.ops)

    def layer(self, x: Array, w: Weights, prefix: str, places: Places | None = None) -> Array:
        """x [tokens, hidden], which may be overwritten, behind the layer whose tensors have this prefix."""
        ops, s = self.ops, self.shape
        y = self.norm(x, w, f"{prefix}{s.norm1}")
        parts = [linear(y, w, f"{prefix}{name}", ops) for name in s.qkv]
        parts = parts if len(parts) == 3 else ops.xp.split(parts[0], 3, axis=-1)
        q, k, v = (part.reshape(len(x), s.heads, s.head_dim) for part in parts)
        if places is not None:
            tables = places.angles()
            q, k = ops.rope(q, *tables), ops.rope(k, *tables)
        parts = [slice(at, at + self.segment) for at in range(0, len(x), self.segment)]
        y = ops.xp.concatenate([attention(q[of], k[of], v[of], ops.xp).astype(x.dtype) for of in parts])
        x = linear(y.reshape(x.shape), w, f"{prefix}{s.out}", ops, residual=x)
        y = linear(self.norm(x, w, f"{prefix}{s.norm2}"), w, f"{prefix}{s.up}", ops)
        return linear(ACTIVATIONS[s.activation](y, ops.xp), w, f"{prefix}{s.down}", ops, residual=x)


def stretched(table: Array, places: np.ndarray, side: int, xp: Any) -> Array:
    """The learned table [side * side, hidden], stretched over the picture (bilinear, corners on corners); float32
    [patches, hidden]."""
    exact = places * ((side - 1) / np.maximum(places.max(axis=0), 1))
    low = np.floor(exact).astype(np.int64)
    part, high = exact - low, np.minimum(low + 1, side - 1)
    y = 0
    for row, of_row in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0])):
        for column, of_column in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1])):
            share = xp.asarray((of_row * of_column).astype(np.float32))[:, None]
            y = y + table[xp.asarray(row * side + column)].astype(xp.float32) * share
    return y


def layer_norm(x: Array, weights: Weights, name: str, eps: float, xp: Any) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (arXiv 1607.06450)."""
    y = x.astype(xp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y / xp.sqrt((y * y).mean(axis=-1, keepdims=True) + xp.float32(eps))
    weight, bias = (weights[f"{name}.{of}"].astype(xp.float32) for of in ("weight", "bias"))
    return (y * weight + bias).astype(x.dtype)


def gelu(x: Array, xp: Any) -> Array:
    """x * Phi(x), Phi the normal distribution (arXiv 1606.08415); erf by Abramowitz and Stegun, 7.1.26, which is
    within 1.5e-7, a rounding of float32."""
    y = x.astype(xp.float32)
    z = abs(y) * xp.float32(0.5**0.5)
    t = 1 / (1 + xp.float32(0.3275911) * z)
    series = xp.float32(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + xp.float32(factor)
    erf = xp.copysign(1 - series * t * xp.exp(-z * z), y)
    return (y * (1 + erf) / 2).astype(x.dtype)


def gelu_tanh(x: Array, xp: Any) -> Array:
    """GELU by tanh (arXiv 1606.08415, 2): x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    y = x.astype(xp.float32)
    inner = xp.float32(math.sqrt(2 / math.pi)) * (y + xp.float32(0.044715) * y * y * y)
    return (xp.float32(0.5) * y * (1 + xp.tanh(inner))).astype(x.dtype)


def quick_gelu(x: Array, xp: Any) -> Array:
    """x * sigmoid(1.702 x)."""
    y = x.astype(xp.float32)
    return (y / (1 + xp.exp(xp.float32(-1.702) * y))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array, Any], Array]] = {
    "gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu,
}  # fmt: skip


def linear(x: Array, weights: Weights, name: str, ops: Backend, residual: Array | None = None) -> Array:
    """x [..., in] by the matrix of this name, and its bias where it has one."""
    y = x.reshape(-1, x.shape[-1])
    y = ops.linear(y, weights[f"{name}.weight"], weights.get(f"{name}.bias"), residual=residual)
    return y.reshape(*x.shape[:-1], -1)


def attention(q: Array, k: Array, v: Array, xp: Any) -> Array:
    """softmax(q . k / sqrt(d)) . v of every head, each query over all keys: [tokens, heads, d] -> the same."""
    q, k, v = (x.astype(xp.float32).swapaxes(0, 1) for x in (q, k, v))  # [heads, tokens, d]
    q, y = q * xp.float32(q.shape[-1] ** -0.5), xp.empty_like(q)
    for i in range(0, q.shape[1], QUERIES):
        scores = q[:, i : i + QUERIES] @ k.swapaxes(1, 2)
        scores = xp.exp(scores - scores.max(axis=-1, keepdims=True))
        y[:, i : i + QUERIES] = scores @ v / scores.sum(axis=-1, keepdims=True)
    return y.swapaxes(0, 1)


def attention_bytes(tokens: int, heads: int, dim: int) -> int:
    """Of the arrays of `attention`."""
    return 4 * tokens * heads * (4 * dim + 3 * min(tokens, QUERIES))
