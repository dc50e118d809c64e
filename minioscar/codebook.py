"""Random rotation and Lloyd-Max levels: the 2-bit scalar quantizer of TurboQuant (arXiv 2504.19874, its MSE variant).

A rotated vector has nearly normal coordinates, whatever it was; so one fixed codebook, the best for a normal variable, serves
all of them, and its norm in float16 is all that is stored beside the codes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = Any

LEVELS = np.array([-1.510, -0.4528, 0.4528, 1.510], np.float32)  # J. Max, Quantizing for minimum distortion (1960), table 1, N = 4


@cache
def rotation(n: int) -> np.ndarray:
    """A random orthogonal matrix, float32 [n, n]: the Q of a normal matrix, columns with the signs that make it uniform."""
    q, r = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def quantize(x: Array, group: int, xp: Any = np) -> tuple[Array, Array]:
    """x [..., channels], float -> codes uint8 of the same shape, step float16 [..., channels / group].

    Each group of channels is one vector: rotated, divided by step = its norm / sqrt(group), and every coordinate replaced by the
    index of the nearest of LEVELS. A step of 0 gives codes 0.
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
