"""The made models with key biases are what tools/key_biases.py promises."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.config import Config
from minioscar.storage import hub
from tools import bias_pairs, key_biases


@pytest.fixture(scope="module")
def made() -> tuple[Config, dict[str, list[np.ndarray]]]:
    folder = hub.resolve("smollm2-135m")
    config = Config.from_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_biases, "TOKENS", 128)
        return config, {profile: key_biases.biases(folder, config, profile) for profile in key_biases.PROFILES}


def test_norms_of_the_qwen_profile_are_those_of_qwen(made):
    config, found = made
    norms = [np.linalg.norm(bias) for bias in found["qwen2.5"]]
    middle = [key_biases.MIDDLE] * (config.num_layers - 2)
    np.testing.assert_allclose(norms, [key_biases.FIRST, *middle, key_biases.LAST], rtol=1e-5)
    assert max(map(np.linalg.norm, found["even"])) < key_biases.FIRST


def test_both_profiles_point_the_same_way_and_only_along_the_slowest_pairs(made):
    config, found = made
    for even, qwen in zip(found["even"], found["qwen2.5"], strict=True):
        np.testing.assert_allclose(qwen / np.linalg.norm(qwen), even / np.linalg.norm(even), rtol=1e-4, atol=1e-7)
        pairs = qwen.reshape(config.num_kv_heads, 2, -1)
        assert not pairs[..., : -key_biases.PAIRS].any() and pairs[..., -key_biases.PAIRS :].all()


def test_a_bias_in_one_pair_turns_with_the_position_and_has_the_norm_that_is_asked_for(made):
    config, _ = made
    nothing = np.zeros((9, config.num_kv_heads, config.head_dim), np.float32)
    bias = bias_pairs.biased(nothing, config, 5, 605)
    np.testing.assert_allclose(np.linalg.norm(bias, axis=(1, 2)), 605, rtol=1e-5)
    pair = bias[:, 0, 5] + 1j * bias[:, 0, 5 + config.head_dim // 2]
    np.testing.assert_allclose(np.angle(pair[1:] / pair[:-1]), config.rope.frequencies()[5], rtol=1e-4)
    bias[..., [5, 5 + config.head_dim // 2]] = 0
    assert not bias.any()
