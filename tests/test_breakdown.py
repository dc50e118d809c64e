"""benchmarks/breakdown.py: what it says of the launches of a recorded step. Their times only a card has."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.breakdown import bytes_of, first_of, label
from minioscar.cache import Cache
from minioscar.ops.decode import StepDecoder
from minioscar.ops.launch import Address, Launch, TensorMap
from minioscar.parallel.collectives import Gather, Sum
from minioscar.parallel.ranks import Ranks
from minioscar.sampling import RowSampling

from .test_cuda_backend import SIMULATED, _simulated, _simulated_hopper
from .test_decode_step import nearest, of_backend, of_matrices
from .tiny import MOE, write_model

SHAPE = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 192}  # no two matrices of the same


def as_on_a_card(launch: Launch, kept: set[int]) -> Launch:
    """Of arrays that come from the step's own pool, a recorded launch has the addresses alone (`launch.Recording`)."""

    def released(a):
        if isinstance(a, TensorMap):
            return replace(a, array=released(a.array))
        return a if not np.ndim(a) or id(a) in kept else Address(a.ctypes.data, a.shape, a.nbytes)

    return replace(launch, args=tuple(map(released, launch.args)))


@SIMULATED
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("make", [_simulated, _simulated_hopper])
@pytest.mark.parametrize("kv", ["int2", "bf16"])
def test_products_are_named_by_their_shape_and_count_their_matrix_attention_its_cache(make, kv, rows, tmp_path):
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", 3, **SHAPE), kv)
    config, weights = engine.config, engine.model.weights
    cache = Cache(config, engine.scheme, rows, 256, ops)
    recorded = StepDecoder(engine.model, cache, [RowSampling()] * rows, replay="launches").work.recorded.launches
    matrices = {
        f"{matrix.shape[1]} to {matrix.shape[0]}": matrix.nbytes
        for matrix in (weights.head, *(getattr(weights.layers[0], name) for name in ("qkv", "o", "gate_up", "down")))
    }
    kept = {id(array) for of in (cache, *cache.layers) for array in of.arrays.values()}
    kept |= {id(matrix) for layer in weights.layers for matrix in vars(layer).values()} | {id(weights.head)}
    launches = [as_on_a_card(launch, kept) for launch in recorded]
    found = Counter()
    for launch in launches:
        name, _, shape = label(launch).partition(" ")
        found[shape or name] += 1
        if shape:
            assert name.startswith("linear") and bytes_of(launch, cache) == matrices[shape]
        elif name.startswith("decode_attention"):
            assert bytes_of(launch, cache) * config.num_layers == cache.nbytes
        else:
            assert 0 < bytes_of(launch, cache) < 1 << 20, name
    assert sum(found[shape] for shape in matrices) == 4 * config.num_layers + 1
    assert sum(count for name, count in found.items() if name.startswith("decode_attention")) == config.num_layers


@SIMULATED
@pytest.mark.parametrize("rows", [1, 20])
def test_products_of_quantized_weights_are_named_by_kind_and_count_codes_and_scales(rows, tmp_path):
    _, engine, ops = of_backend(_simulated, write_model(tmp_path / "m", 3, **SHAPE), "bf16")

    def codes(x):
        return ops.quantized(nearest(np.asarray(x, np.float32), "int4")).map(ops.xp.asarray)

    weights = engine.model.weights = of_matrices(engine.model.weights, codes)
    cache = Cache(engine.config, engine.scheme, rows, 256, ops)
    recorded = StepDecoder(engine.model, cache, [RowSampling()] * rows, replay="launches").work.recorded.launches
    found = {label(launch): bytes_of(launch, cache) for launch in recorded if launch.name.startswith("linear")}
    matrices = (weights.head, *(getattr(weights.layers[0], name) for name in ("qkv", "o", "gate_up", "down")))
    for matrix in matrices:
        rows_and_columns = f"{matrix.shape[1]} to {matrix.shape[0]} int4"
        assert [size for name, size in found.items() if name.endswith(rows_and_columns)] == [matrix.nbytes]
    assert len(found) == len(matrices)


@SIMULATED
@pytest.mark.parametrize("rows", [1, 20])
def test_experts_are_named_by_their_shape_and_count_the_matrices_that_are_taken(rows, tmp_path):
    _, engine, ops = of_backend(_simulated, write_model(tmp_path / "m", 3, **SHAPE | MOE), "bf16")
    cache = Cache(engine.config, engine.scheme, rows, 256, ops)
    recorded = StepDecoder(engine.model, cache, [RowSampling()] * rows, replay="launches").work.recorded.launches
    found = {label(launch): bytes_of(launch, cache, 2.5) for launch in recorded}
    expert = 256 * 24 * 2
    assert found["experts 256 to 48"] == 2.5 * 2 * expert and found["experts 24 to 256"] == 2.5 * expert
    assert {"choose", "sort", "combine"} & found.keys() == (set() if rows == 1 else {"choose", "sort", "combine"})
    assert any(name.endswith("256 to 6") for name in found)  # the router


@SIMULATED
@pytest.mark.parametrize("rows", [1, 20])
def test_of_quantized_experts_codes_and_scales_of_those_that_are_taken_count(rows, tmp_path):
    shape = SHAPE | MOE | {"moe_intermediate_size": 32}
    _, engine, ops = of_backend(_simulated, write_model(tmp_path / "m", 3, **shape), "bf16")

    def codes(x):
        plain = nearest(np.asarray(x, np.float32).reshape(-1, x.shape[-1]), "int4")
        return ops.quantized(plain).map(ops.xp.asarray)

    weights = engine.model.weights = of_matrices(engine.model.weights, codes)
    cache = Cache(engine.config, engine.scheme, rows, 256, ops)
    recorded = StepDecoder(engine.model, cache, [RowSampling()] * rows, replay="launches").work.recorded.launches
    found, layer = {label(launch): bytes_of(launch, cache, 3.0) for launch in recorded}, weights.layers[0]
    assert found["experts 256 to 64 int4"] == layer.gate_up.nbytes // 2  # three of six
    assert found["experts 32 to 256 int4"] == layer.down.nbytes // 2


def test_what_nccl_does_is_named_and_counts_what_a_card_brings_in():
    arrays = Ranks([np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)])
    for launch, name in ((Sum(arrays), "sum by NCCL"), (Gather(arrays, arrays, arrays, [0, 2]), "gather by NCCL")):
        assert label(first_of(launch)) == name and bytes_of(first_of(launch), None) == 24
