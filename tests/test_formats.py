"""Quantized weights: every format gives the numbers that it stands for, and what does not fit is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.config import Config
from minioscar.engine import load as load_engine
from minioscar.evaluation.teacher_forcing import teacher_forced
from minioscar.ops.reference import Reference
from minioscar.weights import load

from .quantized_files import KINDS, write_numbers, write_quantized
from .tiny import relative

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]


def numbers(exact: dict, layer: int) -> dict[str, np.ndarray]:
    of = {name.split(".", 3)[3]: x for name, x in exact.items() if name.startswith(f"model.layers.{layer}.")}
    return {
        "qkv": np.concatenate([of[f"self_attn.{name}_proj.weight"] for name in "qkv"]),
        "o": of["self_attn.o_proj.weight"],
        "gate_up": np.concatenate([of["mlp.gate_proj.weight"], of["mlp.up_proj.weight"]]),
        "down": of["mlp.down_proj.weight"],
    }


@pytest.mark.parametrize("name", KINDS)
def test_every_format_is_read_bit_for_bit(name, tmp_path, seed):
    exact = write_quantized(tmp_path, name, seed)
    weights = load(tmp_path, Config.from_folder(tmp_path), Reference())
    for i, layer in enumerate(weights.layers):
        for field, want in numbers(exact, i).items():
            np.testing.assert_array_equal(getattr(layer, field), want)
    np.testing.assert_array_equal(weights.head, exact["lm_head.weight"])


@pytest.mark.parametrize("kv", ["bf16", "int2"])
@pytest.mark.parametrize("name", ["awq-gemm", "gptq-v1", "ct-int4-zeros", "fp8"])
def test_a_quantized_model_answers_as_its_numbers_do_in_prompt_and_decode(name, kv, tmp_path, seed):
    exact = write_quantized(tmp_path / "quantized", name, seed, tie_word_embeddings=name == "fp8")
    write_numbers(tmp_path / "numbers", exact, tie_word_embeddings=name == "fp8")
    engines = [load_engine(tmp_path / which, kv, "cpu", tokenizer=False) for which in ("quantized", "numbers")]
    assert engines[0].model.weights.rotation == ("online" if kv == "int2" else "none")
    assert relative(*(engine.logits(PROMPT) for engine in engines)) < 1e-5
    ids = np.random.default_rng(seed).integers(0, 160, 161)  # more than a window of 128
    ours, theirs = (np.concatenate(list(teacher_forced(engine, ids, 120, lambda _: None))) for engine in engines)
    # rotated values may be rounded to another BF16 number, from position 128 on to another code of 2 bits
    assert relative(ours[:8], theirs[:8]) < (1e-5 if kv == "bf16" else 1e-3)
    assert relative(ours[8:], theirs[8:]) < (1e-5 if kv == "bf16" else 0.1)
