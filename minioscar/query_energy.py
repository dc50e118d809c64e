"""What a model's queries weigh keys with, found without any text, and what shaped rounding makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .attention_inputs import AttentionInputs, record_attention_inputs
from .config import Config
from .error_feedback import feedback_matrix
from .ops.reference import Reference
from .weights import Weights

TOKENS = 256  # twice or half as many measure the same to within the noise: docs/fidelity.md


def query_energy(weights: Weights, config: Config, ops: Reference) -> np.ndarray:
    """Mean square of the queries in each channel, over both channels of a RoPE pair and the q heads of a kv head.

    float32 [layers, kv_heads, head_dim]. The model reads TOKENS token ids drawn from its whole vocabulary with a fixed
    seed: no calibration text, and the same numbers whatever it is used for later. RoPE turns the two channels of a pair
    (i, i + d/2) into each other, so that their mean, unlike either, does not depend on positions.
    """
    found: list[np.ndarray] = []

    def record(inputs: AttentionInputs) -> None:
        energy = (inputs.q * inputs.q).mean(axis=0).reshape(
            config.num_kv_heads, -1, 2, config.head_dim // 2
        ).mean(axis=(1, 2))
        found.append(np.concatenate([energy, energy], axis=-1))

    ids = np.random.default_rng(0).integers(0, config.vocab_size, min(TOKENS, config.max_context))
    record_attention_inputs(weights, config, ops, ids, record)
    return np.stack(found)


def shape_keys(weights: Weights, config: Config, ops: Reference) -> Weights:
    """The weights with the `key_feedback` of every layer, float32 [kv_heads, head_dim, head_dim]; all other arrays are
    shared."""
    energies = query_energy(weights, config, ops)
    feedback = [ops.xp.asarray(np.stack([feedback_matrix(energy) for energy in layer])) for layer in energies]
    layers = (replace(layer, key_feedback=matrix) for layer, matrix in zip(weights.layers, feedback, strict=True))
    return replace(weights, layers=tuple(layers))
