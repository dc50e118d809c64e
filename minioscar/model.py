"""The transformer, top to bottom: a reader starts here.

Llama, Mistral, Qwen2 and Qwen3 are one architecture with a few switches (biases; a norm on q and k; tied embeddings;
an MLP or a router's choice of many).
The array code does not know which back end runs it, nor what a token costs in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .batch import Batch
from .cache import Cache, LayerCache
from .config import Config
from .oscar import Scheme
from .pages import check_scheme
from .towers.media import Encoder
from .weights import Layer, Weights

if TYPE_CHECKING:
    from .ops.reference import Reference

Array = Any


class Model:
    """Weights, bound to a scheme of the cache and to a back end; values are rotated in the weights where the scheme
    rotates, or here where quantized weights cannot be."""

    def __init__(self, config: Config, weights: Weights, scheme: Scheme, ops: Reference):
        check_scheme(config, scheme)
        ops.say_if_slow(config, scheme)
        self.config, self.scheme, self.ops = config, scheme, ops
        self.weights, self.rotates_values = weights, weights.rotation == "online"
        self.encoder = Encoder(config.towers, weights.towers, ops)
        self.tables: tuple[Array, Array] | None = None  # cos and sin of RoPE for the positions seen so far

    def step(
        self, ids: Array, cache: Cache, batch: Batch, draw: Callable[[Array], Array] | None = None
    ) -> tuple[Array, Array]:
        """The next token of every sequence of `batch` after its new tokens `ids`, and the logits it was drawn from,
        float32 [sequences, vocab] on the back end. draw: from logits to tokens (None: the likeliest, int64 on the
        host).
        """
        logits = self._logits(ids, cache, batch, False)
        return self.ops.numpy(logits).argmax(axis=1) if draw is None else draw(logits), logits

    def forward(self, ids: np.ndarray, cache: Cache, batch: Batch, every: bool = False) -> np.ndarray:
        """Logits on the host, float32: [sequences, vocab] of each sequence's last token, or [tokens, vocab] of all if
        `every`."""
        return self.ops.numpy(self._logits(ids, cache, batch, every))

    def _logits(self, ids: Array, cache: Cache, batch: Batch, every: bool) -> Array:
        """Runs new tokens, int [tokens], sequence after sequence as `batch` says, through all layers and puts them into
        the cache."""
        ops, weights = self.ops, self.weights
        tables, media = self.tables_for(batch), self.encoder.of(batch.inputs)
        ops.begin(cache, batch)
        x = ops.embed(weights.embed, ids if batch.inputs is None else np.maximum(ids, 0))  # [tokens, hidden]
        for rows, embeddings, _ in media:
            x[rows] = embeddings
        for i, (layer, layer_cache) in enumerate(zip(weights.layers, cache.layers, strict=True)):
            x = self._attention(x, layer, layer_cache, tables, batch)
            x = self._mlp(x, layer) if layer.router is None else ops.experts(x, layer, self.config, batch)
            for rows, deep in ((rows, deep[i]) for rows, _, deep in media if i < len(deep)):
                x[rows] = ops.sum(x[rows], deep)
        ops.end(cache, batch)
        x = x if every or batch.last is None else ops.embed(x, batch.last)  # rows of x, by a kernel that is there
        return ops.linear(x, weights.head, norm=(weights.norm, self.config.rms_norm_eps), float32=True)

    def _attention(
        self, x: Array, layer: Layer, layer_cache: LayerCache, tables: tuple[Array, Array], batch: Batch
    ) -> Array:
        """x and the attention of a layer; the cache has the new tokens then. Its arrays are freed before the MLP
        runs."""
        ops = self.ops
        norm = layer.input_norm, self.config.rms_norm_eps
        qkv = ops.linear(x, layer.qkv, layer.qkv_bias, norm=norm)  # [tokens, (q_heads + 2 * kv_heads) * head_dim]
        # QK-norm, RoPE, rotation, norms
        q, new = ops.rotate_scale(qkv, layer, tables, layer_cache, self.config, batch, self.rotates_values)
        y = ops.attention(q, new, layer_cache, batch).reshape(len(x), -1)  # [tokens, q_heads * head_dim]
        if self.rotates_values and not batch.rotates_back:
            ops.rotate_heads(y, self.config.head_dim, 1)  # back: H.H = I
        return ops.linear(y, layer.o, layer.o_bias, residual=x)

    def _mlp(self, x: Array, layer: Layer) -> Array:
        """x and the gated MLP (SwiGLU) of a layer; its widest array is freed before the next layer's attention."""
        norm = layer.post_norm, self.config.rms_norm_eps
        h = self.ops.linear(x, layer.gate_up, layer.gate_up_bias, norm=norm, silu=True)  # [tokens, intermediate]
        return self.ops.linear(h, layer.down, layer.down_bias, residual=x)

    def tables_for(self, batch: Batch) -> tuple[Array, Array]:
        """Cosines and sines of RoPE for at least the positions of a pass, float32 [positions or more, head_dim / 2], or
        of a pass with media for its tokens (`Batch.table_rows`)."""
        if batch.inputs is not None:
            return tuple(map(self.ops.xp.asarray, self.config.rope.tables_at(batch.inputs.coordinates)))
        positions = batch.end
        if self.tables is None or len(self.tables[0]) < positions:
            size = max(1024, 1 << (positions - 1).bit_length())  # grows by doubling
            self.tables = tuple(self.ops.xp.asarray(table) for table in self.config.rope.tables(size))
        return self.tables
