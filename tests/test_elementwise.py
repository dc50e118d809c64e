"""elementwise.cu: silu_mul against float64, add against the reference's BF16 bit for bit; simulated and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.ops import linear

from .kernel_device import on_each_device, on_the_card

# tokens, n: a piece, pieces of one round, of two, of two blocks
SMALL = [(1, 8), (3, 72), (2, 2056), (2, 4104), (1, 6144)]
LARGE = [(4097, 12288), (70000, 576)]  # more tokens than a grid may have in its second axis


def check_silu_mul(device, seed: int, tokens: int, n: int) -> None:
    x = (8 * np.random.default_rng(seed).normal(size=(tokens, 2 * n))).astype(BF16)
    x[0, :6], x[0, n : n + 6] = [0, -0.0, 88, -88, 100, -100], 1
    out = device.empty((tokens, n), BF16)
    device.run(linear.silu_mul(device.array(x), out), seed=seed % 5)
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    error = abs(np.array(device.numpy(out)).astype(np.float64) - expected)
    assert np.all(error <= 1.01 * 2.0**-8 * abs(expected) + 2.0**-133)  # one rounding to BF16


def check_add(device, seed: int, tokens: int, n: int, bias: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n,) if bias else (tokens, n)).astype(BF16), (8 * rng.normal(size=(tokens, n))).astype(BF16)
    there = device.array(y)
    device.run(linear.add(device.array(x), there), seed=seed % 5)
    expected = (y.astype(np.float32) + x.astype(np.float32)).astype(BF16)
    assert np.array_equal(np.array(device.numpy(there)).view(np.uint16), expected.view(np.uint16))


@on_each_device
@pytest.mark.parametrize(("tokens", "n"), SMALL)
def test_silu_mul_rounds_once(device, seed, tokens, n):
    check_silu_mul(device, seed, tokens, n)


@on_each_device
@pytest.mark.parametrize("bias", [False, True], ids=["residual", "bias"])
@pytest.mark.parametrize(("tokens", "n"), SMALL)
def test_add_gives_the_bits_of_the_reference(device, seed, tokens, n, bias):
    check_add(device, seed, tokens, n, bias)


def test_rows_that_are_no_multiple_of_8_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        linear.silu_mul(np.empty((2, 24), np.uint16), np.empty((2, 12), np.uint16))


@on_the_card
@pytest.mark.parametrize(("tokens", "n"), LARGE)
def test_of_models_shapes(device, seed, tokens, n):
    check_silu_mul(device, seed, tokens, n)
    for bias in (False, True):
        check_add(device, seed, tokens, n, bias)
