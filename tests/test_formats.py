"""Quantized weights: every format gives the numbers that it stands for, and what does not fit is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minioscar.config import Config
from minioscar.engine import load as load_engine
from minioscar.errors import UserError
from minioscar.evaluation.teacher_forcing import teacher_forced
from minioscar.formats import OTHERS, Linear, Plain, joined, read_config
from minioscar.ops.reference import Reference
from minioscar.quantized import Quantized, of_expert
from minioscar.storage.checkpoint import FLOATS, Tensor, _tensors
from minioscar.weights import load

from .quantized_files import (
    BF16,
    E4M3,
    KINDS,
    HostOps,
    compressed_pack,
    gptq,
    of_bytes,
    random_matrix,
    save,
    write_numbers,
    write_quantized,
)
from .tiny import MOE, relative

KINDS_OF = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
NATIVE = {"F8_E4M3": E4M3}
F16 = np.dtype(np.float16)
GATE = np.random.default_rng(0).standard_normal((320, 256)).astype(BF16)
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


OF_EXPERTS = {**MOE, "moe_intermediate_size": 64, "architectures": ["Qwen3MoeForCausalLM"]}


@pytest.mark.parametrize("make", [Reference, HostOps])
@pytest.mark.parametrize("name", ["awq-gemm", "gptq-v1", "ct-int4", "ct-int8", "fp8", "ct-fp8-rows"])
def test_every_expert_is_read_bit_for_bit(name, make, tmp_path, seed):
    exact, config = write_quantized(tmp_path, name, seed, **OF_EXPERTS), Config.from_folder(tmp_path)
    weights = load(tmp_path, config, make())
    for i, layer in enumerate(weights.layers):
        assert layer.router.shape == (6, 256)
        for e in range(6):
            of = f"model.layers.{i}.mlp.experts.{e}."
            wanted = {"gate_up": ("gate", "up"), "down": ("down",)}
            for field, names in wanted.items():
                matrix = of_expert(getattr(layer, field), e, 6)
                assert isinstance(matrix, Quantized) == (make is HostOps)
                got = matrix.dequantize() if isinstance(matrix, Quantized) else matrix
                np.testing.assert_array_equal(got, np.concatenate([exact[f"{of}{n}_proj.weight"] for n in names]))


def test_experts_of_which_one_is_not_quantized_are_kept_as_numbers(tmp_path, seed):
    exact, config = write_quantized(tmp_path, "gptq-v1", seed, **OF_EXPERTS), Config.from_folder(tmp_path)
    bare = "model.layers.0.mlp.experts.3.down_proj."
    files = {file.stem: load_file(file) for file in tmp_path.glob("*.safetensors")}
    for tensors in files.values():
        for name in [name for name in tensors if name.startswith(bare)]:
            del tensors[name]
    files["a"][f"{bare}weight"] = exact[f"{bare}weight"].astype(BF16)
    save(tmp_path, json.loads((tmp_path / "config.json").read_text()), files)
    weights = load(tmp_path, config, HostOps())
    want = [exact[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(6)]
    assert weights.layers[0].down.shape == (6, 256, 64) and isinstance(weights.layers[1].down, Quantized)
    np.testing.assert_array_equal(weights.layers[0].down, np.stack(want).astype(BF16))


def test_a_router_that_files_have_quantized_is_kept_as_numbers(tmp_path, seed):
    write_quantized(tmp_path, "fp8", seed, **OF_EXPERTS)
    written, want = KINDS["fp8"].write(np.random.default_rng(seed), 6, 256)
    router = {f"model.layers.1.mlp.gate.{last}": array for last, array in written.items()}
    save_file(router, tmp_path / "d.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"] | dict.fromkeys(router, "d.safetensors")
    index.write_text(json.dumps({"weight_map": names}))
    weights = load(tmp_path, Config.from_folder(tmp_path), HostOps())
    np.testing.assert_array_equal(weights.layers[1].router, want.astype(BF16))


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


GOLDEN = Path(__file__).parent / "fixtures" / "formats.safetensors"
with safe_open(GOLDEN, "np") as opened:
    METADATA = {name: json.loads(text) for name, text in opened.metadata().items()}
MADE_BY = METADATA.pop("made by")


def golden(name: str) -> dict[str, Tensor]:
    with open(GOLDEN, "rb") as file:
        return {key.split("/")[1]: x for key, x in _tensors(file) if key.split("/")[0] == name}


@pytest.mark.parametrize("name", sorted(METADATA))
def test_what_the_libraries_of_the_formats_packed_is_what_they_unpack_bit_for_bit(name):
    """make_format_fixtures.py says how the file was made."""
    tensors, want = golden(name), METADATA[name]["numbers"]
    of = read_config(METADATA[name], "config.json")
    linear = Linear(*want["shape"], tensors)
    of.check(linear)
    plain = of.read(linear._replace(tensors={key: x.array for key, x in tensors.items()}), np)
    numbers = plain.dequantize(np).astype(FLOATS[KINDS_OF[want["dtype"]]])
    assert hashlib.sha256((numbers + np.zeros(1, numbers.dtype)).tobytes()).hexdigest() == want["sha256"]


# --- what is refused


def refused(of: dict, **config) -> str:
    with pytest.raises(UserError) as error:
        read_config({"quantization_config": of, **config}, "config.json")
    assert "\n" not in str(error.value) and str(error.value).startswith("config.json: quantization_config")
    return str(error.value)


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_refused_by_name_with_the_way_out(method):
    assert f"of {method} is not supported; use the model's BF16 weights" in refused({"quant_method": method})


@pytest.mark.parametrize(
    ("of", "named"),
    [
        ({"quant_method": "awq", "bits": 8}, "AWQ of 8 bits"),
        ({"quant_method": "awq", "version": "exllama"}, "version 'exllama' of AWQ"),
        ({"quant_method": "awq", "group_size": 100}, "group_size 100 of AWQ"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 2}}}, "GPTQ of 2 or 4 bits"),
        ({"quant_method": "gptq", "bits": "4"}, "bits must be a whole number, not '4'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p'"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"}, "auto_round:exllamav2"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two positive whole numbers"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
        (KINDS["ct-int4"].config | {"transform_config": {"x": 1}}, "transform_config"),
        (KINDS["ct-int4"].config | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (KINDS["ct-int4"].config | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"config_groups": {"a": {"weights": {"num_bits": 3, "type": "int"}}}}, "int weights of 3 bits"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, "float weights of 4 bits"),
    ],
)
def test_variants_that_are_not_implemented_are_refused_by_name(of, named):
    assert named in refused(of)


def test_mlx_and_modelopt_are_recognized_without_a_method(tmp_path):
    with pytest.raises(UserError, match="quantization_config of mlx is not supported"):
        read_config({"quantization": {"bits": 4, "group_size": 64}}, "config.json")
    folder = write_numbers(tmp_path / "m", {})
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UserError, match="quantization_config of modelopt is not supported"):
        Config.from_folder(folder)


def test_older_folders_keep_the_parameters_in_a_file_of_their_own(tmp_path, seed):
    exact = write_quantized(tmp_path, "gptq-v1", seed)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps(raw.pop("quantization_config")))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    weights = load(tmp_path, Config.from_folder(tmp_path), Reference())
    np.testing.assert_array_equal(weights.layers[1].down, numbers(exact, 1)["down"])


DOWN = "model.layers.1.mlp.down_proj."


def change(folder: Path, edit) -> None:
    """edit: changes the tensors of a folder, a dict by name, in place."""
    raw, tensors = json.loads((folder / "config.json").read_text()), {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            tensors |= {name: np.array(x.array).view(NATIVE.get(x.kind, x.dtype)) for name, x in _tensors(file)}
    edit(tensors)
    save(folder, raw, {"a": tensors, "b": {}, "c": {}})


def cut(name: str):
    return lambda tensors: tensors.update({DOWN + name: tensors[DOWN + name][:-1].copy()})


def scattered(tensors: dict) -> None:
    tensors[DOWN + "g_idx"] = np.random.default_rng(0).permutation(tensors[DOWN + "g_idx"])


def put(name: str, value):
    return lambda tensors: tensors.update({DOWN + name: value(tensors)})


@pytest.mark.parametrize(
    ("kind", "edit", "named"),
    [
        ("awq-gemm", cut("scales"), r"scales is F16 \(4, 256\), but config.json asks for F16 or BF16 \(5, 256\)"),
        ("awq-gemm", lambda t: t.pop(DOWN + "scales"), "scales is missing"),
        ("awq-gemm", put("g_idx", lambda t: np.zeros(320, np.int32)), r"g_idx has no place in AWQ \(gemm\)"),
        ("gptq-v1", cut("qweight"), r"qweight is I32 \(39, 256\), but config.json asks for I32 \(40, 256\)"),
        ("gptq-v1", scattered, "the columns of a group are scattered"),
        ("gptq-v1", cut("scales"), "4 groups in 320 columns do not follow from group_size 64"),
        ("ct-int4", put("weight_shape", lambda t: np.array([256, 328])), r"weight_shape says \[256, 328\]"),
        ("ct-int4", put("weight", lambda t: np.zeros((256, 320), np.int8)), "weight has no place"),
        ("ct-fp8-rows", cut("weight_scale"), r"weight_scale is F32 \(255, 1\)"),
        ("fp8", cut("weight"), r"weight is F8_E4M3 \(255, 320\)"),
    ],
)
def test_tensors_that_do_not_fit_config_json_are_refused_by_name(kind, edit, named, tmp_path, seed):
    write_quantized(tmp_path, kind, seed)
    change(tmp_path, edit)
    with pytest.raises(UserError, match=rf"tensors of {DOWN[:-1]} are not .*: {named}") as error:
        load(tmp_path, Config.from_folder(tmp_path), Reference())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "config"), [("awq-gemm", "gptq-v1"), ("gptq-v1", "awq-gemm"), ("fp8", "ct-fp8-rows")]
)
def test_files_of_one_format_are_not_read_as_another(files, config, tmp_path, seed):
    write_quantized(tmp_path, files, seed)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": KINDS[config].config}))
    with pytest.raises(UserError, match="the tensors of model.layers.0.self_attn.q_proj are not"):
        load(tmp_path, Config.from_folder(tmp_path), Reference())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("kind", "name"), [("awq-gemm", "scales"), ("ct-fp8-rows", "weight_scale"), ("fp8", "weight")])
def test_what_is_no_number_is_refused(kind, name, value, tmp_path, seed):
    write_quantized(tmp_path, kind, seed)

    def harm(tensors: dict) -> None:
        tensors[DOWN + name].reshape(-1)[-1] = value

    change(tmp_path, harm)
    with pytest.raises(UserError, match=f"{DOWN[:-1]} has a NaN or an infinity"):
        load(tmp_path, Config.from_folder(tmp_path), Reference())


def test_what_a_card_has_no_form_for_is_kept_as_numbers_and_that_is_said(tmp_path, seed, capsys):
    """Groups of 16, and rows of a matrix that are not quantized."""
    exact = write_quantized(tmp_path / "groups", "ct-int4-16", seed)
    weights, said = load(tmp_path / "groups", Config.from_folder(tmp_path / "groups"), HostOps()), capsys.readouterr()
    for i, layer in enumerate(weights.layers):
        for field, want in numbers(exact, i).items():
            np.testing.assert_array_equal(getattr(layer, field), want.astype(BF16))
    why = "groups of 16 columns are neither a power of two from 32 on nor whole rows"
    assert said.err.splitlines() == [f"[8 matrices are kept as bfloat16 numbers: {why}]"]
    exact, folder = write_quantized(tmp_path / "rows", "ct-int4", seed), tmp_path / "rows"
    gate = "model.layers.0.mlp.gate_proj."
    change(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith(gate)] and t.update({gate + "weight": GATE}))
    weights, said = load(folder, Config.from_folder(folder), HostOps()), capsys.readouterr()
    want = np.concatenate([GATE.astype(np.float32), exact["model.layers.0.mlp.up_proj.weight"]])
    np.testing.assert_array_equal(weights.layers[0].gate_up, want.astype(BF16))
    assert said.err.startswith("[1 matrix is kept as bfloat16 numbers: some of their rows are quantized")
    assert isinstance(weights.layers[1].gate_up, Quantized)


def test_gate_and_up_that_are_no_whole_tiles_are_kept_as_numbers(tmp_path, seed, capsys):
    exact = write_quantized(tmp_path, "ct-int4-rows", seed, intermediate_size=328)
    weights = load(tmp_path, Config.from_folder(tmp_path), HostOps())
    for i, layer in enumerate(weights.layers):
        np.testing.assert_array_equal(layer.gate_up, numbers(exact, i)["gate_up"].astype(BF16))
        assert isinstance(layer.down, Quantized)
    why = "gate and up of 328 rows are not a multiple of 16"
    assert capsys.readouterr().err.splitlines() == [f"[2 matrices are kept as bfloat16 numbers: {why}]"]


def test_an_embedding_that_is_quantized_is_refused(tmp_path, seed):
    write_quantized(tmp_path, "ct-w8a8", seed)
    change(tmp_path, lambda t: t.update({"model.embed_tokens.weight": np.zeros((160, 256), np.int8)}))
    with pytest.raises(UserError, match="tensors of model.embed_tokens are quantized; an embedding must be in 16"):
        load(tmp_path, Config.from_folder(tmp_path), Reference())


def test_quantized_tensors_without_a_quantization_config_are_called_what_they_are(tmp_path, seed):
    write_quantized(tmp_path, "awq-gemm", seed)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    named = "q_proj are qweight, qzeros, scales, but config.json has no quantization_config"
    with pytest.raises(UserError, match=named):
        load(tmp_path, Config.from_folder(tmp_path), Reference())


def test_scales_of_an_fp8_cache_are_not_used_and_that_is_said(tmp_path, seed, capsys):
    exact = write_quantized(tmp_path, "fp8", seed)
    change(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": np.ones((), np.float32)}))
    weights = load(tmp_path, Config.from_folder(tmp_path), Reference())
    np.testing.assert_array_equal(weights.layers[0].qkv, numbers(exact, 0)["qkv"])
    assert capsys.readouterr().err.splitlines() == ["[the scales of an FP8 cache in the files are not used]"]


def test_a_prompt_cache_is_bound_to_the_format_of_the_files(tmp_path, seed):
    """Numbers of the same model in another format have other norms and values: AWQ changes both."""
    file = tmp_path / "p.kv.safetensors"
    exact = write_quantized(tmp_path / "awq", "awq-gemm", seed)
    write_numbers(tmp_path / "numbers", exact)
    load_engine(tmp_path / "awq", "int2", "cpu", tokenizer=False).prefill(PROMPT).save(file)
    assert len(load_engine(tmp_path / "awq", "int2", "cpu", tokenizer=False).load_cache(file)) == len(PROMPT)
    with pytest.raises(UserError, match=r"made with another config: quantization .*AWQ \(gemm\).* there, null here"):
        load_engine(tmp_path / "numbers", "int2", "cpu", tokenizer=False, cache=file)


def test_a_bias_of_zeros_that_the_model_does_not_have_is_left_out_and_another_one_refused(tmp_path, seed):
    write_quantized(tmp_path, "gptq-v1", seed)
    change(tmp_path, put("bias", lambda tensors: np.zeros(256, np.float16)))
    load(tmp_path, Config.from_folder(tmp_path), Reference())
    change(tmp_path, put("bias", lambda tensors: np.eye(1, 256, dtype=np.float16)[0]))
    with pytest.raises(UserError, match=f"tensor {DOWN}bias has no place in this architecture"):
        load(tmp_path, Config.from_folder(tmp_path), Reference())


# --- single matrices


def test_zeros_of_version_1_that_borrowed_from_their_neighbours_come_back(seed):
    """A zero of 0, less 1, takes a bit of the next one (AutoGPTQ); adding the whole word gives both back."""
    for bits in (4, 8):
        m = random_matrix(np.random.default_rng(seed), 64, 128, bits, 32)
        assert (m.zero == 0).any()
        of = read_config({"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": 32}}, "")
        plain = of.read(Linear(64, 128, gptq(m, 1)), np)
        np.testing.assert_array_equal(plain.zero, m.zero)
        np.testing.assert_array_equal(plain.dequantize(np), m.w)


def test_groups_in_another_order_are_read_and_scattered_ones_are_not(seed):
    rng = np.random.default_rng(seed)
    m, order = random_matrix(rng, 32, 128, 4, 32), np.array([2, 0, 3, 1], np.int32)
    tensors = gptq(m, 2) | {"g_idx": np.repeat(order, 32)}
    of = read_config({"quantization_config": KINDS["gptq-v2"].config}, "")
    want = m._replace(scale=m.scale[:, order], zero=m.zero[:, order]).w
    np.testing.assert_array_equal(of.read(Linear(32, 128, tensors), np).dequantize(np), want)


def test_rows_that_are_no_multiple_of_a_word_and_ragged_blocks_are_read(seed):
    rng = np.random.default_rng(seed)
    m = random_matrix(rng, 13, 320, 4, 32, dtype=np.float32)
    plain = read_config({"quantization_config": KINDS["ct-int4-zeros"].config}, "").read(
        Linear(13, 320, compressed_pack(m, False)), np
    )
    np.testing.assert_array_equal(plain.dequantize(np), m.w)
    for shape in ((200, 300), (13, 128), (256, 129)):
        weight, scale, w = of_bytes(rng, shape, (128, 128), E4M3, np.float32)
        tensors = {"weight": weight.view(np.uint8), "weight_scale_inv": scale}
        plain = read_config({"quantization_config": KINDS["fp8"].config}, "").read(Linear(*shape, tensors), np)
        np.testing.assert_array_equal(plain.dequantize(np), w)


def test_scales_that_are_exponents_are_powers_of_two():
    of = read_config({"quantization_config": KINDS["fp8"].config}, "")
    exponent = np.array([[100, 130]], np.uint8)
    tensors = {"weight": np.full((8, 256), 0x38, np.uint8), "weight_scale_inv": exponent}  # 0x38 is 1
    w = of.read(Linear(8, 256, tensors), np).dequantize(np)
    np.testing.assert_array_equal(w, np.repeat(2.0 ** (exponent.astype(int) - 127), 128, 1).repeat(8, 0))


def test_unequal_projections_stand_in_one_matrix_exactly(seed):
    rng, parts = np.random.default_rng(seed), []
    for bits, group, rows in ((4, 64, 32), (8, 32, 16), (4, 256, 16)):
        m = random_matrix(rng, rows, 256, bits, group)
        parts.append(Plain(f"int{bits}", m.codes, m.scale.astype(np.float32), m.zero.astype(np.float32), group, F16))
    want = np.concatenate([part.dequantize(np) for part in parts])
    both = joined(parts, np)
    assert (both.kind, both.group, both.scale_dtype) == ("int8", 32, F16)
    np.testing.assert_array_equal(both.dequantize(np), want)
    numbers = rng.standard_normal((5, 256)).astype(np.float32)
    np.testing.assert_array_equal(joined([*parts, numbers], np), np.concatenate([want, numbers]))
    same = joined(parts[:1] * 2, np)
    assert (same.kind, same.group) == ("int4", 64)
