"""Rotary position embedding: the frequencies of every supported type, and their tables.

A pair of channels (i, i + head_dim/2) of a token at position p is turned by the angle p * f_i (the "rotate half" layout of
Hugging Face checkpoints). The types differ in f_i only, and yarn also in a factor on the result.
RoFormer (arXiv 2104.09864); linear: position interpolation (arXiv 2306.15595); yarn (arXiv 2309.00071); llama3: Llama 3.1's model card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    type: str
    theta: float
    head_dim: int
    max_positions: int  # what the model's positions reach with this scaling
    original: int  # the context the model was first trained for
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], head_dim: int, max_positions: int, source: str) -> Rope:
        """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before). Raises UserError."""
        fields = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(fields, Mapping):
            raise UserError(f"{source}: rope_parameters must be an object, not {fields!r}")
        kind = fields.get("rope_type", fields.get("type")) or "default"
        if kind not in ROPE_TYPES:
            raise UserError(f"{source}: rope type {kind!r} is not supported; minioscar has {', '.join(ROPE_TYPES)}")
        if fields.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{source}: partial_rotary_factor {fields['partial_rotary_factor']!r} is not supported; only 1.0 is")
        nested = [key for key, value in fields.items() if isinstance(value, Mapping)]
        if nested:
            raise UserError(f"{source}: rope_parameters per layer type ({', '.join(nested)}) is not supported; one set for all layers is")

        def number(key: str, default: float | None = None, least: float = 0) -> float:
            value = fields.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
                raise UserError(f"{source}: rope option {key} of type {kind!r} must be a positive number, not {value!r}")
            if value < least:
                raise UserError(f"{source}: rope option {key} {value!r} is not supported; it must be at least {least}")
            return float(value)

        theta = number("rope_theta", raw.get("rope_theta") or 10000.0, least=1.001)  # angles fall from channel to channel
        if kind == "default":
            return cls(kind, theta, head_dim, max_positions, max_positions)
        factor = number("factor")
        original = int(number("original_max_position_embeddings", max_positions, least=1))
        if kind == "linear":
            return cls(kind, theta, head_dim, max_positions, original, factor)
        if kind == "llama3":
            low, high = number("low_freq_factor"), number("high_freq_factor")
            if low >= high:
                raise UserError(f"{source}: rope option low_freq_factor {low} must be below high_freq_factor {high}")
            return cls(kind, theta, head_dim, max_positions, original, factor, low, high)
        if fields.get("attention_factor") is not None:
            attention = number("attention_factor")
        elif fields.get("mscale") and fields.get("mscale_all_dim"):
            attention = _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim"))
        else:
            attention = _mscale(factor)
        return cls(
            kind,
            theta,
            head_dim,
            max(max_positions, int(factor * original)),
            original,
            factor,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            attention_factor=attention,
            truncate=bool(fields.get("truncate", True)),
        )

    def frequencies(self) -> np.ndarray:
        """Radians per position of each channel pair; float64 [head_dim / 2]."""
        plain = self.theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.type == "default":
            return plain
        if self.type == "linear":
            return plain / self.factor
        if self.type == "llama3":  # long wavelengths are stretched by factor, short ones kept, a ramp between
            turns = self.original * plain / (2 * math.pi)  # over the original context
            keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        else:  # yarn: the same idea, the ramp drawn over the channel index
            low, high = self._channel(self.beta_fast), self._channel(self.beta_slow)
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.head_dim - 1)
            keep = 1 - np.clip((np.arange(self.head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return plain * keep + plain / self.factor * (1 - keep)

    def _channel(self, turns: float) -> float:
        """The (fractional) pair whose wave turns this often over the original context."""
        return self.head_dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def tables(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of every angle, yarn's factor in them; float32 [positions, head_dim / 2]."""
        angles = np.arange(positions)[:, None] * self.frequencies()
        return (np.cos(angles) * self.attention_factor).astype(np.float32), (np.sin(angles) * self.attention_factor).astype(np.float32)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
