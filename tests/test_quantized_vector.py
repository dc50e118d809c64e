"""Products of few tokens by sm90/quantized_vector.cu: the bits of quantized/linear.cu."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.ops.launch import Card
from minioscar.ops.linear import Products
from minioscar.quantized import on_card, plans
from minioscar.sm90 import quantized_vector

from .kernel_device import on_each_device_over
from .pairwise import switches
from .test_linear_quantized import EPS, PARTS, Product, matrix

HOPPER = Card(3, 90)
# kind, columns of a group, tokens, in, out: units that are not whole, blocks with one tile and with several passes
CASES = [
    ("int8", 64, 1, 1024, 160), ("int8", 128, 7, 384, 64), ("int8", 128, 3, 2304, 288), ("e4m3", 128, 1, 2560, 224),
    ("e4m3", 128, 8, 512, 96), ("e4m3", 64, 2, 1024, 416), ("e4m3", 128, 1, 4096, 192),
]


class ByCopyEngine(Product):
    def run(self, card: Card = HOPPER, order: int = 0, **_: None) -> np.ndarray:
        device, silu = self.device, self.parts.get("silu", False)
        out = device.empty((len(self.x), self.width), np.float32 if self.parts.get("float32") else BF16)
        given = {name: getattr(self, name) for name in ("bias", "residual")}
        given = {name: None if x is None else device.array(x) for name, x in given.items()}
        norm = None if self.norm is None else (device.array(self.norm), EPS)
        x, weight = device.array(self.x), self.weight.map(device.array)
        device.run(quantized_vector.linear(x, weight, out, card, norm=norm, silu=silu, **given), 90, order)
        return np.array(device.numpy(out))


@on_each_device_over(case=CASES, parts=PARTS, traits={"parts": switches})
def test_a_product_has_the_bits_of_the_general_kernel(device, seed, case, parts):
    kind, group, tokens, size, rows = case
    weight = matrix(np.random.default_rng(seed), kind, rows, size, group)
    assert quantized_vector.fits(tokens, weight, parts.get("silu", False), HOPPER)
    got = ByCopyEngine(device, seed, tokens, weight, **parts).check(order=seed)
    assert np.array_equal(got, Product(device, seed, tokens, weight, **parts).run(HOPPER))


@pytest.mark.parametrize("capability", [90, 100])
def test_what_does_not_fit_is_left_to_the_general_kernel(capability):
    def fits(kind="e4m3", rows=512, size=1024, group=128, tokens=1, silu=False):
        weight, card = matrix(np.random.default_rng(0), kind, rows, size, group), Card(132, capability)
        found = quantized_vector.fits(tokens, weight, silu, card)
        x, out = np.empty((tokens, size), BF16), np.empty((tokens, rows // 2 if silu else rows), BF16)
        if found or plans.fits(tokens, weight, False, silu, card):
            (launch,) = on_card.launches(Products(np, card), x, weight, out, silu=silu)
            assert launch.source.startswith("sm90/") == found
        return found

    hopper = capability == 90
    assert [fits(), fits(tokens=8), fits(silu=True), fits(group=64), fits("int8")] == [hopper] * 5
    assert not (fits(tokens=9) or fits(tokens=0) or fits(group=256) or fits("int4") or fits("int8", group=32))
    assert not (fits(size=1152) or fits(rows=520) or fits(rows=528, silu=True))
    assert not fits(size=25600, tokens=4) and fits(size=25600) == hopper
