"""kernels/towers/: each against float64 or, bit for bit, the array code; simulated and on a GPU."""

from __future__ import annotations

from math import erf

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.ops.cuda import Cuda
from minioscar.ops.reference import Reference
from minioscar.towers import layers
from minioscar.towers import on_card as towers
from minioscar.towers.layers import Places
from minioscar.towers.media import Medium
from minioscar.towers.qwen_vision import QwenVision

from .kernel_device import on_each_device
from .simt.backend import Simt

ROUNDING = 1.01 * 2.0**-8  # of one number to BF16, and a little for float32
ROW = (1, 8), (9, 48), (17, 264), (3, 1152), (2, 4608)  # rows and numbers: lanes without a vector, some, many vectors


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (2 * rng.normal(size=shape)).astype(BF16)


def close(found: np.ndarray, expected: np.ndarray, more: float | np.ndarray = 1e-5) -> bool:
    return bool(np.all(np.abs(found.astype(np.float64) - expected) <= ROUNDING * np.abs(expected) + more))


@on_each_device
@pytest.mark.parametrize(("rows", "size"), ROW)
def test_layer_norm_is_that_of_float64_rounded_once(device, seed, rows, size):
    rng = np.random.default_rng(seed)
    x, weight, bias = numbers(rng, rows, size) + BF16.type(30), numbers(rng, size), numbers(rng, size)
    there, out = device.array(x), device.empty((rows, size), BF16)
    device.run(towers.layer_norm(there, (device.array(weight), device.array(bias)), out, 1e-6))
    assert np.array_equal(device.numpy(there), x)
    assert close(device.numpy(out), *normed(x, weight, bias))


def normed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The norm, and what float32 may add to its error: of x less its mean, and of the sum with the bias."""
    x, weight, bias = (of.astype(np.float64) for of in (x, weight, bias))
    y = x - x.mean(axis=1, keepdims=True)
    y /= np.sqrt((y * y).mean(axis=1, keepdims=True) + 1e-6)
    return y * weight + bias, 1e-5 + 1e-4 * np.abs(weight) + ROUNDING * 1e-4 * np.abs(bias)


@on_each_device
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "size"), ROW)
def test_a_sum_is_rounded_and_what_is_normed_is_the_rounded_one(device, seed, rows, size, has_bias):
    """The norm may take the place of what was added."""
    rng = np.random.default_rng(seed)
    x, y, weight, bias = (numbers(rng, *shape) for shape in ((rows, size), (rows, size), (size,), (size,)))
    of_y = numbers(rng, size) if has_bias else None
    there, more, plus = device.array(x), device.array(y), None if of_y is None else device.array(of_y)
    device.run(towers.layer_norm(there, (device.array(weight), device.array(bias)), more, 1e-6, (more, plus)))
    found = np.array(device.numpy(there))
    assert close(found, x.astype(np.float64) + y.astype(np.float64) + (0 if of_y is None else of_y.astype(np.float64)))
    assert close(device.numpy(more), *normed(found, weight, bias))
    alone = device.array(x)
    device.run(towers.layer_norm(alone, None, None, 1e-6, (device.array(y), plus)))
    assert np.array_equal(device.numpy(alone), found)


@on_each_device
@pytest.mark.parametrize(("tokens", "heads", "d", "biased", "turns"), [
    (5, 16, 72, True, True), (3, 2, 24, False, True), (2, 3, 8, True, False), (1, 20, 64, True, False),
])  # fmt: skip
def test_heads_get_their_biases_and_turn_by_their_places(device, seed, tokens, heads, d, biased, turns):
    rng = np.random.default_rng(seed)
    qkv, biases = numbers(rng, tokens, 4, heads, d), numbers(rng, 3, heads * d)
    there, given = device.array(qkv), [device.array(of) if biased else None for of in biases]
    grid, angles = np.arange(2 * tokens, dtype=np.int32).reshape(tokens, 2) % tokens, rng.normal(size=d // 4)
    tables = [of(np.arange(tokens)[:, None] * angles).astype(np.float32) for of in (np.cos, np.sin)]
    places = Places(grid, device.array(grid), *map(device.array, tables)) if turns else None
    device.run(towers.heads(tuple(there[:, i] for i in range(3)), tuple(given), places))
    expected = qkv.astype(np.float64)
    expected[:, :3] += biases.astype(np.float64).reshape(3, heads, d) * biased
    if turns:
        cos, sin = (of[grid].reshape(tokens, 1, 1, d // 2).astype(np.float64) for of in tables)
        a, b = np.split(expected[:, :2], 2, axis=-1)
        expected[:, :2] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    found = np.array(device.numpy(there))
    assert close(found, expected) and np.array_equal(found[:, 3], qkv[:, 3])


@on_each_device
@pytest.mark.parametrize(("tokens", "size"), [(1, 8), (3, 72), (2, 4304), (130, 64)])
@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_are_those_of_float64_rounded_once(device, seed, name, tokens, size):
    rng = np.random.default_rng(seed)
    x, bias = numbers(rng, tokens, size) * BF16.type(2), numbers(rng, size)
    x[0, :8], bias[:8] = [0, -0.0, 1e-30, 100, -100, 3e38, -3e38, -5], 0
    there, alone = device.array(x), device.array(x)
    device.run(towers.activate(name, there, device.array(bias)))
    device.run(towers.activate(name, alone, None))
    functions = {
        "gelu": lambda y: y / 2 * (1 + np.vectorize(erf)(y / np.sqrt(2))),
        "gelu_tanh": lambda y: y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
        "quick_gelu": lambda y: y / (1 + np.exp(-1.702 * np.maximum(y, -400))),
    }
    for found, y in ((there, x.astype(np.float64) + bias.astype(np.float64)), (alone, x.astype(np.float64))):
        assert close(device.numpy(found), functions[name](y))


def vision(patch: int, merge: int, side: int = 6) -> QwenVision:
    return QwenVision(1, 1, 48, 48, 2, 48, side, (), patch, 2, merge, mean=(0.5, 0.4, 0.3), deviation=(0.5, 0.25, 0.1))


@on_each_device
@pytest.mark.parametrize(("frames", "patch", "merge", "rows", "columns"), [
    (0, 16, 2, 2, 1), (1, 4, 2, 1, 3), (2, 4, 2, 3, 2), (2, 3, 1, 2, 2),
])  # fmt: skip
def test_patches_are_those_of_the_reference_bit_for_bit(device, seed, frames, patch, merge, rows, columns):
    tower, shape = vision(patch, merge), (rows * merge * patch, columns * merge * patch, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, *shape) if frames else shape, np.uint8)
    expected = tower.patches(pixels).astype(BF16)
    out = device.empty(expected.shape, BF16)
    device.run(towers.patches(device.array(pixels), out, tower, max(frames, 1)))
    assert np.array_equal(device.numpy(out), expected)


@on_each_device
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (3, 5), (2, 2)])
def test_places_of_patches_lie_between_four_of_the_table(device, seed, rows, columns):
    rng, tower = np.random.default_rng(seed), vision(4, 2)
    grid = tower.places(rows, columns).astype(np.int32)
    table, x = numbers(rng, tower.side**2, 48), numbers(rng, len(grid), 48)
    there, places = device.array(x), Places(grid, device.array(grid), None, None)
    device.run(towers.placed(there, device.array(table), places, tower.side))
    expected = x.astype(np.float64) + layers.stretched(table, grid, tower.side, np)
    assert close(device.numpy(there), expected)


@pytest.mark.parametrize("make", [lambda: Simt(80), lambda: Simt(90), pytest.param(Cuda, marks=pytest.mark.gpu)])
def test_a_tower_of_heads_of_72_is_that_of_the_reference(make, seed):
    """Of more patches than one tile of attention, and than go without cuBLAS."""
    rng = np.random.default_rng(seed)
    tower = QwenVision(1, 2, 144, 152, 2, 64, 6, (0,), patch=4)
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in tower.expected().items()}
    medium = Medium.of("image", rng.integers(0, 256, (64, 80, 3), np.uint8), 80, (1, 8, 10))
    ops = make()
    found = tower.encode(medium, {name: ops.array(x) for name, x in weights.items()}, ops)
    expected = tower.encode(medium, weights, Reference())
    for ours, theirs in zip((found.embeddings, *found.deep), (expected.embeddings, *expected.deep), strict=True):
        assert np.abs(ops.numpy(ours).astype(np.float32) - theirs).max() < 0.02 * np.abs(theirs).max()
