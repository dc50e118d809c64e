"""What a model's queries weigh keys with and how keys vary, found without any text; what schemes make of it.

A shaped scheme feeds the rounding errors of keys back (error_feedback.py), a pair-scaled one has RoPE pairs of keys
scaled in the weights, so that what varies most in a group is rounded less coarsely beside the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .attention_inputs import AttentionInputs, record_attention_inputs
from .config import Config
from .error_feedback import feedback_matrix
from .ops.reference import Reference
from .oscar import Scheme
from .quantized import Quantized
from .weights import Layer, Weights, rotate_values

Matrix = Any  # an array, or a Quantized
TOKENS = 256  # twice or half as many measure the same to within the noise: docs/fidelity.md
RUN = 32  # tokens of a group, within which keys vary


class KeyStatistics(NamedTuple):
    """float64 [layers, kv_heads, head_dim], equal in both channels of a RoPE pair (i, i + d/2): RoPE turns them into
    each other, so that their mean, unlike either, does not depend on positions."""

    energy: np.ndarray  # mean square of the queries, over the q heads of a kv head
    variance: np.ndarray  # of the keys within RUN tokens: a constant bias does not count


class Shaping(NamedTuple):
    """What a scheme makes of the statistics; the first axis is that of layers."""

    scales: np.ndarray | None  # float64 [layers, kv_heads, head_dim]: keys are multiplied by them, queries divided
    feedback: np.ndarray | None  # float32 [layers, kv_heads, head_dim, head_dim]: `feedback_matrix`

    def of_layer(self, index: int) -> Shaping:
        """Without the axis of layers."""
        return Shaping(*(x if x is None else x[index] for x in self))


def key_statistics(weights: Weights, config: Config, ops: Reference, progress: bool = False) -> KeyStatistics:
    """The model reads TOKENS token ids drawn from its whole vocabulary with a fixed seed: no calibration text, and the
    same numbers whatever it is used for later."""
    from tqdm import tqdm

    energies, variances = [], []

    def by_pairs(x: np.ndarray) -> np.ndarray:
        """Mean square over tokens, heads and the two channels of a pair: [tokens, heads, d] -> [kv_heads, d]."""
        square = np.square(x, dtype=np.float64).mean(axis=0)
        pairs = square.reshape(config.num_kv_heads, -1, 2, config.head_dim // 2).mean(axis=(1, 2))
        return np.concatenate([pairs, pairs], axis=-1)

    def record(inputs: AttentionInputs) -> None:
        energies.append(by_pairs(inputs.q))
        run = min(RUN, len(inputs.k))
        runs = inputs.k[: len(inputs.k) // run * run].reshape(-1, run, *inputs.k.shape[1:]).astype(np.float64)
        variances.append(by_pairs((runs - runs.mean(axis=1, keepdims=True)).reshape(-1, *inputs.k.shape[1:])))
        bar.update()

    ids = np.random.default_rng(0).integers(0, config.vocab_size, min(TOKENS, config.max_context))
    hidden = None if progress else True
    with tqdm(total=config.num_layers, desc="shape keys", unit="layer", leave=False, disable=hidden) as bar:
        record_attention_inputs(weights, config, ops, ids, record, progress)
    return KeyStatistics(np.stack(energies), np.stack(variances))


def pair_scales(variance: np.ndarray) -> np.ndarray:
    """What keys are multiplied by, half way to equal variance: v^(-1/4), v with a tenth of its mean added, then of mean
    square 1 over the channels. variance float64 [..., head_dim]; 1 where nothing varies."""
    mean = variance.mean(axis=-1, keepdims=True)
    scales = np.where(mean > 0, variance + 0.1 * mean, 1) ** -0.25
    return scales / np.sqrt(np.square(scales).mean(axis=-1, keepdims=True))


def shaping(statistics: KeyStatistics, scheme: Scheme, config: Config) -> Shaping:
    """Behind a QK-norm, whose weights all heads share, one scale serves all of them: of the variance's mean."""
    energy, variance = statistics
    scales = None
    if scheme.pair_scaled:
        if config.qk_norm:
            variance = np.broadcast_to(variance.mean(axis=1, keepdims=True), variance.shape)
        scales = pair_scales(variance)
        energy = energy / np.square(scales)
    return Shaping(scales, feedback_matrix(energy) if scheme.shaped else None)


def scale_keys(weights: Weights, config: Config, scales: np.ndarray, ops: Reference, in_place: bool = False) -> Weights:
    """Keys times scales and queries divided by them, folded into what makes them: logits are what they were.

    scales float64 [layers, kv_heads, head_dim], equal in both channels of a RoPE pair, which makes them commute with
    RoPE; behind a QK-norm equal in all heads, too, and folded into its weights, else into the rows of q_proj and
    k_proj (those of quantized matrices have a float32 scale each). Arrays are shared and copied as in `rotate_values`.
    """
    groups = config.num_heads // config.num_kv_heads

    def scaled(x: Matrix | None, factors: np.ndarray) -> Matrix | None:
        if isinstance(x, Quantized):
            return replace(x, row_scale=scaled(x.row_scale, factors))
        if x is not None:
            x = x if in_place else x.copy()
            ops.scale_rows(x, factors)
        return x

    def fold(layer: Layer, of: np.ndarray) -> Layer:
        if config.qk_norm:
            return replace(layer, q_norm=scaled(layer.q_norm, 1 / of[0]), k_norm=scaled(layer.k_norm, of[0]))
        kept = of[config.key_heads[1] :][: config.num_kv_heads]
        rows = np.concatenate([1 / kept.repeat(groups, axis=0), of]).ravel()  # of all q heads, then of all k heads
        return replace(layer, qkv=scaled(layer.qkv, rows), qkv_bias=scaled(layer.qkv_bias, rows))

    return replace(weights, layers=tuple(map(fold, weights.layers, scales)))


def prepared(weights: Weights, config: Config, scheme: Scheme, ops: Reference, progress: bool = False) -> Weights:
    """Loaded weights as a model with this scheme wants them, in their arrays, which are the caller's no more: copies
    beside them would leave holes in a card's memory that no cache fits into (3 GB of a Qwen3-8B)."""
    weights = rotate_values(weights, config, ops, in_place=True) if scheme.rotate else weights
    weights = shape_keys(weights, config, scheme, ops, in_place=True, progress=progress)
    return scheme.prepare(weights, config, ops)


def shape_keys(
    weights: Weights, config: Config, scheme: Scheme, ops: Reference, *, in_place: bool = False, progress: bool = False
) -> Weights:
    """The weights as a shaped or pair-scaled scheme wants them: `key_feedback`, and scales in what makes q and k.

    Other arrays are shared; those that are scaled are copies, or in_place what they were.
    """
    if not (scheme.shaped or scheme.pair_scaled):
        return weights
    found = shaping(key_statistics(weights, config, ops, progress), scheme, config)
    if found.scales is not None:
        weights = scale_keys(weights, config, found.scales, ops, in_place)
    if found.feedback is None:
        return weights
    feedback = ops.xp.asarray(found.feedback)
    layers = tuple(replace(layer, key_feedback=of) for layer, of in zip(weights.layers, feedback, strict=True))
    return replace(weights, layers=layers, key_feedback=feedback)
