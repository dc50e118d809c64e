"""Arrays of a model that are on the back end already -> what `--weights` makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..backend import Backend
from ..config import Config
from ..staging import MLP, by_expert, quantized
from ..weights import Layer, Weights

Matrix = Any  # an array, or a Quantized


def quantize(weights: Weights, config: Config, ops: Backend) -> Weights:
    """Arrays on the back end -> what `config.weights` makes of them; `weights` keeps its own."""
    layers = tuple(quantize_layer(layer, config, ops) for layer in weights.layers)
    return replace(weights, layers=layers, head=quantize_head(weights, config, ops), quantized=True)


def quantize_layer(layer: Layer, config: Config, ops: Backend) -> Layer:
    fields = {field: getattr(layer, field) for field in ("qkv", "o", "gate_up", "down")}
    rows = {field: x.reshape(-1, x.shape[-1]) for field, x in fields.items()}
    kept = {field: ops.quantized(quantized(x, config.weights, field, ops.xp)) for field, x in rows.items()}
    return replace(layer, **{field: by_expert(x, config) if field in MLP else x for field, x in kept.items()})


def quantize_head(weights: Weights, config: Config, ops: Backend) -> Matrix:
    """The last projection; one that is the embedding stays it."""
    if config.weights is None or weights.head is weights.embed:
        return weights.head
    return ops.quantized(quantized(weights.head, config.weights, "head", ops.xp))
