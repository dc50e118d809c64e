"""Random weights of published shapes: the shapes are the published ones, the weights are repeatable and activations
stay finite."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import loading, presets, quantized
from benchmarks.presets import arrays
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.ops.reference import Reference
from minioscar.quantized import Quantized
from minioscar.weights import load

from .quantized_files import HostOps
from .tiny import CONFIG, MOE

PUBLISHED = {
    "qwen3-8b": 8_190_735_360, "qwen3-0.6b": 596_049_920, "llama-3.1-8b": 8_030_261_248, "qwen2.5-7b": 7_615_616_512,
    "qwen3-4b": 4_022_468_096, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "llama-3.1-70b": 70_553_706_496, "qwen3-30b-a3b": 30_532_122_624, "qwen3-vl-8b": 8_767_123_696,
    "llava-next-7b": 7_063_431_168 - 12_598_272,  # without CLIP's last layer and norm, which are not used
    "qwen3-omni-30b-a3b": 31_719_205_488,  # the thinker
}  # fmt: skip
SMALL = {**CONFIG, "num_hidden_layers": 12}


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_have_the_published_number_of_parameters(preset):
    assert presets.config_of(preset).parameters() == PUBLISHED[preset]


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "qwen2"}, {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True}, MOE]
)
def test_random_weights_are_complete_repeatable_and_keep_activations_near_one(changes):
    config, ops = Config.from_dict(SMALL | changes), Reference()
    first, same, other = (presets.random_weights(config, ops, seed) for seed in (3, 3, 4))
    assert sum(array.size for array in arrays(first)) == config.parameters()
    assert (first.head is first.embed) == config.tie_embeddings
    assert all(np.array_equal(a, b) for a, b in zip(arrays(first), arrays(same), strict=True))
    assert not np.array_equal(first.embed, other.embed)
    logits = presets.load(config, "int2", "cpu").logits(range(100))
    # a tied head meets its own token again
    assert np.isfinite(logits).all() and 0.5 < logits.std() < 2 * config.hidden_size**0.5


@pytest.mark.parametrize("changes", [{}, MOE | {"moe_intermediate_size": 128}], ids=["dense", "experts"])
@pytest.mark.parametrize("name", quantized.NAMES)
def test_random_weights_in_4_and_8_bits_keep_activations_near_one_and_take_the_bytes_that_are_announced(name, changes):
    shape = {**SMALL, "hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_attention_heads": 4, **changes}
    config, ops = quantized.config_with(Config.from_dict(shape), name), HostOps()
    weights = presets.random_weights(config, ops, rotates=True)
    assert abs(sum(array.nbytes for array in arrays(weights)) / ops.weight_bytes(config) - 1) < 0.02
    assert isinstance(weights.layers[0].o, Quantized) and isinstance(weights.head, Quantized) == (name != "fp8")
    engine = presets.load(config, "int2", "cpu")
    assert engine.model.weights.rotation == ("folded" if name in ("int8", "int4") else "online")
    assert 0.5 < engine.logits(range(100)).std() < 2


@pytest.mark.parametrize("name", [None, *quantized.FORMS])
def test_a_checkpoint_in_a_form_of_files_is_one(name, tmp_path):
    config = Config.from_dict({**CONFIG, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4})
    config = quantized.config_with(config, name)
    written, files = loading.write(tmp_path, config), list(tmp_path.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) >= written and len(files) == 2
    assert abs(written / loading.file_bytes(config) - 1) < 0.05
    assert load(tmp_path, config, HostOps()).quantized == (name is not None)


def test_large_matrices_are_drawn_in_pieces(monkeypatch):
    monkeypatch.setattr(presets, "CHUNK", 1000)
    weights = presets.random_weights(Config.from_dict(CONFIG), Reference())
    assert 0.9 < weights.embed.std() < 1.1 and weights.embed.all()


def test_a_path_to_any_config_json_is_a_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert presets.config_of(str(tmp_path / "config.json")) == Config.from_dict(CONFIG)
    for name, said in (("qwen9", "qwen3-0.6b"), (str(tmp_path / "nowhere" / "config.json"), "does not exist")):
        with pytest.raises(UserError, match=said):
            presets.config_of(name)


def test_weights_that_cannot_fit_are_refused_before_they_are_made():
    with pytest.raises(UserError, match="take .* GB"):
        presets.load(Config.from_dict({**CONFIG, "hidden_size": 2**20, "vocab_size": 2**30}), "bf16", "cpu")
