"""What shaped schemes find out about a model."""

from __future__ import annotations

import numpy as np

from minioscar.attention_inputs import record_attention_inputs
from minioscar.config import Config
from minioscar.engine import load as load_engine
from minioscar.error_feedback import feedback_matrix
from minioscar.ops.reference import Reference
from minioscar.query_energy import query_energy, shape_keys
from minioscar.weights import load

from .tiny import write_model


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


def test_query_energy_is_shared_by_rope_pairs_and_scales_with_the_weights(tmp_path):
    _, config, ops, weights = model(tmp_path)
    energy = query_energy(weights, config, ops)
    assert energy.shape == (config.num_layers, config.num_kv_heads, 64) and (energy > 0).all()
    np.testing.assert_array_equal(energy[..., :32], energy[..., 32:])
    pair = [3, 35]  # rows of one RoPE pair of one q head of the second kv head, last layer
    rows = np.array(pair) + 64 * (config.num_heads - 1)
    weights.layers[-1].qkv[rows] = 0
    without = query_energy(weights, config, ops)
    changed = np.argwhere(without != energy)
    assert {tuple(at) for at in changed} == {(config.num_layers - 1, 1, i) for i in pair}
    assert (without[-1, 1, pair] < energy[-1, 1, pair]).all()


def test_a_shaped_engine_has_the_feedback_of_every_layer_and_others_have_none(tmp_path):
    folder, config, ops, weights = model(tmp_path)
    layers = load_engine(folder, "int2-shaped", "cpu", tokenizer=False).model.weights.layers
    energy = query_energy(weights, config, ops)
    for layer, heads in zip(layers, energy, strict=True):
        want = np.stack([feedback_matrix(head) for head in heads])
        # V is rotated in the engine's weights
        np.testing.assert_allclose(layer.key_feedback, want, atol=1e-4 * abs(want).max())
    assert load_engine(folder, "int2", "cpu", tokenizer=False).model.weights.layers[0].key_feedback is None
    shaped = shape_keys(weights, config, ops)
    assert shaped.layers[0].qkv is weights.layers[0].qkv and weights.layers[0].key_feedback is None
