"""The shapes and switches of a model. What the config.json of each family means is in model_files/config.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import formats
from .experts import Experts
from .formats import rounding
from .model_files.config import read_fields, read_folder
from .rope import Rope
from .towers.audio import AudioTower
from .towers.clip import Clip
from .towers.media import Tower
from .towers.qwen_video import QwenVideo
from .towers.qwen_vision import QwenVision


@dataclass(frozen=True)
class Config:
    """The decoder-only transformer that every supported family is: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of each expert where there are experts
    num_layers: int
    num_heads: int  # q heads
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int  # the longest context the model is made for
    window: int | None  # tokens that a layer with a sliding window attends to; None where no layer has a shorter one
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    quantization: formats.Format | None = None  # of matrices that are quantized in the files
    weights: str | None = None  # of formats.rounding.MODES: how matrices are kept that the files have in 16 or 32 bits
    experts: Experts | None = None  # None: one MLP a layer, which every token takes
    vision: QwenVision | Clip | None = None  # None: pictures are not read
    audio: AudioTower | None = None  # None: sound is not read
    video: QwenVideo | None = None  # None: videos are not read
    shared_keys: tuple[int, Any] | None = None  # of one of several cards: all kv heads, and the first of its own

    @classmethod
    def from_folder(cls, folder: Path) -> Config:
        """Reads folder/config.json. Raises UserError where it is missing, malformed or asks for what is not
        implemented."""
        return cls(**read_folder(Path(folder)))

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], source: str = "config.json", pictures: Mapping[str, Any] | None = None
    ) -> Config:
        """The same of what is read already, as `read_fields` has it."""
        return cls(**read_fields(raw, source, pictures or {}))

    @property
    def max_context(self) -> int:
        """The longest context that runs: the positions, or the sliding window, within which attention is full."""
        return self.window or self.max_positions

    @property
    def limit(self) -> str:
        """Why a context ends at `max_context`, for messages."""
        if self.window is None:
            return f"this model has {self.max_positions} positions"
        return (
            f"this model has {self.max_positions} positions, but layers with a sliding window of {self.window} tokens, "
            f"which is not implemented: full attention is the same up to {self.window} tokens only; stay within them"
        )

    @property
    def towers(self) -> dict[str, Tower]:
        """What turns other parts of a message than text into embeddings, by the kind of the part."""
        return {tower.kind: tower for tower in (self.vision, self.audio, self.video) if tower is not None}

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def key_heads(self) -> tuple[int, Any]:
        """Heads whose keys are computed, all of the model's, and which of them is the first that is kept."""
        return self.shared_keys or (self.num_kv_heads, 0)

    @property
    def qkv_size(self) -> int:
        return self.q_size + self.key_heads[0] * self.head_dim + self.kv_size

    def stored_bits(self, is_head: bool, columns: int = 0) -> float | None:
        """Of a number of a quantized matrix, as `Format.stored_bits` has them; None for one that is not."""
        if self.quantization is not None and not is_head:
            return self.quantization.stored_bits(columns)
        return self.weights and rounding.stored_bits("int8" if is_head else self.weights, columns)

    def parameters(self, active: bool = False) -> int:
        """The number of weights, a tied embedding counted once. active: of the experts those that one token takes."""
        hidden, inter = self.hidden_size, self.intermediate_size
        attention = hidden * self.qkv_size + self.q_size * hidden
        attention += self.qkv_size * self.qkv_bias + hidden * self.output_bias + 2 * self.head_dim * self.qk_norm
        mlp = 3 * hidden * inter + (2 * inter + hidden) * self.mlp_bias
        if self.experts:  # and the router
            mlp = (self.experts.per_token if active else self.experts.count) * mlp + self.experts.count * hidden
        layer = attention + mlp + 2 * hidden
        towers = sum(math.prod(shape) for tower in self.towers.values() for shape in tower.expected().values())
        text = self.num_layers * layer + hidden + self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return text + towers
