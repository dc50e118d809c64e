"""Weights: shards and dtypes are read, everything wrong is refused before it is used."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.presets import arrays
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.ops.reference import Reference
from minioscar.storage.hub import resolve
from minioscar.tokenizer import Tokenizer
from minioscar.weights import load, rotate_values

from .tiny import write_model, write_talker

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


def same(one, other) -> None:
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_shards_are_the_same_model(model, folder):
    shard(folder)
    same(read(model), read(folder))


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


def index_alone(folder: Path, text: str) -> None:
    (folder / FILE).unlink()
    (folder / INDEX).write_text(text)


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
        (
            lambda f: change(f, lambda t: t.update({NORM: t[NORM][:-1]})),
            "has shape [63], but config.json asks for [64]",
        ),
        (
            lambda f: change(f, lambda t: t.update({NORM: t[NORM].astype(np.float64)})),
            "has dtype F64; only F32, F16, BF16",
        ),
        (
            lambda f: change(f, lambda t: t.update({NORM: t[NORM].astype(np.int32)})),
            "has dtype I32; only F32, F16, BF16",
        ),
        (
            lambda f: change(f, lambda t: t.update({"lm_head.bias": t[NORM]})),
            "lm_head.bias has no place in this architecture",
        ),
        (
            lambda f: change(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]})),
            "has no place in this architecture",
        ),
        (lambda f: index_alone(f, '{"weight_map": {}}'), "has no weight_map"),
        (
            lambda f: index_alone(f, '{"weight_map": {"a": "../evil.safetensors"}}'),
            "not a safetensors file of this folder",
        ),
        (lambda f: index_alone(f, '{"weight_map": {"a": "/etc/passwd"}}'), "not a safetensors file of this folder"),
        (lambda f: index_alone(f, '{"weight_map": {"a": "weights.bin"}}'), "not a safetensors file of this folder"),
        (lambda f: index_alone(f, '{"weight_map": {"a": ".."}}'), "not a safetensors file of this folder"),
        (lambda f: index_alone(f, '{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors does not exist"),
        (lambda f: index_alone(f, "{"), "cannot be read as JSON"),
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
    with pytest.raises(UserError, match="b.safetensors does not exist: .* names 2 shards, of which 1 are not there"):
        read(folder)


def test_one_whole_file_goes_before_an_index_as_in_transformers(model, folder):
    """An index that was left behind by shards which are gone, which are half there, or which are another model's."""
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(folder / FILE), "model-00001-of-00002.safetensors")})
    )
    same(read(model), read(folder))
    other = {name: 2 * tensor for name, tensor in load_file(folder / FILE).items()}
    save_file(other, folder / "model-00001-of-00002.safetensors")
    same(read(model), read(folder))


@pytest.mark.parametrize(
    "harm", [lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: change(p.parent, lambda t: t.pop(NORM))]
)
def test_where_the_one_file_is_damaged_the_index_beside_it_is_named(folder, harm):
    (folder / INDEX).write_text("{}")
    harm(folder / FILE)
    with pytest.raises(UserError, match=f"to read {INDEX} and its shards instead, remove {FILE}"):
        read(folder)


def test_where_two_shards_have_a_tensor_the_index_says_which_is_meant(model, folder):
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    for file in ("a.safetensors", "b.safetensors"):  # each has one of the other's, with other numbers
        mine = load_file(folder / file)
        theirs = next(name for name, home in index["weight_map"].items() if home != file and name not in mine)
        save_file({**mine, theirs: np.zeros_like(load_file(model / FILE)[theirs])}, folder / file)
    same(read(model), read(folder))
    del index["weight_map"][theirs]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"tensor {theirs} stands in two shards"):
        read(folder)


def test_a_tensor_that_the_index_does_not_know_or_has_elsewhere_is_found_in_the_shards(model, folder):
    shard(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second, *_ = index
    index[second] = "a.safetensors" if index[second] == "b.safetensors" else "b.safetensors"
    del index[first]
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    same(read(model), read(folder))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ["adapter_model.safetensors", "LoRA adapter", "merge"]),
        (["pytorch_model.bin"], ["pytorch_model.bin", "pickled", "AutoModelForCausalLM.from_pretrained"]),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
            ["pytorch_model-00001-of-00002.bin", "pickled"]
        ),
        (["m.Q4_K_M.gguf"], ["m.Q4_K_M.gguf", "GGUF"]),
        (
            ["consolidated.safetensors", "params.json", "tekken.json"],
            ["consolidated.safetensors", "Mistral's own names"]
        ),
        (["model-00002-of-00002.safetensors"], ["model-00002-of-00002.safetensors", INDEX]),
        (["weights.safetensors"], ["weights.safetensors"]),
        (["README.md"], ["minioscar reads safetensors weights only"]),
    ],
)
def test_weights_of_another_form_are_named_with_a_way_out(folder, names, parts):
    (folder / FILE).unlink()
    for name in names:
        (folder / name).write_text("x")
    with pytest.raises(UserError) as error:
        read(folder)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "."])
def test_what_may_not_be_read_is_no_damaged_file(tmp_path, monkeypatch, name):
    """Tests may be run by root, who may read everything, so that the refusal is the file system's in no more than
    name."""
    folder, real = write_talker(tmp_path / "m", 1), {"open": io.open, "stat": os.stat}

    def denied(call: str):
        def denying(path, *args, **how):
            if not isinstance(path, int) and call == (
                "stat" if name == "." else "open"
            ) and Path(path).parent == folder:
                if name in (".", Path(path).name):
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real[call](path, *args, **how)

        return denying

    for module, call in (("builtins", "open"), ("io", "open"), ("os", "stat")):
        monkeypatch.setattr(f"{module}.{call}", denied(call))
    with pytest.raises(UserError, match="Permission denied") as error:
        resolve(str(folder))
        read(folder)
        Tokenizer(folder)
    assert "truncated" not in str(error.value) and "\n" not in str(error.value)


SIDE_FILES = "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"
SIDE_FILES += ("chat_template.jinja",)


@pytest.mark.parametrize("name", [FILE, INDEX, *SIDE_FILES])
def test_a_link_into_a_cache_that_was_emptied_is_called_what_it_is(tmp_path, name):
    folder = write_talker(tmp_path / "m", 1)
    (folder / (name if name in SIDE_FILES else FILE)).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/4d7a")
    with pytest.raises(UserError, match=f"{name} is a link to a file that is gone; fetch the model again"):
        read(folder)
        Tokenizer(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(folder, make):
    (folder / FILE).unlink()
    make(folder / FILE)
    with pytest.raises(UserError, match=f"{FILE} is no file; fetch the model again"):
        read(folder)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
LFS = "Git LFS pointer, not the file itself; run in its folder: git lfs pull"


@pytest.mark.parametrize(("content", "why"), [(POINTER, LFS), ("<!DOCTYPE html>\n<html>", "a web page"), ("", "empty")])
@pytest.mark.parametrize(
    "name", [FILE, "b.safetensors", INDEX, "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_what_lies_in_the_place_of_a_file_is_called_what_it_is(tmp_path, name, content, why):
    folder = write_talker(tmp_path / "m", 1)
    if name in (INDEX, "b.safetensors"):
        shard(folder)
    (folder / name).write_text(content)
    with pytest.raises(UserError) as error:
        read(folder)
        Tokenizer(folder)
    assert name in str(error.value) and why in str(error.value) and "\n" not in str(error.value)


def test_dtypes_may_be_mixed_within_one_matrix(folder, seed):
    """q, k and v of three dtypes in one array, gate and up of two: each as if it were alone. (Onto a card:
    test_upload.py.)"""
    kinds = [np.float16, ml_dtypes.bfloat16, np.float32]
    given = load_file(folder / FILE)
    for turn in range(3):
        tensors = {name: x.astype(kinds[(i + turn) % 3]) for i, (name, x) in enumerate(sorted(given.items()))}
        for i, name in enumerate("qkv"):
            name = f"model.layers.0.self_attn.{name}_proj.weight"
            tensors[name] = given[name].astype(kinds[(i + turn) % 3])
        save_file(tensors, folder / FILE)
        layer, want = read(folder).layers[0], {name: x.astype(np.float32) for name, x in tensors.items()}
        for array, part, names in ((layer.qkv, "self_attn", "qkv"), (layer.gate_up, "mlp", ("gate", "up"))):
            rows = [want[f"model.layers.0.{part}.{name}_proj.weight"] for name in names]
            np.testing.assert_array_equal(array, np.concatenate(rows))


def test_a_head_that_is_tied_in_the_config_alone_is_refused(folder):
    """PyTorch's files have a tied head twice; one of its own would be dropped in silence."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        read(folder)
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    weights = read(folder)
    assert weights.head is weights.embed


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
