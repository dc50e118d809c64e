"""Qwen3-Omni's audio tower: log-mel frames -> embeddings of the language model, 13 a second.

Frames are cut into chunks of a second; three convolutions make 13 rows of each chunk's 100 frames, which know their
place within the chunk; a transformer, whose attention ends at windows of eight chunks, and two projections follow.
Qwen3OmniMoeAudioEncoder of transformers 5.24 is what its numbers are those of; the paper is arXiv 2509.17765.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..backend import Backend
from ..errors import UserError, shown
from ..fields import Fields
from . import sound
from .layers import Layers, Shape
from .media import Features, Medium

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

    kind: ClassVar[str] = "audio"
    weights_of: ClassVar[str] = kind
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
    def shape(self) -> Shape:
        """Of its layers."""
        qkv = tuple(f"self_attn.{of}_proj" for of in "qkv")
        names = "self_attn_layer_norm", qkv, "self_attn.out_proj", "final_layer_norm", "fc1", "fc2"
        return Shape(self.hidden_size, self.intermediate_size, self.num_heads, EPS, "gelu", *names)

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
        tokens, window = self.tokens(len(mel)), rows(self.chunk) * self.chunks_per_window
        layers = ops.layers_for(self.shape)(ops, self.shape, tokens, window)
        x = self._convolved(mel, w, layers, ops)  # [tokens, hidden]
        for i in range(self.num_layers):
            x = layers.layer(x, w, f"layers.{i}.")
        return layers.mlp(layers.norm(x, w, "ln_post"), w, "proj1", "proj2")

    def _convolved(self, mel: np.ndarray, w: Mapping[str, Array], layers: Layers, ops: Backend) -> Array:
        """The rows of all chunks, [tokens, hidden]. A last chunk that is shorter is filled with zeros, unless it is the
        first, too, and its rows behind the end are left out."""
        xp, frames, count = ops.xp, min(len(mel), self.chunk), -(-len(mel) // self.chunk)
        found = xp.zeros((count, rows(frames), self.hidden_size), ops.dtype)
        chunks = np.zeros((count, frames, self.mel_bins), np.float32)
        chunks.reshape(-1, self.mel_bins)[: len(mel)] = mel
        places = xp.asarray(sinusoids(rows(frames), self.hidden_size))
        for i in range(0, count, CHUNKS):
            found[i : i + CHUNKS] = self._rows(chunks[i : i + CHUNKS], places, w, layers, ops)
        return found.reshape(-1, self.hidden_size)[: self.tokens(len(mel))]

    def _rows(self, chunks: np.ndarray, places: Array, w: Mapping[str, Array], layers: Layers, ops: Backend) -> Array:
        """Of a few chunks, float32 [chunks, frames, bins]: [chunks, rows, hidden]."""
        x = ops.array(chunks.swapaxes(1, 2)[..., None])  # [chunks, bins, frames, 1]
        for name in CONVOLUTIONS:
            x = convolution(x, w, name, layers, ops)
        x = x.transpose(0, 2, 3, 1).reshape(len(x), x.shape[2], -1)  # [chunks, rows, channels * bands]
        y = ops.linear(ops.xp.ascontiguousarray(x).reshape(-1, x.shape[-1]), w["conv_out.weight"])
        return ops.sum(y.reshape(*x.shape[:2], -1), places)

    def work_bytes(self, tokens: int, ops: Backend) -> int:
        """Of the arrays of `encode`: layers, the convolutions of a few chunks and the features, which on a card take
        the place of the second convolution's patches where these are larger."""
        kind, itemsize = ops.layers_for(self.shape), ops.dtype.itemsize
        each, features = rows(self.chunk), itemsize * tokens * self.output_size
        count = -(-tokens // each)
        layers = kind.nbytes(self.shape, tokens, each * self.chunks_per_window, ops)
        if kind.on_host:
            frames = count * self.chunk
            layers += 8 * frames * self.mel_bins + itemsize * (count * each * self.hidden_size) + features
            return max(sound.work_bytes(frames, self.mel_bins), layers + self._convolution_on_host(count, itemsize))
        sizes = [itemsize * size for size in self._convolution_sizes(min(count, CHUNKS))]
        sizes += [itemsize * (count * each - tokens) * self.hidden_size, 4 * each * self.hidden_size]
        return layers + kind.array_bytes(*sizes, features if features > max(sizes) else 0)

    def _convolution_sizes(self, chunks: int) -> list[int]:
        """Numbers of mel frames, and of patches, matrices and results of the first two convolutions of so many chunks:
        the third has room where they were."""
        height, width, channels = self.mel_bins, self.chunk, 1
        found = [chunks * height * width]
        for _ in range(2):
            height, width = (height + 1) // 2, (width + 1) // 2
            places = chunks * height * width
            found += [9 * channels * places, 9 * channels * self.channels, self.channels * places]
            channels = self.channels
        return found

    def _convolution_on_host(self, chunks: int, itemsize: int) -> int:
        """Of the second convolution, or of the first one's GELU."""
        sizes = self._convolution_sizes(min(chunks, CHUNKS))
        return itemsize * sum(sizes[3:]) + 4 * 6 * sizes[3]


def rows(frames: int) -> int:
    """What the convolutions, each of stride 2, leave of so many frames (or bands)."""
    for _ in CONVOLUTIONS:
        frames = (frames + 1) // 2
    return frames


def convolution(x: Array, w: Mapping[str, Array], name: str, layers: Layers, ops: Backend) -> Array:
    """x [n, height, width, in] -> [n, (height + 1) // 2, (width + 1) // 2, out], 3 x 3, stride 2, zeros around it, and
    a GELU."""
    xp, (n, height, width, channels) = ops.xp, x.shape
    patches = xp.zeros((n, (height + 1) // 2, (width + 1) // 2, 9, channels), ops.dtype)
    for i, (to_rows, of_rows) in enumerate(taps(height)):
        for j, (to_columns, of_columns) in enumerate(taps(width)):
            patches[:, to_rows, to_columns, 3 * i + j] = x[:, of_rows, of_columns]
    weight = w[f"{name}.weight"].transpose(0, 2, 3, 1)
    weight = xp.ascontiguousarray(weight).reshape(len(weight), -1)
    y = layers.gelu_linear(patches.reshape(-1, weight.shape[1]), weight, w[f"{name}.bias"])
    return y.reshape(*patches.shape[:3], -1)


def taps(size: int) -> list[tuple[slice, slice]]:
    """Of each of three neighbours: which of the (size + 1) // 2 places have it, and where they find it."""
    count = (size + 1) // 2
    return [
        (slice(1, count), slice(1, 2 * count - 2, 2)), (slice(count), slice(0, size, 2)),
        (slice(size // 2), slice(1, size, 2)),
    ]  # fmt: skip


def sinusoids(count: int, size: int) -> np.ndarray:
    """Places as sines, then cosines, of wavelengths from 2 pi to 20,000 pi; float32 [count, size] (Whisper's)."""
    angles = np.arange(count)[:, None] * 10000.0 ** -(np.arange(size // 2) / (size // 2 - 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
