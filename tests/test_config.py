"""config.json in every supported spelling, and what is refused by name."""

from __future__ import annotations

import json

import pytest

from minioscar.config import Config
from minioscar.errors import UserError

from .tiny import CONFIG


def made(**changes) -> Config:
    return Config.from_dict({**CONFIG, **changes})


def test_switches_of_the_four_families():
    flags = {}
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        c = made(model_type=kind)
        flags[kind] = (c.qkv_bias, c.output_bias, c.qk_norm)
    assert flags == {"llama": (False,) * 3, "mistral": (False,) * 3, "qwen2": (True, False, False), "qwen3": (False, False, True)}
    assert made(attention_bias=True).output_bias and made(attention_bias=True).qkv_bias
    assert made(model_type="qwen3", attention_bias=True).output_bias


def test_head_dim_and_kv_heads_have_their_usual_defaults():
    c = made(head_dim=None, num_key_value_heads=None)
    assert (c.head_dim, c.num_kv_heads) == (16, 4)
    assert made(model_type="qwen3", head_dim=None).head_dim == 128


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"model_type": "mistral", "sliding_window": 300}, 300),
        ({"model_type": "mistral", "sliding_window": None}, 1024),
        ({"model_type": "mistral", "max_position_embeddings": 32768}, 4096),
        ({"model_type": "qwen2", "sliding_window": 300, "use_sliding_window": False}, 1024),
        ({"model_type": "qwen2", "sliding_window": 300, "use_sliding_window": True}, 300),
        ({"model_type": "qwen2", "sliding_window": 300, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 1024),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
    ],
)
def test_positions_end_where_full_attention_stops_being_exact(changes, positions):
    assert made(**changes).max_positions == positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; minioscar runs llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequenceClassification'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported; minioscar has default, linear"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope option factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "rope option factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope option low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}}, "must be below"),
        ({"rope_scaling": "yarn"}, "must be an object"),
        ({"rope_theta": 1.0}, "rope option rope_theta 1.0 is not supported; it must be at least 1.001"),
        ({"layer_types": ["linear_attention"]}, "layer type 'linear_attention'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, not 0"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number"),
        ({"vocab_size": None}, "vocab_size must be"),
        ({"num_attention_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": 6, "head_dim": None, "num_key_value_heads": 2}, "hidden_size 64 is not a multiple"),
        ({"head_dim": 30}, "head_dim 30"),
        ({"head_dim": 65536}, "head_dim 65536 is not supported; it must be a multiple of 8, at most 2048"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers 2147483647 is not supported; it must be at most 4096"),
        ({"architectures": True}, "architectures must be a list, not True"),
        ({"layer_types": "full_attention"}, "layer_types must be a list"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_what_is_not_implemented_or_malformed_is_refused_by_name(changes, message):
    with pytest.raises(UserError) as error:
        made(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00", "[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        Config.from_folder(tmp_path)


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        Config.from_folder(tmp_path)


def test_parameters_are_counted_as_the_checkpoint_has_them(tmp_path):
    import math

    from minioscar.weights import expected

    for changes in ({}, {"model_type": "qwen2"}, {"model_type": "qwen3"}, {"attention_bias": True}, {"tie_word_embeddings": True}):
        c = made(**changes)
        assert c.parameters() == sum(math.prod(shape) for shape in expected(c).values())


def test_both_spellings_of_rope_are_one():
    old = made(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    new = {**CONFIG, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    del new["rope_theta"]
    assert Config.from_dict(json.loads(json.dumps(new))).rope == old.rope
