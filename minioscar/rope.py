"""Rotary position embedding: the frequencies of every supported type, and their tables.

A pair of channels (i, i + head_dim/2) of a token at position p is turned by the angle p * f_i (the "rotate half" layout
of Hugging Face checkpoints). The types differ in f_i only, and yarn also in a factor on the result. RoFormer (arXiv
2104.09864); linear: position interpolation (arXiv 2306.15595); yarn (arXiv 2309.00071); llama3: Llama 3.1's model card.
Which one a model has, its config.json says: model_files/rope.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


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
    # M-RoPE: the coordinate (time, row, column) that turns each pair; None: a position is one number
    axes: tuple[int, ...] | None = None

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
            keep = 1 - np.clip((np.arange(self.head_dim // 2) - low) / ((high - low) or 0.001), 0, 1)
        return plain * keep + plain / self.factor * (1 - keep)

    def _channel(self, turns: float) -> float:
        """The (fractional) pair whose wave turns this often over the original context."""
        return self.head_dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def tables(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of every angle, yarn's factor in them; float32 [positions, head_dim / 2]."""
        return self._tables(np.arange(positions)[:, None] * self.frequencies())

    def tables_at(self, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of tokens at these coordinates, int64 [axes, tokens]; float32 [tokens, head_dim / 2]."""
        of_tokens = coordinates[list(self.axes or [0] * (self.head_dim // 2))].T  # in columns, as CuPy would keep it
        return self._tables(np.ascontiguousarray(of_tokens) * self.frequencies())

    def _tables(self, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = ((turned * self.attention_factor).astype(np.float32) for turned in (np.cos(angles), np.sin(angles)))
        return cos, sin
