"""A layer of experts by kernels. Nothing here depends on which experts the tokens take, so a step is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ops import linear
from ..plans import BATCH_TOKENS
from ..quantized import Quantized
from . import plans, reference
from .plans import Product

if TYPE_CHECKING:
    from ..config import Config
    from ..weights import Layer

Array = Any


def forward(ops: Any, x: Array, layer: Layer, config: Config, alone: bool, lengths: Array | None) -> Array:
    """`reference.forward`; x itself, to which the experts have added. ops: the back end. lengths: of a decode step,
    int32 [tokens], below 0 where a row is not in use."""
    e, norm = config.experts, (layer.post_norm, config.rms_norm_eps)
    if plans.unsupported(config):
        return reference.forward(ops, x, layer, config, alone)
    out, residual = (ops.xp.empty_like(x), None) if alone else (x, x)
    if plans.are_few(len(x), config, ops.card):
        logits = ops.linear(x, layer.router, norm=norm, float32=True)
        h = ops.xp.empty((len(x) * e.per_token, config.intermediate_size), ops.dtype)
        ops.run(Product(x, layer.gate_up, h, True, norm=norm).launch(logits, e, ops.card, lengths))
        ops.run(Product(h, layer.down, out, False, residual=residual).launch(logits, e, ops.card, lengths))
        return out
    for chunk in (slice(i, i + plans.EXPERT_TOKENS) for i in range(0, len(x), plans.EXPERT_TOKENS)):
        parts = _parts(ops, x[chunk], layer, config, lengths)
        ops.run(plans.combine(parts, out[chunk], e, lengths, alone))
    return out


def _parts(ops: Any, x: Array, layer: Layer, config: Config, lengths: Array | None) -> Array:
    """What each pair of a token and one of its experts adds, float32 [pairs, hidden]."""
    e, normed, coded = config.experts, ops.xp.empty_like(x), isinstance(layer.gate_up, Quantized)
    ops.run(linear.rms_norm(x, layer.post_norm, config.rms_norm_eps, normed))
    routes = plans.Routes.allocate(ops.xp, len(x), e, ops.card, coded)
    for launch in routes.launches(_router_logits(ops, normed, layer.router), e, lengths):
        ops.run(launch)
    h = ops.xp.empty((len(routes.chosen), config.intermediate_size), ops.dtype)
    if routes.of_warpgroups:
        normed, given = ops.xp.empty((len(h), x.shape[1]), ops.dtype), normed
        ops.run(plans.gather(given, routes, e, normed, h))
    parts = ops.xp.empty((len(h), config.hidden_size), np.float32)
    for given, weight, out, silu in ((normed, layer.gate_up, h, True), (h, layer.down, parts, False)):
        if coded and routes.of_warpgroups:  # one matrix after the other: gate and up of all experts are large
            weight = ops.dense(weight).reshape(e.count, -1, weight.shape[1])
        ops.run(Product(given, weight, out, silu).launch(routes, e, ops.card))
        del weight
    return parts


def _router_logits(ops: Any, normed: Array, router: Array) -> Array:
    if len(normed) <= BATCH_TOKENS:
        return ops.linear(normed, router, float32=True)
    logits = ops.xp.zeros((len(normed), len(router)), np.float32)
    ops.add_product(logits, normed, router)
    return logits
