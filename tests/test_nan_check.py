"""--debug names the layer and the operation in which numbers stop being finite."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar import engine as module
from minioscar.app.cli import main
from minioscar.errors import Failure

from .tiny import MOE, talker, write_talker


@pytest.fixture
def folder(tmp_path):
    return write_talker(tmp_path / "talker", 5, model_type="qwen3")


def watched(folder):
    return module.load(folder, "int2", "cpu", debug=True)


def test_a_watched_model_says_what_an_unwatched_one_says(folder):
    assert watched(folder).generate(
        "the cat", max_tokens=30
    ).token_ids == talker(folder).generate("the cat", max_tokens=30).token_ids


@pytest.mark.parametrize(
    ("field", "layer", "where"),
    [
        ("qkv", 1, "layer 1: qkv projection"),
        ("input_norm", 0, "layer 0: qkv projection"),
        ("k_norm", 1, r"layer 1: rotation and scaling \(k\)"),
        ("q_norm", 0, r"layer 0: rotation and scaling \(queries\)"),
        ("o", 1, "layer 1: output projection"),
        ("post_norm", 1, "layer 1: gate and up projection"),
        ("gate_up", 0, "layer 0: gate and up projection"),
        ("down", 1, "layer 1: down projection"),
    ],
)
def test_a_damaged_weight_is_found_where_it_is_used(folder, field, layer, where):
    engine = watched(folder)
    getattr(engine.model.weights.layers[layer], field).reshape(-1)[5] = np.nan
    with pytest.raises(
        Failure, match=f"^{where}: .* NaN, first at token 0 of the pass; its .* is not finite: the model's files are"
    ):
        engine.generate("the cat")


@pytest.mark.parametrize("field", ["post_norm", "router", "gate_up", "down"])
def test_a_damaged_weight_of_experts_is_found(tmp_path, field):
    engine = watched(write_talker(tmp_path / "m", 5, **MOE))
    getattr(engine.model.weights.layers[1], field)[:] = np.nan
    with pytest.raises(Failure, match="^layer 1: experts: .* NaN, first at token 0 of the pass; its .* is not finite"):
        engine.generate("the cat")


def test_an_overflow_between_finite_numbers_is_named_too(folder):
    engine = watched(folder)
    engine.model.weights.layers[1].gate_up[:] = 3e30  # silu(gate) * up: beyond float32
    with pytest.raises(
        Failure, match="^layer 1: gate and up projection: .* numbers are (infinite|NaN).*what went into it was finite"
    ):
        engine.generate("the cat")
    engine = watched(folder)
    engine.model.weights.head[7] = np.inf
    with pytest.raises(Failure, match="^logits: .* its weight is not finite"):
        engine.generate("the cat")
    engine = watched(folder)
    engine.model.weights.embed[engine.encode("the cat")[3]] = np.nan
    with pytest.raises(Failure, match="^embedding: .* first at token 3 of the pass; its embedding"):
        engine.generate("the cat")


def test_attention_over_a_damaged_cache_is_named(folder):
    engine = watched(folder)
    run = engine.start(["the cat"], options=module.Options(max_tokens=5))
    pieces = iter(run)
    next(pieces)
    run.cache.layers[1]["window_values"][0, :, 2] = np.inf
    with pytest.raises(Failure, match="^layer 1: attention: "):
        list(pieces)


def test_debug_on_the_command_line_watches(folder, capsys):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    assert main(["generate", str(folder), "the cat", "--device", "cpu"]) == 1
    assert "logits are not finite; run again with --debug" in capsys.readouterr().err
    assert main(["generate", str(folder), "the cat", "--device", "cpu", "--debug"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("minioscar: layer 1: down projection: ")
