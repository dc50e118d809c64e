"""Together's OSCAR (arXiv 2605.17757): rotations of keys and values, calibrated on what a model's attention does.

The authors calibrate on prompts of a benchmark; here the model writes the text itself, so that no other one is seen.
One rotation a layer and kv head, as their later code has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..attention_inputs import AttentionInputs, record_attention_inputs
from ..cache import Cache
from ..config import Config
from ..errors import UserError
from ..hadamard import hadamard
from ..model import Model
from ..ops.reference import Reference
from ..oscar import SCHEMES
from ..quantized import Quantized
from ..weights import Layer, Weights

Array = Any
ROWS, TOKENS = 16, 256  # samples and tokens of each


def calibrate(weights: Weights, config: Config, ops: Reference) -> Weights:
    """The weights with `rotations` in every layer, that of values folded into v_proj and o_proj; the rest is shared."""
    if any(isinstance(matrix, Quantized) for layer in weights.layers for matrix in (layer.qkv, layer.o)):
        why = "its rotation of values is folded into v_proj and o_proj, which quantized weights cannot take"
        raise UserError(f"--kv oscar-cov: {why}; use another scheme, or leave --weights out")
    seen = [Moments() for _ in weights.layers]
    for ids in samples(weights, config, ops):
        layers = iter(seen)
        record_attention_inputs(weights, config, ops, ids, lambda inputs: next(layers).add(inputs))  # noqa: B023
    folded = []
    for layer, moments in zip(weights.layers, seen, strict=True):
        rotations = ops.xp.asarray(np.stack([mixed(covariance) for covariance in moments.covariances()]))
        folded.append(replace(fold(layer, rotations[1], config, ops), rotations=rotations))
    return replace(weights, layers=tuple(folded))


class Moments:
    """Of one layer: what its queries look along, and the keys and values that they meet."""

    def __init__(self) -> None:
        self.queries: Array = 0.0  # sum of q^T q over tokens and the q heads of a kv head, float64 [kv_heads, d, d]
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []  # k and v, float32 [kv_heads, tokens, d], of each sample

    def add(self, inputs: AttentionInputs) -> None:
        k, v = (x.swapaxes(0, 1) for x in (inputs.k, inputs.v))
        q = inputs.q.astype(np.float64).swapaxes(0, 1).reshape(len(k), -1, k.shape[-1])
        self.queries = self.queries + q.swapaxes(1, 2) @ q
        self.pairs.append((k, v))

    def covariances(self) -> tuple[np.ndarray, np.ndarray]:
        """Of keys: the queries' moment C. Of values: the sum of w v^T v, w = k C k^T. Up to a factor."""
        k, v = (np.concatenate(x, axis=1).astype(np.float64) for x in zip(*self.pairs, strict=True))
        weight = ((k @ self.queries) * k).sum(axis=-1, keepdims=True)
        return self.queries, (v * weight).swapaxes(1, 2) @ v


def samples(weights: Weights, config: Config, ops: Reference) -> np.ndarray:
    """What the model writes at temperature 1 after a random token: int64 [ROWS, at most TOKENS], always the same."""
    rng, length = np.random.default_rng(0), min(TOKENS, config.max_context)
    bf16 = SCHEMES["bf16"]
    model, cache = Model(config, weights, bf16, ops), Cache(config, bf16, ROWS, length, ops)
    ids = rng.integers(0, config.vocab_size, (1, ROWS))
    while len(ids) < length:
        logits = model.forward(ids[-1], cache, cache.batch_for(range(ROWS), [1] * ROWS))
        ids = np.concatenate([ids, (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)[None]])
    return ids.T


def mixed(covariance: np.ndarray) -> np.ndarray:
    """Symmetric [kv_heads, d, d] -> the rotation U H P, float32, to be multiplied from the right. U: the eigenvectors.

    P puts channel d - 1 - i where i with its bits reversed is, if d is a power of two; that matters where a head has
    several groups.
    """
    d = covariance.shape[-1]
    order = np.arange(d)
    if d & (d - 1) == 0:
        order = d - 1 - np.array([int(f"{i:0{d.bit_length() - 1}b}"[::-1], 2) for i in order])
    _, vectors = np.linalg.eigh(covariance)
    return (vectors @ hadamard(d)[:, order]).astype(np.float32)


def fold(layer: Layer, rotation: Array, config: Config, ops: Reference) -> Layer:
    """v' = v R for every kv head, undone by o_proj: the model computes what it did. Copies of what changes.

    rotation: [kv_heads, d, d].
    """
    xp, dim = ops.xp, config.head_dim
    start = config.q_size + config.kv_size  # where the rows of v begin

    def turned(rows: Array, matrices: Array) -> Array:
        """[heads * d, n]: each head by its matrix, transposed."""
        heads = rows.astype(xp.float32).reshape(len(matrices), dim, -1)
        return (matrices.swapaxes(1, 2) @ heads).reshape(rows.shape).astype(rows.dtype)

    qkv, bias = layer.qkv.copy(), layer.qkv_bias
    qkv[start:] = turned(qkv[start:], rotation)
    if bias is not None:
        bias = bias.copy()
        bias[start:] = turned(bias[start:, None], rotation)[:, 0]
    of_q_heads = xp.repeat(rotation, config.num_heads // config.num_kv_heads, axis=0)
    return replace(layer, qkv=qkv, qkv_bias=bias, o=xp.ascontiguousarray(turned(layer.o.T, of_q_heads).T))
