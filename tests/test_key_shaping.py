"""What shaped and pair-scaled schemes find out about a model, and what they make of its weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.presets import arrays
from minioscar.attention_inputs import record_attention_inputs
from minioscar.cache import Cache
from minioscar.config import Config
from minioscar.engine import load as load_engine
from minioscar.error_feedback import feedback_matrix
from minioscar.formats.rounding import quantize
from minioscar.hadamard import hadamard
from minioscar.key_shaping import key_statistics, pair_scales, scale_keys, shape_keys, shaping
from minioscar.model import Model
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES
from minioscar.quantized import from_plain
from minioscar.weights import load

from . import simt
from .tiny import relative, write_model


def model(tmp_path, **changes):
    folder = write_model(tmp_path / "m", 5, head_dim=64, **changes)
    ops, config = Reference(), Config.from_folder(folder)
    return folder, config, ops, load(folder, config, ops)


def test_attention_inputs_are_what_the_projections_of_the_first_layer_give(tmp_path):
    _, config, ops, weights = model(tmp_path, model_type="qwen2")
    seen, ids = [], np.array([3, 1, 4, 1, 5])
    record_attention_inputs(weights, config, ops, ids, seen.append)
    assert len(seen) == config.num_layers
    layer = weights.layers[0]
    qkv = ops.linear(
        ops.embed(weights.embed, ids), layer.qkv, layer.qkv_bias, norm=(layer.input_norm, config.rms_norm_eps)
    )
    q, k, v = np.split(qkv.reshape(5, -1, 64), [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
    cos, sin = (table[:5] for table in config.rope.tables(8))
    for got, want in zip(seen[0], (ops.rope(q, cos, sin), ops.rope(k, cos, sin), v), strict=True):
        np.testing.assert_array_equal(got, want)


def test_statistics_are_shared_by_rope_pairs_and_follow_the_weights(tmp_path):
    _, config, ops, weights = model(tmp_path)
    before = key_statistics(weights, config, ops)
    for found in before:
        assert found.shape == (config.num_layers, config.num_kv_heads, 64) and (found > 0).all()
        np.testing.assert_array_equal(found[..., :32], found[..., 32:])
    pair = [3, 35]  # rows of one RoPE pair, last layer: of one q head of the second kv head, and of the first kv head
    weights.layers[-1].qkv[np.array(pair) + 64 * (config.num_heads - 1)] = 0
    weights.layers[-1].qkv[np.array(pair) + config.q_size] = 0
    for found, old, head in zip(key_statistics(weights, config, ops), before, (1, 0), strict=True):
        changed = np.argwhere(found != old)
        assert {tuple(at) for at in changed} == {(config.num_layers - 1, head, i) for i in pair}
        assert (found[-1, head, pair] < old[-1, head, pair]).all()


def test_a_bias_of_keys_that_rope_hardly_turns_does_not_count_as_variance(tmp_path):
    _, config, ops, weights = model(tmp_path, model_type="qwen2")
    slowest = [31, 63]
    weights.layers[0].qkv_bias[config.q_size + np.array(slowest)] = 0
    before = key_statistics(weights, config, ops).variance[0, 0]
    weights.layers[0].qkv_bias[config.q_size + np.array(slowest)] = 10 * np.sqrt(before[slowest])
    after = key_statistics(weights, config, ops).variance[0, 0]
    np.testing.assert_allclose(after, before, rtol=0.02)


def test_pair_scales_go_half_way_to_equal_variance(seed):
    v = np.exp(np.random.default_rng(seed).normal(size=(2, 3, 64)) * 2)
    s = pair_scales(v)
    np.testing.assert_allclose(np.square(s).mean(axis=-1), 1)
    floored = v + 0.1 * v.mean(axis=-1, keepdims=True)
    after = floored * s**2
    np.testing.assert_allclose(np.log(after).std(axis=-1), np.log(floored).std(axis=-1) / 2)
    np.testing.assert_array_equal(pair_scales(np.zeros((1, 64))), np.ones((1, 64)))


def test_a_shaped_engine_has_the_feedback_of_every_layer_and_others_have_none(tmp_path):
    folder, config, ops, weights = model(tmp_path)
    prepared = load_engine(folder, "k4v2", "cpu", tokenizer=False).model.weights
    energy = key_statistics(weights, config, ops).energy
    for layer, table, heads in zip(prepared.layers, prepared.key_feedback, energy, strict=True):
        want = np.stack([feedback_matrix(head) for head in heads])
        # V is rotated in the engine's weights
        np.testing.assert_allclose(layer.key_feedback, want, atol=1e-4 * abs(want).max())
        assert np.shares_memory(layer.key_feedback, table)
    assert load_engine(folder, "oscar", "cpu", tokenizer=False).model.weights.layers[0].key_feedback is None
    shaped = shape_keys(weights, config, SCHEMES["k4v2"], ops)
    assert shaped.layers[0].qkv is weights.layers[0].qkv and weights.layers[0].key_feedback is None


def test_feedback_of_scaled_keys_weighs_what_the_scaled_queries_are(tmp_path):
    """energy / s^2: measured again on the scaled weights it is the same."""
    _, config, ops, weights = model(tmp_path)
    statistics = key_statistics(weights, config, ops)
    scales, feedback = shaping(statistics, SCHEMES["int2"], config)
    again = key_statistics(shape_keys(weights, config, SCHEMES["int2"], ops), config, ops)
    np.testing.assert_allclose(again.energy, statistics.energy / scales**2, rtol=1e-3)
    np.testing.assert_allclose(again.variance, statistics.variance * scales**2, rtol=1e-3)
    np.testing.assert_allclose(feedback, feedback_matrix(again.energy), atol=1e-3 * abs(feedback).max())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("in_place", [False, True])
def test_scaled_keys_leave_logits_as_they_were(tmp_path, family, in_place):
    """Float32 weights: to rounding. Weights that are not scaled are shared, the others copied unless in_place."""
    _, config, ops, weights = model(tmp_path, model_type=family)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 50)

    def logits(of) -> np.ndarray:
        cache = Cache(config, SCHEMES["bf16"], 1, 64, ops)
        return Model(config, of, SCHEMES["bf16"], ops).forward(ids, cache, cache.batch_for([0], [50]), every=True)

    want, untouched = logits(weights), [x.copy() for x in arrays(weights)]
    scaled = shape_keys(weights, config, SCHEMES["int2"], ops, in_place=in_place)
    assert relative(logits(scaled), want) < 1e-4
    old, new = weights.layers[0], scaled.layers[0]
    what = "k_norm" if config.qk_norm else "qkv"
    assert (getattr(new, what) is getattr(old, what)) == in_place and new.o is old.o
    assert in_place or all(map(np.array_equal, arrays(weights), untouched))
    assert relative(getattr(new, what), untouched_of(untouched, weights, getattr(old, what))) > 0.01  # it is scaled


@pytest.mark.parametrize("in_place", [False, True])
def test_scales_of_quantized_matrices_go_to_their_rows(tmp_path, in_place):
    _, config, ops, weights = model(tmp_path)
    layers = [replace(layer, qkv=from_plain(quantize(layer.qkv, "int8", np))) for layer in weights.layers]
    weights, before = replace(weights, layers=tuple(layers)), layers[0].qkv
    row_scale, want = before.row_scale.copy(), before.dequantize()
    scales = pair_scales(np.exp(np.random.default_rng(3).normal(size=(config.num_layers, config.num_kv_heads, 64))))
    after = scale_keys(weights, config, scales, ops, in_place).layers[0].qkv
    rows = np.concatenate([1 / scales[0].repeat(2, axis=0), scales[0], np.ones_like(scales[0])]).ravel()
    np.testing.assert_allclose(after.dequantize(), want * rows[:, None], rtol=1e-6)
    assert after.codes is before.codes and np.array_equal(before.row_scale, row_scale) != in_place


def untouched_of(copies: list[np.ndarray], weights, array: np.ndarray) -> np.ndarray:
    return next(copy for copy, x in zip(copies, arrays(weights), strict=True) if x is array)


def test_scales_of_a_back_end_in_bf16_are_nearly_those_of_float32(tmp_path):
    """A prompt cache that one of them saved holds keys scaled by its own; the other's queries are divided by these."""
    if reason := simt.missing():
        pytest.skip(reason)
    from .simt.backend import Simt

    folder, config, ops, weights = model(tmp_path)
    other = Simt()
    scales = [
        shaping(key_statistics(of, config, on), SCHEMES["int2"], config).scales
        for of, on in ((weights, ops), (load(folder, config, other), other))
    ]
    np.testing.assert_allclose(scales[1], scales[0], rtol=0.01)


def test_a_model_without_queries_or_keys_has_no_feedback_and_no_scales(tmp_path):
    _, config, ops, weights = model(tmp_path)
    weights.layers[0].qkv[:] = 0
    scales, feedback = shaping(key_statistics(weights, config, ops), SCHEMES["int2"], config)
    assert (scales[0] == 1).all() and abs(feedback[0]).max() < 1e-12


def test_feedback_matrices_of_several_heads_are_those_of_each(seed):
    energy = np.random.default_rng(seed).uniform(0.1, 10, (2, 3, 64))
    together = feedback_matrix(energy)
    for at in np.ndindex(2, 3):
        np.testing.assert_array_equal(together[at], feedback_matrix(energy[at]))
    # the inverse of M = H.diag(e).H is H.diag(1 / e).H
    h, e = hadamard(64).astype(np.float64), energy[0, 0] + 0.03 * energy[0, 0].mean()
    upper = np.linalg.cholesky(np.linalg.inv((h * e) @ h)).T
    np.testing.assert_allclose(together[0, 0], np.triu(upper / np.diag(upper)[:, None], 1), atol=1e-6)


def test_the_pass_over_random_tokens_is_one_that_a_back_end_prepares(tmp_path):
    class Listing(Reference):
        def prepare(self, model, cache, passes, rows, progress):
            prepared.extend(batch.counts for batch in passes)

    folder, config, _, _ = model(tmp_path)
    prepared, ops = [], Listing()
    key_statistics(load(folder, config, ops), config, ops)
    assert prepared == [(256,)]
