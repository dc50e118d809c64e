"""Qwen3-Omni's audio tower: log-mel frames -> embeddings of the language model, 13 a second.

Frames are cut into chunks of a second; three convolutions make 13 rows of each chunk's 100 frames, which know their
place within the chunk; a transformer, whose attention ends at windows of eight chunks, and two projections follow.
Qwen3OmniMoeAudioEncoder of transformers 5.24 is what its numbers are those of; the paper is arXiv 2509.17765.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError, shown
from ..fields import Fields
from . import sound
from .layers import gelu, layer_norm, linear
from .media import Backend, Features, Medium

Array = Any
PREFIX = "audio_tower."
EPS = 1e-5
CONVOLUTIONS = ("conv2d1", "conv2d2", "conv2d3")  # 3 x 3, stride 2, padding 1
CHUNKS = 8  # whose convolutions are in memory at once
DEFAULTS = {  # what a missing key means: transformers 5.24, configuration_qwen3_omni_moe.py
    "num_mel_bins": 128, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "d_model": 1280,
    "n_window": 50, "n_window_infer": 800, "downsample_hidden_size": 480, "audio_token_id": 151646,
}  # fmt: skip


@dataclass(frozen=True)
class AudioTower:
    """Its shape, as `audio_config` of a config.json has it."""

    token: int  # <|audio_pad|>
    mel_bins: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    channels: int  # of the convolutions
    output_size: int
    chunk: int  # frames
    chunks_per_window: int
    max_tokens: int  # that the language model has positions for

    @classmethod
    def of(
        cls, raw: Mapping[str, Any], preprocessor: Mapping[str, Any], source: str, hidden: int, max_tokens: int
    ) -> AudioTower:
        """By `thinker_config` of a config.json and preprocessor_config.json. hidden: size of the language model. Raises
        UserError for what is missing or not implemented."""
        if not isinstance(raw.get("audio_config"), Mapping):
            raise UserError(f"{source}: audio_config must be an object, not {shown(raw.get('audio_config'))}")
        get, top = Fields(raw["audio_config"], f"{source}: audio_config", DEFAULTS), Fields(raw, source, DEFAULTS)
        get.only("activation_function", "gelu")
        get.only("output_dim", hidden)
        size, heads = get.count("d_model"), get.count("encoder_attention_heads")
        half, window = get.count("n_window", most=1 << 20), get.count("n_window_infer")
        if size % (2 * heads) or size < 4 or window < 2 * half:
            why = f"encoder_attention_heads {heads} of d_model {size}, or n_window_infer {window} of n_window {half}"
            raise UserError(f"{get.source}: {why}, is not supported")
        said = Fields(preprocessor, "preprocessor_config.json", {})
        bins = get.count("num_mel_bins", most=1024)
        for key, only in (
            ("feature_size", bins), ("sampling_rate", sound.RATE), ("hop_length", sound.HOP), ("n_fft", sound.WINDOW),
            ("dither", 0.0),
        ):
            said.only(key, only)
        depth = get.count("encoder_layers", most=1024)
        return cls(
            top.count("audio_token_id"), bins, size, depth, heads, get.count("encoder_ffn_dim"),
            get.count("downsample_hidden_size"), hidden, 2 * half, window // (2 * half), max_tokens,
        )  # fmt: skip

    @property
    def kind(self) -> str:
        return "audio"

    @property
    def weights_of(self) -> str:
        return self.kind

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Tensor name, as Hugging Face checkpoints spell it within the thinker, -> shape."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {}

        def add(name: str, *shape: int, bias: bool = True) -> None:
            shapes[f"{PREFIX}{name}.weight"] = shape
            if bias:
                shapes[f"{PREFIX}{name}.bias"] = shape[:1]

        for i, name in enumerate(CONVOLUTIONS):
            add(name, self.channels, self.channels if i else 1, 3, 3)
        add("conv_out", hidden, self.channels * rows(self.mel_bins), bias=False)
        for i in range(self.num_layers):
            layer = f"layers.{i}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                add(f"{layer}self_attn.{name}", hidden, hidden)
            add(f"{layer}self_attn_layer_norm", hidden)
            add(f"{layer}final_layer_norm", hidden)
            add(f"{layer}fc1", inner, hidden)
            add(f"{layer}fc2", hidden, inner)
        add("ln_post", hidden)
        add("proj1", hidden, hidden)
        add("proj2", self.output_size, hidden)
        return shapes

    @property
    def feature_width(self) -> int:
        return self.output_size

    def prepare(self, source: Any, name: str, most: int | None = None) -> Medium:
        """The samples, float32 at 16 kHz, and how many tokens they become. Raises UserError."""
        is_less = most is not None and most < self.max_tokens
        tokens, holder = (most, f"a sound of {most} tokens") if is_less else (self.max_tokens, "this model's context")
        seconds = tokens * self.chunk / rows(self.chunk) * sound.HOP / sound.RATE
        samples = sound.opened(source, name, seconds, holder)
        return Medium.of(self.kind, samples, self.tokens(len(samples) // sound.HOP), name=name)

    def tokens(self, frames: int) -> int:
        """Of so many mel frames: 13 for 100."""
        whole, rest = divmod(frames, self.chunk)
        return whole * rows(self.chunk) + rows(rest)

    def encode(self, medium: Medium, weights: Mapping[str, Array], ops: Backend) -> Features:
        """embeddings [tokens, output_size]."""
        mel = sound.log_mel(medium.data, self.mel_bins)
        return Features(self.encoded(mel, {name.removeprefix(PREFIX): array for name, array in weights.items()}, ops))

    def encoded(self, mel: np.ndarray, w: Mapping[str, Array], ops: Backend) -> Array:
        """mel float32 [frames, bins] -> [tokens, output_size]."""
        xp = ops.xp
        x = self._convolved(mel, w, ops)  # [tokens, hidden]
        for i in range(self.num_layers):
            x = self._layer(x, w, f"layers.{i}.", ops)
        x = layer_norm(x, w, "ln_post", EPS, xp)
        return linear(gelu(linear(x, w, "proj1", ops), xp), w, "proj2", ops)

    def _layer(self, x: Array, w: Mapping[str, Array], name: str, ops: Backend) -> Array:
        xp, window = ops.xp, rows(self.chunk) * self.chunks_per_window
        y = layer_norm(x, w, f"{name}self_attn_layer_norm", EPS, xp)
        q, k, v = (linear(y, w, f"{name}self_attn.{of}_proj", ops).reshape(len(x), self.num_heads, -1) for of in "qkv")
        parts = [slice(at, at + window) for at in range(0, len(x), window)]
        y = xp.concatenate([ops.full_attention(q[part], k[part], v[part]) for part in parts])
        x = linear(y.reshape(x.shape), w, f"{name}self_attn.out_proj", ops, residual=x)
        y = layer_norm(x, w, f"{name}final_layer_norm", EPS, xp)
        return linear(gelu(linear(y, w, f"{name}fc1", ops), xp), w, f"{name}fc2", ops, residual=x)

    def _convolved(self, mel: np.ndarray, w: Mapping[str, Array], ops: Backend) -> Array:
        """The rows of all chunks, [tokens, hidden]. A last chunk that is shorter is filled with zeros, unless it is the
        first, too, and its rows behind the end are left out."""
        xp, frames, count = ops.xp, min(len(mel), self.chunk), -(-len(mel) // self.chunk)
        chunks = np.zeros((count, frames, self.mel_bins), np.float32)
        chunks.reshape(-1, self.mel_bins)[: len(mel)] = mel
        places = xp.asarray(sinusoids(rows(frames), self.hidden_size))
        parts = []
        for i in range(0, count, CHUNKS):
            x = ops.array(chunks[i : i + CHUNKS].swapaxes(1, 2)[..., None])  # [chunks, bins, frames, 1]
            for name in CONVOLUTIONS:
                x = gelu(convolution(x, w, name, ops), xp)
            x = x.transpose(0, 2, 3, 1).reshape(len(x), x.shape[2], -1)  # [chunks, rows, channels * bands]
            parts.append(ops.sum(linear(xp.ascontiguousarray(x), w, "conv_out", ops), places))
        return xp.concatenate(parts).reshape(-1, self.hidden_size)[: self.tokens(len(mel))]

    def work_bytes(self, tokens: int, ops: Backend) -> int:
        """Of the widest moment of `encode`, a chunk's convolution or a layer, and of the features."""
        hidden, heads, itemsize = self.hidden_size, self.num_heads, ops.dtype.itemsize
        window = min(rows(self.chunk) * self.chunks_per_window, tokens)
        frames = tokens * self.chunk // rows(self.chunk) + self.chunk
        half = self.channels * (self.mel_bins // 2 + 1) * (self.chunk // 2 + 1)  # of the first convolution
        patches = 9 * self.channels * (self.mel_bins // 4 + 1) * (self.chunk // 4 + 1)  # of the second
        convolving = min(CHUNKS, -(-frames // self.chunk)) * (half * (2 * itemsize + 4 * 6) + 2 * itemsize * patches)
        attending = itemsize * 7 * tokens * hidden + ops.full_attention_bytes(window, heads, hidden // heads)
        mlp = itemsize * tokens * (2 * hidden + 2 * self.intermediate_size) + 4 * tokens * 4 * self.intermediate_size
        in_tower = 8 * frames * self.mel_bins + max(convolving, attending, mlp) + itemsize * tokens * self.output_size
        return max(sound.work_bytes(frames, self.mel_bins), in_tower)


def rows(frames: int) -> int:
    """What the convolutions, each of stride 2, leave of so many frames (or bands)."""
    for _ in CONVOLUTIONS:
        frames = (frames + 1) // 2
    return frames


def convolution(x: Array, w: Mapping[str, Array], name: str, ops: Backend) -> Array:
    """x [n, height, width, in] -> [n, (height + 1) // 2, (width + 1) // 2, out], 3 x 3, stride 2, zeros around it."""
    xp, (_, height, width, _) = ops.xp, x.shape
    x = xp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    weight = w[f"{name}.weight"].transpose(0, 2, 3, 1)
    x = xp.concatenate(patches, axis=-1)
    y = ops.linear(x.reshape(-1, x.shape[-1]), xp.ascontiguousarray(weight).reshape(len(weight), -1), w[f"{name}.bias"])
    return y.reshape(*x.shape[:3], -1)


def sinusoids(count: int, size: int) -> np.ndarray:
    """Places as sines, then cosines, of wavelengths from 2 pi to 20,000 pi; float32 [count, size] (Whisper's)."""
    angles = np.arange(count)[:, None] * 10000.0 ** -(np.arange(size // 2) / (size // 2 - 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
