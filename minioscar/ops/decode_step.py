"""A decode step as a list of launches on arrays that never move, so that one CUDA graph serves every step.

Tokens, lengths and the numbers of the steps live on the device: a step reads the tokens that the step before has drawn, and the host
reads them when it likes. Six launches a layer: qkv with its norm · RoPE, rotation and the new token's place · attention · o and residual ·
gate and up with their norm and silu · down and residual; then the packing of all layers. More rows than linear.cu has room for: a norm is
a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache import BF16, Cache
from ..config import Config
from ..oscar import Scheme
from ..sampling import RowSampling
from . import card, raw, raw_batch, raw_dense
from .products import Products, batch_plans

if TYPE_CHECKING:
    from ..weights import Weights
    from .cuda import Cuda

Array = Any


class DecodeStep:
    """tokens, lengths, steps: int32 [rows] on the device, a row of the cache each; length -1: not in use. samplings: how each draws.

    `run` takes a step with the newest token of each row (`tokens`), which stands at position `lengths`, and leaves the next one there;
    `logits`, float32 [rows, vocab], are what it was drawn from. weights: for the cache's scheme. tables: cos and sin of RoPE for the
    cache's context. Raises ValueError for schemes and shapes that have no kernels.
    """

    def __init__(
        self, ops: Cuda, config: Config, weights: Weights, tables: tuple[Array, Array], cache: Cache, samplings: Sequence[RowSampling]
    ):
        scheme, rows = cache.scheme, len(cache.lengths)
        if reason := unsupported(config, scheme, rows):
            raise ValueError(reason)
        self.ops, self.config, self.cache, self.rows, self.eps, xp = ops, config, cache, rows, config.rms_norm_eps, ops.xp
        self.heads = raw.Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        self.launches: list[raw.Launch] = []
        self.tokens, self.steps = (xp.zeros(rows, np.int32) for _ in range(2))
        self.lengths = xp.asarray(np.full(rows, -1, np.int32))
        self.logits, self.drawing = xp.empty((rows, config.vocab_size), np.float32), raw_dense.Drawing(xp, samplings, config.vocab_size)

        hidden, width = config.hidden_size, config.q_size + 2 * config.kv_size
        x, middle = (xp.empty((rows, hidden), BF16) for _ in range(2))
        qkv, y, h = (xp.empty((rows, n), BF16) for n in (width, config.q_size, config.intermediate_size))
        products = Products(xp, ops.multiprocessors, ops.capability)
        products.reserve(batch_plans(config, rows, ops.multiprocessors, ops.capability))
        plan = raw.plan(self.heads, scheme, rows, ops.multiprocessors, ops.capability)
        tasks, workspace = xp.empty(plan.task_shape, np.int32), xp.empty(plan.workspace_floats(config.head_dim), np.float32)
        arrived = xp.zeros(plan.counters(config.head_dim), np.int32)
        q, out = xp.empty((rows, config.num_heads, config.head_dim), BF16), y.reshape(rows, config.num_heads, config.head_dim)

        self.launches.append(raw_dense.embed(weights.embed, self.tokens, x))
        self.launches.append(raw.schedule(self.heads, scheme, plan, self.lengths, tasks, workspace))
        for i, (layer, kept) in enumerate(zip(weights.layers, cache.layers, strict=True)):
            self.launches += products.launches(x, layer.qkv, qkv, norm=(layer.input_norm, self.eps), bias=layer.qkv_bias)
            norms, keys, values = kept.get("norms"), *(kept[n if not scheme.quantized else f"window_{n}"] for n in ("keys", "values"))
            options = {"norms": norms, "norm_stride": 0 if norms is None else norms.shape[1], "eps": self.eps, "rotate": scheme.rotate}
            options |= {"q_weight": layer.q_norm, "k_weight": layer.k_norm, "keys": keys, "values": values, "places": keys.shape[2]}
            self.launches.append(raw.rotate_scale(self.heads, qkv, self.lengths, *tables, q, **options))
            results = self.lengths, tasks, out, None, workspace, arrived
            self.launches.append(raw.decode_attention(self.heads, scheme, plan, q, kept, *results, turn=i % 2))
            self.launches += products.launches(y, layer.o, middle, bias=layer.o_bias, residual=x)
            norm = layer.post_norm, self.eps
            self.launches += products.launches(middle, layer.gate_up, h, norm=norm, bias=layer.gate_up_bias, silu=True)
            self.launches += products.launches(h, layer.down, x, bias=layer.down_bias, residual=middle)
        if scheme.quantized:  # all layers at once: mostly it finds nothing
            self.launches.append(raw.pack_step(self.heads, scheme, self.lengths, cache.whole, len(cache.layers)))
        self.launches += products.launches(x, weights.head, self.logits, norm=(weights.norm, self.eps))
        self.launches += raw_dense.sample(self.logits, self.drawing, self.steps, self.tokens)
        self.launches.append(raw_dense.advance(self.lengths, self.steps))

    def run(self) -> None:
        for launch in self.launches:
            self.ops.run(launch)

    def graph(self) -> Any:
        """`run` as one CUDA graph, on CuPy alone: graph.launch(stream) takes a step. It holds the addresses of this step's arrays."""
        stream = self.ops.xp.cuda.Stream(non_blocking=True)
        for launch in self.launches:
            card.kernel(launch.source, launch.name, launch.defines)  # nothing can be compiled or loaded during a capture
        self.ops.xp.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            self.run()
            return stream.end_capture()


def unsupported(config: Config, scheme: Scheme, rows: int) -> str | None:
    """Why a step of so many rows cannot be raw kernels alone, or None."""
    if scheme.quantized and (reason := raw.unsupported(scheme, config.head_dim)):
        return reason
    if config.head_dim not in raw.HEAD_DIMS:
        return f"head_dim {config.head_dim} is not one of {', '.join(map(str, raw.HEAD_DIMS))}"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return f"hidden and intermediate size {config.hidden_size}, {config.intermediate_size} are not multiples of 8"
    if config.vocab_size > raw_dense.SAMPLE_VOCAB:
        return f"a vocabulary of {config.vocab_size} is more than {raw_dense.SAMPLE_VOCAB}"
    if rows > raw_batch.BATCH_TOKENS:
        return f"{rows} rows are more than {raw_batch.BATCH_TOKENS}"
    return None
