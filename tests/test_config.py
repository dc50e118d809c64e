"""config.json in every supported spelling, and what is refused by name."""

from __future__ import annotations

import json

import pytest

from minioscar.config import Config, Experts
from minioscar.errors import UserError

from .tiny import CONFIG, MOE


def made(**changes) -> Config:
    return Config.from_dict({**CONFIG, **changes})


FAMILIES = "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"


def test_switches_of_the_families():
    flags = {}
    for kind in FAMILIES:
        c = made(model_type=kind)
        flags[kind] = (c.qkv_bias, c.output_bias, c.qk_norm)
    assert flags == {
        "llama": (False,) * 3, "mistral": (False,) * 3, "qwen2": (True, False, False), "qwen3": (False, False, True),
        "qwen3_moe": (False, False, True),
    }  # fmt: skip
    assert made(attention_bias=True).output_bias and made(attention_bias=True).qkv_bias
    assert made(model_type="qwen3", attention_bias=True).output_bias


def test_head_dim_and_kv_heads_have_their_usual_defaults():
    c = made(head_dim=None, num_key_value_heads=None)
    assert (c.head_dim, c.num_kv_heads) == (16, 4)
    assert made(model_type="qwen3", head_dim=None).head_dim == 128
    assert made(model_type="qwen3_moe", head_dim=None).head_dim == 16  # its class has no head_dim of its own


def test_keys_left_out_mean_what_the_family_s_class_says():
    shapes = {}
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        c = Config.from_dict({"model_type": kind})
        shapes[kind] = c.vocab_size, c.intermediate_size, c.num_kv_heads, c.max_positions, c.window
        assert (
            c.hidden_size, c.num_layers, c.num_heads, c.head_dim, c.rms_norm_eps, c.rope.theta
        ) == (4096, 32, 32, 128, 1e-6, 10000)
        assert not c.tie_embeddings
        assert Config.from_dict({"model_type": kind, "num_key_value_heads": None}).num_kv_heads == 32
    assert shapes == {
        "llama": (32000, 11008, 32, 2048, None), "mistral": (32000, 14336, 8, 131072, 4096),
        "qwen2": (151936, 22016, 32, 32768, None), "qwen3": (151936, 22016, 32, 32768, None),
    }  # fmt: skip


def test_keys_of_experts_that_are_left_out_mean_what_the_class_says():
    c = Config.from_dict({"model_type": "qwen3_moe"})
    assert (c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim) == (2048, 24, 32, 4, 64)
    assert (c.vocab_size, c.max_positions, c.rms_norm_eps, c.window) == (151936, 32768, 1e-6, None)
    assert c.intermediate_size == 768 and c.experts == Experts(128, 8, False)
    assert made(**MOE).experts == Experts(6, 2, False) and made(**MOE).intermediate_size == 24
    assert made(**MOE, norm_topk_prob=True).experts.normalized
    assert made(**{**MOE, "num_experts": None}, num_local_experts=6, mlp_only_layers=None).experts.count == 6
    assert made(**MOE, num_local_experts=6, decoder_sparse_step=1, mlp_only_layers=[]) == made(**MOE)
    assert all(made(model_type=kind, num_experts=0).experts is None for kind in FAMILIES[:-1])


def test_biases_are_those_that_the_family_s_class_has():
    """What a class does not read means nothing; a checkpoint that does have such tensors is refused by their names."""
    found = {}
    for kind in FAMILIES:
        c = made(model_type=kind, attention_bias=True, mlp_bias=True)
        found[kind] = c.qkv_bias, c.output_bias, c.mlp_bias
    assert found == {
        "llama": (True,) * 3, "mistral": (False,) * 3, "qwen2": (True, False, False), "qwen3": (True, True, False),
        "qwen3_moe": (True, True, False),
    }  # fmt: skip


SLIDES = {"model_type": "qwen2", "sliding_window": 300, "use_sliding_window": True}
FULL, MIXED = ["full_attention"] * 2, ["full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LINEAR = {"type": "linear", "factor": 4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
    "original_max_position_embeddings": 256
}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 300}, 300),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 1024}, None),  # not shorter than the model's positions
        ({"model_type": "mistral", "max_position_embeddings": 32768}, 4096),
        ({"model_type": "mistral", "sliding_window": 300, "layer_types": FULL}, None),
        ({"model_type": "mistral", "sliding_window": 300, "layer_types": MIXED}, 300),
        ({"model_type": "mistral", "sliding_window": 2048, "rope_scaling": LINEAR}, 2048),  # of 4096 positions
        ({"sliding_window": 300}, None),  # LlamaModel has none
        ({**SLIDES, "use_sliding_window": False}, None),
        ({**SLIDES, "use_sliding_window": False, "sliding_window": "x", "max_window_layers": 0}, None),
        ({**SLIDES}, None),  # max_window_layers 28
        ({**SLIDES, "max_window_layers": 2}, None),
        ({**SLIDES, "max_window_layers": 1}, 300),
        ({**SLIDES, "model_type": "qwen3", "max_window_layers": 0}, 300),
        ({**SLIDES, "max_window_layers": 0, "sliding_window": None}, None),
        ({**SLIDES, **MOE}, 300),  # in every layer
        ({**SLIDES, **MOE, "use_sliding_window": False}, None),
        ({**SLIDES, "max_window_layers": 0, "layer_types": FULL}, None),
        ({**SLIDES, "max_window_layers": 9, "layer_types": MIXED}, 300),
    ],
)
def test_a_sliding_window_that_a_layer_uses_ends_the_context_and_is_no_number_of_positions(changes, window):
    c = made(**changes)
    assert c.window == window and c.max_context == (window or c.max_positions)
    assert c.max_positions == c.rope.max_positions >= changes.get("max_position_embeddings", 1024)
    assert ("sliding window of" in c.limit) == (window is not None) and f"{c.max_positions} positions" in c.limit


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"rope_scaling": YARN}, 4096),
        ({"rope_scaling": YARN, "max_position_embeddings": 4096}, 4096),  # the scaled length already
        ({"rope_scaling": YARN, "max_position_embeddings": 8192}, 8192),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": None}}, 4096),
        ({"rope_scaling": {**YARN, "factor": None}, "max_position_embeddings": 3072}, 3072),
        ({"rope_scaling": LINEAR}, 4096),
        ({"rope_scaling": {**LINEAR, "original_max_position_embeddings": 256}}, 1024),
        ({"rope_scaling": LINEAR, "original_max_position_embeddings": 512}, 2048),  # Phi's place for it
        ({"rope_scaling": LLAMA3}, 1024),
        ({"rope_scaling": {"type": "default"}}, 1024),
        ({"rope_scaling": {}}, 1024),
    ],
)
def test_positions_are_the_scaled_ones_and_not_scaled_twice(changes, positions):
    c = made(**changes)
    assert c.max_positions == c.max_context == positions


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("scaling", [YARN, LINEAR, LLAMA3])
@pytest.mark.parametrize(
    "beside", [{"rope_theta": 10000.0}, PLAIN, {"type": "default"}, {}, None, {"rope_type": None, "factor": None}]
)
def test_rope_options_of_both_places_are_one_set(scaling, beside):
    want = made(rope_scaling=scaling).rope
    assert want == made(
        rope_parameters=scaling, rope_scaling=beside
    ).rope == made(rope_parameters=beside, rope_scaling=scaling).rope
    assert want == made(rope_parameters=scaling, rope_scaling=scaling).rope
    halves = (
        {key: value for i, (key, value) in enumerate(scaling.items()) if "type" in key or i % 2 == half}
        for half in (0, 1)
    )
    assert want == made(**dict(zip(("rope_parameters", "rope_scaling"), halves, strict=True))).rope


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        (
            {"rope_parameters": {"rope_theta": 5e5}},
            ("rope_parameters.rope_theta is 500000.0", "rope_theta at the top is 10000.0")
        ),
        (
            {"rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 2}},
            ("rope_parameters.factor", "rope_scaling.factor")
        ),
        (
            {"rope_parameters": YARN, "rope_scaling": LINEAR},
            ("rope_parameters.rope_type is 'yarn'", "rope_scaling.rope_type is 'linear'")
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 512},
            ("rope_scaling.original_max", "at the top is 512")
        ),
        ({"rope_scaling": {**YARN, "type": "linear"}}, ("rope_scaling has rope_type 'yarn' and type 'linear'",)),
        (
            {"rope_scaling": {"type": "default", "rope_type": "yarn"}},
            ("rope_scaling has rope_type 'yarn' and type 'default'",)
        ),
        ({"rope_scaling": {"factor": 4.0}}, ("rope_scaling.factor 4.0 has no rope_type",)),
        ({"rope_scaling": {"factor": 4.0}, "rope_parameters": PLAIN}, ("rope_scaling.factor 4.0 has no rope_type",)),
    ],
)
def test_rope_options_that_contradict_each_other_are_refused_by_both_places(changes, places):
    with pytest.raises(UserError) as error:
        made(**changes)
    assert all(place in str(error.value) for place in places) and "\n" not in str(error.value)


def test_options_that_change_no_number_are_no_obstacle():
    neutral = {
        "hidden_act": "swish", "hidden_activation": None, "logit_scale": 1.0, "residual_multiplier": 1.0,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 32, "attention_multiplier": 32**-0.5, "num_local_experts": 0, "pretraining_tp": 4,
        "dtype": "float8",
        "torch_dtype": None, "partial_rotary_factor": 1,
        "rope_scaling": {**YARN, "finetuned": True, "attention_factor": None},
    }  # fmt: skip
    assert made(**neutral) == made(rope_scaling=YARN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; minioscar runs llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' is not supported"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
        ({**MOE, "num_experts": 0}, "num_experts must be a positive whole number, not 0"),
        ({**MOE, "num_experts": 513}, "num_experts 513 is not supported; it must be at most 512"),
        ({**MOE, "num_local_experts": 7}, "num_local_experts 7 is not supported; only 6 is"),
        ({**MOE, "num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than the 6 experts"),
        ({**MOE, "num_experts_per_tok": 0}, "num_experts_per_tok must be a positive whole number, not 0"),
        ({**MOE, "moe_intermediate_size": "24"}, "moe_intermediate_size must be a positive whole number"),
        ({**MOE, "norm_topk_prob": 1}, "norm_topk_prob must be true or false, not 1"),
        ({**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported; only 1 is"),
        ({**MOE, "mlp_only_layers": [0]}, "mlp_only_layers [0] is not supported; only [] is"),
        ({**MOE, "shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size 64 is not supported"),
        ({**MOE, "n_shared_experts": 1}, "n_shared_experts 1 is not supported; only 0 is"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequenceClassification'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation 'gelu_pytorch_tanh'"),
        ({"mlp_bias": "yes"}, "mlp_bias must be true or false"),
        ({"logit_scale": 0.0625}, "logit_scale 0.0625 is not supported; only 1 is"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier 0.22"),
        ({"attention_multiplier": 0.015625}, "attention_multiplier 0.015625"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported; only null is"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256 is not supported; only 32 is"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; minioscar has default, linear"
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (
            {"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}},
            "rope option rope_scaling.llama_4_scaling_beta 0.1 is not known"
        ),
        (
            {"rope_scaling": {**YARN, "factor": "4"}},
            "rope option factor of type 'yarn' must be a positive number, not '4'"
        ),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, "rope option truncate must be true or false, not 'no'"),
        ({"rope_theta": "10000"}, "rope option rope_theta of type 'default' must be a positive number, not '10000'"),
        ({"rope_scaling": False}, "rope_scaling must be an object, not False"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope option factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "rope option factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope option low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}},
            "must be below"
        ),
        ({"rope_scaling": "yarn"}, "must be an object"),
        ({"rope_theta": 1.0}, "rope option rope_theta 1.0 is not supported; it must be at least 1.001"),
        ({"layer_types": ["linear_attention"]}, "layer type 'linear_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers 2"),
        ({"model_type": "qwen3", "layer_types": MIXED, "sliding_window": None}, "sliding_window is null"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive whole number, not 0"),
        (
            {"model_type": "mistral", "sliding_window": "4096"},
            "sliding_window must be a positive whole number, not '4096'"
        ),
        ({**SLIDES, "max_window_layers": "1"}, "max_window_layers must be a whole number, not '1'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, not 0"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number"),
        ({"vocab_size": None}, "vocab_size must be"),
        ({"num_attention_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": 6, "head_dim": None, "num_key_value_heads": 2}, "hidden_size 64 is not a multiple"),
        ({"head_dim": 31}, "head_dim 31 is not supported; RoPE turns pairs of channels: it must be even, at most 2048"),
        (
            {"head_dim": 65536},
            "head_dim 65536 is not supported; RoPE turns pairs of channels: it must be even, at most 2048"
        ),
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_config_that_an_editor_saved_with_a_byte_order_mark_is_the_same(tmp_path, encoding):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding=encoding)
    assert Config.from_folder(tmp_path) == made()


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        Config.from_folder(tmp_path)


def test_parameters_are_counted_as_the_checkpoint_has_them(tmp_path):
    import math

    from minioscar.weights import expected

    families = {"model_type": "qwen2"}, {"model_type": "qwen3"}, MOE
    for changes in ({}, *families, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}):
        c = made(**changes)
        assert c.parameters() == sum(math.prod(shape) for shape in expected(c).values())


def test_a_token_uses_the_weights_of_its_own_experts():
    c, dense = made(**MOE), made(model_type="qwen3", intermediate_size=24)
    one = 3 * 64 * 24
    assert c.parameters() - c.parameters(active=True) == 2 * 4 * one
    assert c.parameters(active=True) - dense.parameters() == 2 * (one + 6 * 64)
    assert dense.parameters(active=True) == dense.parameters()


def test_both_spellings_of_rope_are_one():
    old = made(rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    new = {**CONFIG, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    del new["rope_theta"]
    assert Config.from_dict(json.loads(json.dumps(new))).rope == old.rope
