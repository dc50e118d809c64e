"""--weights: matrices of 16 bits are quantized while they are loaded, and everything else stays what it is."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.presets import arrays
from minioscar.app import cli
from minioscar.app.flags import FLAGS
from minioscar.arguments import with_weights
from minioscar.config import Config
from minioscar.engine import load as load_engine
from minioscar.errors import UserError
from minioscar.formats import rounding
from minioscar.ops.reference import Reference
from minioscar.quantized import Quantized, of_expert
from minioscar.quantized.weights import quantize
from minioscar.weights import load, rotate_values

from .quantized_files import BF16, SHAPE, HostOps, write_quantized
from .tiny import MOE, talker, write_model, write_talker

FIELDS = "qkv", "o", "gate_up", "down"
PROMPT = [3, 14, 15, 92, 65, 35]


@pytest.mark.parametrize("columns", [128, 96, 40])
@pytest.mark.parametrize(("mode", "steps"), [("int8", 254), ("int4", 15)])
def test_every_number_is_rounded_to_the_nearest_of_its_group(mode, steps, columns, seed):
    w = np.random.default_rng(seed).standard_normal((24, columns)).astype(np.float32)
    plain = rounding.quantize(w, mode, np)
    groups = w.reshape(24, -1, plain.group)
    assert plain.group == {128: 64, 96: 32, 40: 40}[columns] and plain.codes.max() <= {"int8": 255, "int4": 15}[mode]
    spread = 2 * abs(groups).max(-1) if mode == "int8" else groups.max(-1) - groups.min(-1)
    step = np.repeat(spread / steps, plain.group, 1)
    # half a step, and what the rounding of scale and zero to float16 moves at the far end
    assert (abs(plain.dequantize(np) - w) <= 0.52 * step).all()


@pytest.mark.parametrize("mode", rounding.MODES)
def test_a_matrix_is_quantized_some_rows_at_a_time_to_the_same_codes(mode, monkeypatch, seed):
    w = np.random.default_rng(seed).standard_normal((37, 128)).astype(np.float32)
    whole = rounding.quantize(w, mode, np)
    for chunk in (1, 1000, 128 * 37):
        monkeypatch.setattr(rounding, "CHUNK", chunk)
        for name in ("codes", "scale", "zero"):
            np.testing.assert_array_equal(getattr(rounding.quantize(w, mode, np), name), getattr(whole, name))


@pytest.mark.parametrize("value", [0.0, 0.3125, -2.0])
@pytest.mark.parametrize("mode", rounding.MODES)
def test_a_group_of_equal_numbers_is_exact(mode, value):
    w = np.full((2, 64), value, np.float32)
    np.testing.assert_allclose(rounding.quantize(w, mode, np).dequantize(np), w, rtol=5e-4)
    if mode == "int4":
        np.testing.assert_array_equal(rounding.quantize(w, mode, np).dequantize(np), w)


def test_numbers_on_a_grid_of_16_levels_stay_what_they_are(seed):
    """As those that were 4 bits before (GGUF's Q4_1): scale and minimum of 16 bits for each 32."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 0.02, (8, 4, 1)).astype(np.float16).astype(np.float32)
    low = -(scale * rng.uniform(5, 10, scale.shape)).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 16, (8, 4, 32))
    codes[..., :2] = 0, 15
    w = (codes * scale + low).reshape(8, 128)
    off = abs(rounding.quantize(w, "int4", np, group=32).dequantize(np) - w) / np.repeat(scale[..., 0], 32, 1)
    assert off.max() < 0.02  # of a step


@pytest.mark.parametrize("kv", ["oscar", "bf16"])
@pytest.mark.parametrize("mode", rounding.MODES)
def test_matrices_are_rotated_and_then_quantized_and_the_head_is_kept_in_8_bits(mode, kv, tmp_path, seed):
    folder = write_model(tmp_path / "m", seed, **SHAPE)
    config = with_weights(Config.from_folder(folder), mode)
    got = load_engine(folder, kv, "cpu", tokenizer=False, weights=mode).model.weights
    want = load(folder, Config.from_folder(folder), Reference())
    want = rotate_values(want, config, Reference()) if kv == "oscar" else want
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        for field in FIELDS:
            exact = rounding.quantize(getattr(theirs, field), mode, np).dequantize(np)
            np.testing.assert_array_equal(getattr(ours, field), exact)
        np.testing.assert_array_equal(ours.qkv_bias, theirs.qkv_bias)
    np.testing.assert_array_equal(got.head, rounding.quantize(want.head, "int8", np).dequantize(np))
    np.testing.assert_array_equal(got.embed, want.embed)
    assert got.rotation == ("folded" if kv == "oscar" else "none")


def test_a_tied_head_stays_the_embedding(tmp_path, seed):
    folder = write_model(tmp_path / "m", seed, **SHAPE, tie_word_embeddings=True)
    weights = load(folder, with_weights(Config.from_folder(folder), "int4"), Reference())
    assert weights.head is weights.embed


def test_what_files_have_quantized_stays_what_it_is_beside_a_head_of_8_bits(tmp_path, seed):
    exact = write_quantized(tmp_path, "awq-gemm", seed)
    weights = load(tmp_path, with_weights(Config.from_folder(tmp_path), "int4"), Reference())
    np.testing.assert_array_equal(weights.layers[1].down, exact["model.layers.1.mlp.down_proj.weight"])
    want = rounding.quantize(exact["lm_head.weight"], "int8", np).dequantize(np)
    np.testing.assert_array_equal(weights.head, want)


@pytest.mark.parametrize("mode", [None, *rounding.MODES])
@pytest.mark.parametrize("name", ["awq-gemm", "gptq-8", "fp8", None])
def test_the_bytes_that_are_announced_are_those_that_a_card_keeps(name, mode, tmp_path, seed):
    if name is None:
        write_model(tmp_path, seed, **SHAPE)
    else:
        write_quantized(tmp_path, name, seed)
    config, ops = with_weights(Config.from_folder(tmp_path), mode), HostOps()
    weights = load(tmp_path, config, ops)
    kept = sum(array.nbytes for array in arrays(weights))
    assert abs(kept / ops.weight_bytes(config) - 1) < 0.02  # an FP8 head of 160 rows is padded
    assert weights.quantized == (name is not None or mode is not None)


@pytest.mark.parametrize("fold", [False, True])
def test_quantizing_a_loaded_model_is_quantizing_it_while_it_is_loaded(fold, tmp_path, seed):
    """Rotated in the back end's dtype, which a kernel needs."""
    folder = write_model(tmp_path / "m", seed, **SHAPE)
    config, ops = with_weights(Config.from_folder(folder), "int4"), HostOps()
    plain = load(folder, Config.from_folder(folder), ops)
    late = quantize(rotate_values(plain, config, ops) if fold else plain, config, ops)
    for a, b in zip(arrays(load(folder, config, ops, fold=fold)), arrays(late), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_a_prompt_cache_is_bound_to_how_the_weights_are_kept(tmp_path):
    folder, file = write_talker(tmp_path / "m", 1), tmp_path / "p.kv.safetensors"
    load_engine(folder, "int2", "cpu", weights="int8").prefill("the cat sat", chat=False).save(file)
    assert len(load_engine(folder, "int2", "cpu", weights="int8").load_cache(file))
    for weights, named in ((None, 'weights "int8" there, null here'), ("int4", 'weights "int8" there, "int4" here')):
        with pytest.raises(UserError, match=f"made with another config: {named}"):
            load_engine(folder, "int2", "cpu", weights=weights, cache=file)
    talker(folder).prefill("the cat sat", chat=False).save(file)
    with pytest.raises(UserError, match='weights null there, "int4" here'):
        load_engine(folder, "int2", "cpu", weights="int4").load_cache(file)


def test_where_weights_do_not_fit_a_mode_that_does_is_named(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "m", 1, **SHAPE)
    config, sizes = Config.from_folder(folder), {}
    for mode in (None, *rounding.MODES):
        sizes[mode] = HostOps().weight_bytes(with_weights(config, mode))
    for free, named in ((sizes["int8"], "; --weights int8 fits"), (sizes["int4"], "; --weights int4 fits"), (9, "")):
        monkeypatch.setattr(HostOps, "free_bytes", lambda self, free=free: free)
        with pytest.raises(UserError, match=f"memory are free{named}$"):
            load(folder, config, HostOps())


def test_an_unknown_mode_is_refused(tmp_path):
    folder = write_model(tmp_path / "m", 1)
    with pytest.raises(UserError, match="--weights 'int3' is not known; choose from int8, int4, or leave it out"):
        load_engine(folder, weights="int3", tokenizer=False)


def test_the_command_line_has_the_modes(tmp_path, capsys):
    folder = str(write_talker(tmp_path / "m", 1))
    for mode in ("int8", "int4"):
        cli.main(["generate", folder, "the cat", "--raw", "--max-tokens", "4", "--weights", mode, "--device", "cpu"])
    cli.main(["info", folder, "--weights", "int4", "--device", "cpu"])
    assert "(int4), reading a prompt" in capsys.readouterr().out
    cli.main(["eval", folder, "--weights", "int8,int4", "--prefill", "64", "--decode", "8", "--kv", "int2"])
    lines = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    modes = ("as they are", "int8", "int4")
    assert lines == [[f"| {kv}", mode] for mode in modes for kv in ("bf16", "int2")]


def test_every_command_that_loads_a_model_to_answer_has_the_option():
    commands = {name for name, (_, flags) in FLAGS.items() if "--weights" in dict(flags)}
    assert commands == {"generate", "chat", "serve", "cache", "info", "eval"}


@pytest.mark.parametrize("inter", [64, 40])
def test_of_a_model_with_experts_all_but_the_router_is_quantized(inter, tmp_path, seed, capsys):
    """Experts of 40 rows are not whole tiles: they are kept as the numbers of their codes."""
    folder = write_model(tmp_path / "m", seed, **SHAPE | MOE | {"moe_intermediate_size": inter})
    config, ops = with_weights(Config.from_folder(folder), "int4"), HostOps()
    before, weights = load(folder, Config.from_folder(folder), Reference()), load(folder, config, ops)
    for own, layer in zip(before.layers, weights.layers, strict=True):
        assert layer.router.dtype == BF16 and np.array_equal(layer.router, own.router.astype(BF16))
        for field in ("gate_up", "down"):
            matrix, numbers = getattr(layer, field), getattr(own, field).astype(BF16).astype(np.float32)
            of_tiles = inter == 64 or field == "down"
            assert isinstance(matrix, Quantized) == of_tiles
            for e, w in enumerate(numbers):
                kept, want = of_expert(matrix, e, 6), rounding.quantize(w, "int4", np).dequantize(np)
                got = kept.dequantize() if of_tiles else kept.astype(np.float32)
                assert np.array_equal(got, want if of_tiles else want.astype(BF16).astype(np.float32))
    said = capsys.readouterr().err
    assert ("2 matrices are kept as bfloat16 numbers: experts of 40 rows are not a multiple of 16" in said) == (
        inter == 40
    )
    if inter == 64:
        late = quantize(load(folder, Config.from_folder(folder), ops), config, ops)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(arrays(weights), arrays(late), strict=True))
        kept = sum(array.nbytes for array in arrays(weights))
        assert abs(kept / ops.weight_bytes(config) - 1) < 0.02
