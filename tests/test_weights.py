"""Weights: shards and dtypes are read, everything wrong is refused before it is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.ops.reference import Reference
from minioscar.weights import arrays, load, rotate_values

from .tiny import write_model

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("weights") / "model", 11)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def read(folder: Path):
    return load(folder, Config.from_folder(folder), Reference())


def shard(folder: Path, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> None:
    """Splits the one file into two and writes the index."""
    tensors = load_file(folder / FILE)
    split = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if split[n] == file}, folder / Path(file).name)
    (folder / FILE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": split}))


def test_shards_are_the_same_model(model, folder):
    shard(folder)
    for a, b in zip(arrays(read(model)), arrays(read(folder)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights_are_widened_exactly(model, folder, dtype):
    tensors = {name: t.astype(dtype) for name, t in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE)
    weights = read(folder)
    np.testing.assert_array_equal(weights.embed, tensors["model.embed_tokens.weight"].astype(np.float32))
    assert weights.layers[0].down.dtype == np.float32


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / FILE).unlink(), f"has neither {FILE} nor {INDEX}"),
        (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-100]), "truncated or not a safetensors file"),
        (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:5]), "truncated or not a safetensors file"),
        (lambda f: (f / FILE).write_bytes(b""), "truncated or not a safetensors file"),
        (lambda f: (f / FILE).write_bytes(b"\xff" * 4096), "truncated or not a safetensors file"),
        (lambda f: change(f, lambda t: t.pop(NORM)), f"tensor {NORM} is missing"),
        (lambda f: change(f, lambda t: t.update({NORM: t[NORM][:-1]})), "has shape [63], but config.json asks for [64]"),
        (lambda f: change(f, lambda t: t.update({NORM: t[NORM].astype(np.float64)})), "has dtype F64; only F32, F16, BF16"),
        (lambda f: change(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]})), "has no place in this architecture"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../evil.safetensors"}}'), "not a safetensors file of this folder"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "/etc/passwd"}}'), "not a safetensors file of this folder"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "weights.bin"}}'), "not a safetensors file of this folder"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": ".."}}'), "not a safetensors file of this folder"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors does not exist"),
        (lambda f: (f / INDEX).write_text("{"), "cannot be read as JSON"),
    ],
)
def test_damaged_or_hostile_weights_are_refused_in_one_line(folder, harm, message):
    harm(folder)
    with pytest.raises(UserError) as error:
        read(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_loses_a_shard_is_refused(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors does not exist"):
        read(folder)


def test_rotation_of_values_changes_nothing_but_v_and_o(model):
    config, ops = Config.from_folder(model), Reference()
    plain = read(model)
    rotated = rotate_values(plain, config, ops)
    v = config.q_size + config.kv_size
    for a, b in zip(plain.layers, rotated.layers, strict=True):
        assert b.gate_up is a.gate_up and b.down is a.down
        np.testing.assert_array_equal(a.qkv[:v], b.qkv[:v])
        assert abs(a.qkv[v:] - b.qkv[v:]).max() > 0.1
        # o.v of every q head that reads kv head 0 is what it was
        x = np.random.default_rng(0).standard_normal(config.hidden_size).astype(np.float32)
        outputs = []
        for layer in (a, b):
            values = (layer.qkv[v:] @ x).reshape(config.num_kv_heads, config.head_dim)
            outputs.append(layer.o @ np.repeat(values, config.num_heads // config.num_kv_heads, axis=0).reshape(-1))
        np.testing.assert_allclose(*outputs, atol=1e-4)
