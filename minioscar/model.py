"""The transformer, top to bottom: a reader starts here.

Llama, Mistral, Qwen2 and Qwen3 are one architecture with a few switches (biases; a norm on q and k; tied embeddings).
The array code does not know which back end runs it, nor what a token costs in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache import Batch, Cache
from .config import Config
from .errors import UserError
from .oscar import Scheme, hadamard
from .sampling import RowSampling, next_token
from .weights import Layer, Weights

if TYPE_CHECKING:
    from .ops.reference import Reference

Array = Any
Progress = Callable[[Iterable], Iterable]  # wraps the loop over layers, as tqdm does


class Model:
    """Weights, bound to a scheme of the cache and to a back end; values are rotated in the weights where the scheme rotates."""

    def __init__(self, config: Config, weights: Weights, scheme: Scheme, ops: Reference):
        self.config, self.scheme, self.ops = config, scheme, ops
        check_scheme(config, scheme)
        ops.say_if_slow(config, scheme)
        self.weights = weights
        self.tables: tuple[Array, Array] | None = None  # cos and sin of RoPE for the positions seen so far

    def step(
        self, ids: np.ndarray, cache: Cache, batch: Batch, rows: Sequence[RowSampling] | None = None, progress: Progress = iter
    ) -> np.ndarray:
        """The first token that every sequence of `batch` draws after its new tokens `ids` (rows None: the likeliest); int64 [sequences]."""
        logits = self.forward(ids, cache, batch, progress=progress)
        return np.array([next_token(*drawing, 0) for drawing in zip(logits, rows or [RowSampling()] * len(logits), strict=True)])

    def forward(self, ids: np.ndarray, cache: Cache, batch: Batch, every: bool = False, progress: Progress = iter) -> np.ndarray:
        """Logits on the host, float32: [sequences, vocab] of each sequence's last token, or [tokens, vocab] of all if `every`."""
        return self.ops.numpy(self._logits(ids, cache, batch, every, progress))

    def _logits(self, ids: np.ndarray, cache: Cache, batch: Batch, every: bool, progress: Progress = iter) -> Array:
        """Runs new tokens, int [tokens], sequence after sequence as `batch` says, through all layers and puts them into the cache."""
        ops, weights, eps = self.ops, self.weights, self.config.rms_norm_eps
        tables = self.tables_for(int(np.add(batch.starts, batch.counts).max()))
        x = ops.embed(weights.embed, ids)  # [tokens, hidden]
        for layer, kept in progress(list(zip(weights.layers, cache.layers, strict=True))):
            x = self._attend(x, layer, kept, tables, batch)
            norm = layer.post_norm, eps
            h = ops.linear(x, layer.gate_up, layer.gate_up_bias, norm=norm, silu=True)  # [tokens, intermediate]
            x = ops.linear(h, layer.down, layer.down_bias, residual=x)
            del h  # not beside the arrays of the next layer's attention
        cache.advance(batch)
        x = x if every else x[ops.xp.asarray(batch.last)]
        return ops.linear(x, weights.head, norm=(weights.norm, eps), float32=True)

    def _attend(self, x: Array, layer: Layer, kept: dict[str, Array], tables: tuple[Array, Array], batch: Batch) -> Array:
        """x and the attention of a layer; the cache has the new tokens then. What stands between is gone before the MLP runs."""
        ops = self.ops
        norm = layer.input_norm, self.config.rms_norm_eps
        qkv = ops.linear(x, layer.qkv, layer.qkv_bias, norm=norm)  # [tokens, (q_heads + 2 * kv_heads) * head_dim]
        q, new = ops.rotate_scale(qkv, layer, tables, kept, self.config, self.scheme, batch)  # QK-norm, RoPE, rotation, norms
        y = ops.attention(q, new, kept, self.scheme, batch)  # [tokens, q_heads, head_dim]
        return ops.linear(y.reshape(len(x), -1), layer.o, layer.o_bias, residual=x)

    def tables_for(self, positions: int) -> tuple[Array, Array]:
        """Cosines and sines of RoPE for at least so many positions; float32 [positions or more, head_dim / 2]."""
        if self.tables is None or len(self.tables[0]) < positions:
            size = max(1024, 1 << (positions - 1).bit_length())  # grows by doubling
            self.tables = tuple(self.ops.xp.asarray(table) for table in self.config.rope.tables(size))
        return self.tables


def check_scheme(config: Config, scheme: Scheme) -> None:
    """Raises UserError where the model's head_dim does not fit the scheme's groups or has no Hadamard matrix."""
    if scheme.quantized and config.head_dim % 16:
        raise UserError(f"head_dim {config.head_dim} is not a multiple of 16, so --kv {scheme.name} has no groups for it; use --kv bf16")
    if scheme.rotate:
        try:
            hadamard(config.head_dim)
        except ValueError as error:
            raise UserError(f"--kv {scheme.name}: {error}; use --kv bf16 or kivi") from None
