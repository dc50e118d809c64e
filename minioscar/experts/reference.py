"""A layer of experts in array code: what it means, and what runs where there are no kernels for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..quantized import of_expert

if TYPE_CHECKING:
    from ..config import Config, Experts
    from ..weights import Layer

Array = Any


def forward(ops: Any, x: Array, layer: Layer, config: Config, alone: bool) -> Array:
    """x + sum over a token's experts e of weight_e * down_e(silu(gate_e(h)) * up_e(h)), h = rms_norm(x).

    ops: the back end. x [tokens, hidden]. alone: the sum without x. As Qwen3MoeSparseMoeBlock of transformers 5.24,
    with the router's logits in float32.
    """
    xp, h = ops.xp, ops.rms_norm(x, layer.post_norm, config.rms_norm_eps)
    chosen, weights = route(ops.product(h, layer.router, True), config.experts, xp)
    y = xp.zeros(x.shape, np.float32) if alone else x.astype(xp.float32)
    for expert in xp.unique(chosen):
        token, place = xp.nonzero(chosen == expert)  # a token takes an expert once
        matrices = (of_expert(weight, int(expert), config.experts.count) for weight in (layer.gate_up, layer.down))
        gate_up, down = map(ops.dense, matrices)
        part = ops.product(ops.silu_mul(ops.product(h[token], gate_up, False)), down, True)
        y[token] += weights[token, place, None] * part
    return y.astype(x.dtype)


def route(logits: Array, experts: Experts, xp: Any = np) -> tuple[Array, Array]:
    """The experts of each token, the likeliest first, and their weights: int64 and float32 [tokens, per_token].

    logits float32 [tokens, experts]. A weight is the softmax over all experts, or over the chosen ones where they are
    `normalized`. Of equal logits the first counts as the larger.
    """
    chosen = xp.argsort(-logits, axis=-1, kind="stable")[:, : experts.per_token]
    p = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = xp.take_along_axis(p, chosen, axis=-1)
    total = (weights if experts.normalized else p).sum(axis=-1, keepdims=True)
    return chosen, weights / total
