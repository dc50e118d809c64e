"""What the layers of towers are made of, beside products of `ops`: array code, float32 inside, x's dtype outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .media import Backend

Array = Any
Weights = Mapping[str, Array]
QUERIES = 512  # whose scores are in memory at once


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


def quick_gelu(x: Array, xp: Any) -> Array:
    """x * sigmoid(1.702 x)."""
    y = x.astype(xp.float32)
    return (y / (1 + xp.exp(xp.float32(-1.702) * y))).astype(x.dtype)


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
