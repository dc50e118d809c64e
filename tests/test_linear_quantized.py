"""Products with weights in 4 and 8 bits against float64 of the dequantized weights, simulated and on a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.formats.plain import BITS, E4M3, Plain
from minioscar.ops.launch import Card
from minioscar.ops.linear_batch import Scratch
from minioscar.quantized import Quantized, _halves, from_plain
from minioscar.quantized import plans as quantized

from .kernel_device import on_each_device, on_each_device_over, on_the_card
from .pairwise import switches
from .test_cuda_backend import on_each_backend
from .test_quantized import random_plain

CASES = Path(__file__).parent / "simt" / "cases"
EPS = 1e-5
SMALL = Card(2, 80)


@on_each_device
@pytest.mark.parametrize("kind", BITS)
def test_every_half_word_becomes_the_operands_that_its_codes_are(device, kind):
    out = device.empty((65536, 2, 2), np.uint32)
    device.compile(CASES / "codes.cu", "decode_all", [f"KIND={kind.upper()}"])(256, 256, [out])
    words = np.array(device.numpy(out))
    assert np.array_equal(words & 0xFFFF, words >> 16)  # both halves alike: nothing of one gets into the other
    got = (words & 0xFFFF).astype(np.uint16).view(BF16).astype(np.float64)
    half = np.arange(65536, dtype=np.uint32)[:, None, None]
    register, pair = np.arange(2), np.arange(2)[:, None]  # [p, i]
    if kind == "int4":
        assert np.array_equal(got * 2.0**133, (half >> 4 * (2 * pair + register) & 15) * 16.0**register)
    elif kind == "int8":
        assert np.array_equal(got * 2.0**133, np.broadcast_to(half >> 8 * register & 255, got.shape))
    else:
        first = half >> 8 & 0x80 | half >> 4 & 0x7F
        second = half >> 4 & 0x80 | half >> 8 & 0x70 | half & 0xF
        codes = np.broadcast_to(np.where(register, second, first), got.shape)
        numbers = codes & 127 != 127
        assert np.array_equal(got[numbers] * 2.0**120, E4M3[codes[numbers]].astype(np.float64))


def matrix(rng: np.random.Generator, kind: str, rows: int, size: int, group: int) -> Quantized:
    """Random codes and scales of a product's usual size; zeros from one end of the range to the other, scales of both
    signs, some 0; a group of equal codes."""
    plain = random_plain(rng, kind, rows, size, group)
    plain.codes[:, : min(group, size)] = plain.codes[:, :1]
    scale = plain.scale * np.float32(2.0 ** (-10 if kind == "e4m3" else 3 - BITS[kind]) / np.sqrt(size))
    return from_plain(Plain(kind, plain.codes, scale.astype(np.float16).astype(np.float32), plain.zero, group, None))


def inputs(rng: np.random.Generator, tokens: int, size: int) -> np.ndarray:
    """One token ordinary, one with a number 300 times as large, one whose sums over groups nearly cancel, one with
    all numbers positive; and so on."""
    x = rng.normal(size=(tokens, size))
    x[1::4, size // 2] = 300
    x[2::4, 1::2] = -x[2::4, : size // 2 * 2 : 2] * (1 + 2.0**-7)
    x[3::4] = abs(x[3::4])
    return x.astype(BF16)


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16).astype(np.float64)


class Product:
    """Inputs of a product, on a device, and what float64 makes of them. parts: norm, bias, residual, silu, float32."""

    def __init__(self, device, seed: int, tokens: int, weight: Quantized, **parts: bool):
        rng, (rows, size), self.device, self.parts = np.random.default_rng(seed), weight.shape, device, parts
        self.width, self.weight = rows // 2 if parts.get("silu") else rows, weight
        self.x = inputs(rng, tokens, size)
        self.norm = rng.uniform(0.5, 1.5, size).astype(BF16) if parts.get("norm") else None
        self.bias = rng.normal(size=rows).astype(BF16) if parts.get("bias") else None
        self.residual = rng.normal(size=(tokens, self.width)).astype(BF16) if parts.get("residual") else None

    def run(
        self, card: Card = SMALL, order: int = 0, tokens: int | None = None,
        plan: quantized.CodesBatchPlan | None = None,
    ) -> np.ndarray:
        """tokens: the first ones alone. plan: of a batch (None: the one that it gets)."""
        device, x = self.device, self.x[:tokens]
        out = device.empty((len(x), self.width), np.float32 if self.parts.get("float32") else BF16)
        given = {"silu": self.parts.get("silu", False)}
        given |= {"bias": device.array(self.bias)} if self.bias is not None else {}
        given |= {"residual": device.array(self.residual[:tokens])} if self.residual is not None else {}
        norm = None if self.norm is None else (device.array(self.norm), EPS)
        x_there, weight = device.array(x), self.weight.map(device.array)
        if plan is None and quantized.fits(len(x), self.weight, norm is not None, given["silu"], card):
            device.run(quantized.linear(x_there, weight, out, card, norm=norm, **given), seed=order)
            return np.array(device.numpy(out))
        plan = plan or quantized.batch_plan(len(x), self.weight, given["silu"], card)
        counters = device.array(np.zeros(plan.counters, np.int32))
        prepared = device.empty(max(plan.x_numbers, x.size), BF16), device.empty(plan.x_sums, np.float32)
        scratch = Scratch(device.empty(plan.workspace_floats, np.float32), counters, *prepared)
        before, x_there = quantized.before_batch(x_there, weight, plan, norm, scratch)
        for launch in (*before, quantized.linear_batch(x_there, weight, out, plan, scratch, **given)):
            device.run(launch, arch=90 if launch.source.startswith("sm90/") else 80, seed=order)
        assert not device.numpy(counters).any()
        return np.array(device.numpy(out))

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """The result in float64, and what may be missing from it."""
        x, w = self.x.astype(np.float64), self.weight.dequantize().astype(np.float64)
        if self.norm is not None:
            x = rounded(x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPS) * self.norm.astype(np.float64))
        y, size_of = x @ w.T, abs(x) @ self._code_sizes().T
        # Float32 sums of codes times x, before zeros are taken off; what tensor cores truncate; and two numbers of the
        # norm may be rounded to the other side than in float64, by 2^-8 of them at most.
        error = 2.0**-20 * size_of + self._truncated(abs(x))
        if self.norm is not None:
            error = error + 2 * 2.0**-8 * (abs(x).max(axis=1)[:, None] * abs(w).max(axis=1))
        if self.bias is not None:
            y = y + self.bias.astype(np.float64)
            error = error + 2.0**-23 * abs(y)
        if self.parts.get("silu"):
            (gate, up), (gate_error, up_error) = np.split(y, 2, axis=1), np.split(error, 2, axis=1)
            y = gate / (1 + np.exp(-gate)) * up
            error = 1.1 * gate_error * abs(up) + abs(gate) * up_error + 2.0**-20 * abs(y)
        if self.residual is not None:
            y = y + self.residual.astype(np.float64)
            error = error + 2.0**-23 * abs(y)
        return y, error + (0 if self.parts.get("float32") else 2.0**-8 * abs(y))

    def _truncated(self, x: np.ndarray) -> np.ndarray:
        """What tensor cores may cut off, [tokens, rows]. x: sizes.

        mma.m16n8k16 of compute capability 9.0 aligns its 16 products and the sum so far to the largest exponent, drops
        what is beyond 25 bits of each of these 17, and cuts their sum to 24 bits; an operand that is subnormal counts
        with the exponent of 2^-126 (Khattak and Mikaitis, Accurate Models of NVIDIA Tensor Cores, arXiv 2512.07004, and
        the models beside it). So one takes at most 17 * 2^-25 of the largest addend and 2^-23 of the sum, and there is
        one for each 16 columns. A code q is q * 2^-133, 16 times that in odd rows of int4, a number of e4m3 2^-120
        times itself (codes.cuh); x is summed by the same instruction, with an operand that is normal.
        """
        weight, is_e4m3 = self.weight, self.weight.kind == "e4m3"
        row_scale, group = weight.row_scale[: weight.shape[0], None].astype(np.float64), weight.group
        if is_e4m3:
            scale, zero = weight._spread(weight.scales[:, :, None]) * row_scale, np.zeros(weight.shape)
        else:
            halves = (half.view(np.float16).astype(np.float64) for half in _halves(weight.scales))
            scale, zero = map(weight._spread, halves)
            scale = scale * row_scale
        codes, zeros = abs(weight.dequantize() + zero * scale), abs(zero * scale)
        scale = abs(scale)
        least = np.full(weight.shape[0], 2.0**-6 if is_e4m3 else 128.0)
        least[1::2] /= 16 if weight.kind == "int4" else 1
        found = np.zeros((len(x), weight.shape[0]))
        for k in range(0, weight.shape[1], min(group, 128)):
            of_x, of_codes = x[:, k : k + min(group, 128)], codes[:, k : k + min(group, 128)]
            sums, x_sums = of_x @ of_codes.T, of_x.sum(axis=1)[:, None] * zeros[:, k]
            largest = np.maximum(of_x.max(axis=1)[:, None] * (least * scale[:, k]), sums) + x_sums
            found += -(-of_x.shape[1] // 16) * (17 * 2.0**-25 * largest + 2.0**-23 * (sums + x_sums))
        return found

    def _code_sizes(self) -> np.ndarray:
        """(code + zero) * scale: the size of what is added up."""
        weight = self.weight
        if weight.kind == "e4m3":
            return abs(weight.dequantize().astype(np.float64))
        negated = weight.map(np.array)
        negated.scales[...] = negated.scales & 0x7FFFFFFF | 0x80000000 * (negated.scales >> 16 != 0)
        return abs(negated.dequantize().astype(np.float64))

    def check(self, **how) -> np.ndarray:
        got = self.run(**how)
        y, error = self.exact()
        assert np.all(abs(got.astype(np.float64) - y) <= error)
        return got


@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 32), ("int8", 128), ("e4m3", 128)])
def test_the_bound_of_a_product_shows_what_is_wrong(kind, group, seed):
    """By little: weights rounded to BF16, eight columns left out, a code of int4 off by one."""
    rng = np.random.default_rng(seed)
    weight = matrix(rng, kind, 64, 640, group)
    product = Product(None, seed, 4, weight, float32=True)
    (y, error), w, x = product.exact(), weight.dequantize().astype(np.float64), product.x.astype(np.float64)
    exist = error > 0  # scales may be 0
    assert np.mean((error <= 2.0**-17 * (abs(x) @ product._code_sizes().T))[exist]) > 0.5 or not exist.any()
    less = np.argsort(abs(w).sum(axis=0))[:-8]  # the largest: a group's scale may be 0
    wrong = [x[:, less] @ w[:, less].T] if exist.any() else []
    if np.mean(rounded(w) != w) > 0.5:  # scales that are subnormal in float16 have so few bits that BF16 holds weights
        wrong.append(x @ rounded(w).T)
    for found in wrong:
        assert np.mean(abs(found - y)[exist] > error[exist]) > 0.5
    shown = []
    for at in rng.integers(0, weight.codes.size, 40) if kind == "int4" else ():
        moved = weight.map(np.array)
        moved.codes.flat[at] ^= 1
        change = abs(x @ (moved.dequantize().astype(np.float64) - w).T)
        row = change.max(axis=0).argmax()
        shown += [change[0, row] > error[0, row]] if change.any() else []
    assert kind != "int4" or (len(shown) > 10 and np.mean(shown) > 0.5)


PARTS = [
    {},
    {"float32": True},
    {"norm": True, "bias": True},
    {"residual": True},
    {"silu": True, "norm": True, "bias": True},
    {"silu": True, "bias": True, "residual": True},
    {"norm": True, "float32": True},
]
# kind, columns of a group, tokens, in, out
SMALLS = [
    ("int4", 128, 1, 640, 96), ("int4", 64, 3, 200, 64), ("int4", 32, 8, 1056, 32), ("int4", 320, 5, 320, 160),
    ("int4", 256, 7, 2560, 32), ("int8", 128, 2, 640, 96), ("int8", 72, 8, 72, 64), ("int8", 32, 4, 576, 32),
    ("e4m3", 128, 6, 640, 288), ("e4m3", 1056, 1, 1056, 64), ("e4m3", 128, 8, 2304, 32), ("int4", 128, 2, 6144, 64),
]


@on_each_device_over(case=SMALLS, parts=PARTS, traits={"parts": switches})
def test_products_with_what_stands_before_and_behind_them(device, seed, case, parts):
    kind, group, tokens, size, rows = case
    weight = matrix(np.random.default_rng(seed), kind, rows, size, group)
    Product(device, seed, tokens, weight, **parts).check()


BATCHES = [
    ("int4", 128, 9, 640, 96), ("int4", 64, 33, 200, 64), ("int4", 32, 16, 1056, 544), ("int4", 320, 65, 320, 160),
    ("int4", 128, 128, 384, 288), ("int8", 128, 17, 640, 96), ("int8", 32, 70, 576, 32), ("int8", 72, 40, 72, 64),
    ("e4m3", 128, 48, 640, 288), ("e4m3", 64, 131, 264, 64), ("e4m3", 264, 20, 264, 320),
]


@on_each_device_over(case=BATCHES, parts=PARTS, traits={"parts": switches})
def test_products_of_batches(device, seed, case, parts):
    kind, group, tokens, size, rows = case
    weight = matrix(np.random.default_rng(seed), kind, rows, size, group)
    Product(device, seed, tokens, weight, **parts).check()


EPILOGUES = [{}, {"silu": True, "bias": True}, {"residual": True, "bias": True, "float32": True}]


@on_each_device_over(kind=list(BITS), parts=EPILOGUES, multiprocessors_and_capability=[(2, 90), (7, 80), (3, 89)])
def test_every_way_to_share_the_slabs_of_a_batch(device, seed, kind, parts, multiprocessors_and_capability):
    weight = matrix(np.random.default_rng(seed), kind, 416, 1096, 64)
    product = Product(device, seed, 20, weight, **parts)
    plans = quantized.batch_configs(20, weight, parts.get("silu", False), Card(*multiprocessors_and_capability))
    for plan in dict.fromkeys(plans):
        product.check(plan=plan)


# kind, columns of a group, tokens, in, out
WARPGROUPS = [
    ("int4", 128, 9, 648, 224), ("int4", 64, 33, 392, 96), ("int4", 320, 81, 320, 96), ("int8", 64, 17, 264, 64),
    ("e4m3", 128, 40, 392, 288),
]


@on_each_device
@pytest.mark.parametrize("parts", [*EPILOGUES[1:], {"norm": True, "float32": True}, {"norm": True, "silu": True}])
@pytest.mark.parametrize(("kind", "group", "tokens", "size", "rows"), WARPGROUPS)
def test_warpgroups_multiply_with_every_plan(device, seed, kind, group, tokens, size, rows, parts):
    """Sums of splits, tiles and slabs that the matrix does not fill, several items of a block."""
    product = Product(device, seed, tokens, matrix(np.random.default_rng(seed), kind, rows, size, group), **parts)
    plans = quantized.wgmma_configs(tokens, product.weight, parts.get("silu", False), Card(10, 90))
    plans += quantized.wgmma_configs(tokens, product.weight, parts.get("silu", False), Card(1, 90))
    for plan in {(min(p.splits, 2), p.blocks < p.tiles): p for p in plans}.values():
        product.check(plan=plan)


def test_a_batch_has_plans_on_every_card():
    """Of 99 KiB of shared memory too, where slabs are shorter."""
    found = set()
    for kind, capability, tokens in itertools.product(BITS, (80, 89, 90), (9, 16, 48, 65, 128, 256)):
        for size, rows, silu in ((4096, 6144, False), (12288, 4096, False), (4096, 24576, True), (1024, 512, False)):
            plan = quantized.batch_plan(tokens, Quantized(kind, (rows, size), 128), silu, Card(108, capability))
            assert plan.shared <= Card(108, capability).max_shared_bytes and plan.columns * plan.column_blocks >= tokens
            wgmma = isinstance(plan, quantized.WgmmaCodesPlan)
            assert wgmma <= (capability == 90) and (rows == 512 or wgmma == (capability == 90))
            found.add((plan.splits > 1,) if wgmma else (plan.row_tiles, plan.slab_runs))
    assert found >= {(False,), (True,)} and {1, 2} == {n for p in found if len(p) > 1 for n in p}


@on_each_device
@pytest.mark.parametrize("kind", BITS)
def test_a_token_of_a_batch_gets_the_bits_that_it_gets_in_another_that_shares_slabs_alike(device, seed, kind):
    weight = matrix(np.random.default_rng(seed), kind, 208, 1280, 128)
    product = Product(device, seed, 60, weight)
    pairs = zip(*(quantized.batch_configs(n, weight, False, Card(5, 90)) for n in (9, 60)), strict=True)
    for small, large in pairs:
        if all(getattr(small, n) == getattr(large, n) for n in ("row_tiles", "k_groups", "blocks", "slab_runs")):
            first = product.run(plan=large)
            assert np.array_equal(first[:9], product.run(tokens=9, plan=small))
            assert np.array_equal(first, product.run(plan=large, order=1))


@on_each_device
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize(("rows", "size"), [(34, 104), (7, 64), (130, 264)])
def test_rows_and_columns_that_fill_no_tile(device, seed, kind, rows, size):
    for group, tokens in ((64, 3), (size, 3), (64, 10), (size, 10)):
        weight = matrix(np.random.default_rng(seed), kind, rows, size, group)
        Product(device, seed, tokens, weight, norm=True, bias=True).check()


@on_each_device
@pytest.mark.parametrize("zero", [0, 15])
def test_zeros_at_the_ends_and_negative_and_no_scales(device, seed, zero):
    rng = np.random.default_rng(seed)
    plain = random_plain(rng, "int4", 32, 512, 128)
    for scale in (-0.01, 0, 0.01):
        scales = np.full_like(plain.scale, np.float16(scale))
        weight = from_plain(Plain("int4", plain.codes, scales, np.full_like(plain.scale, zero), 128, None))
        got = Product(device, seed, 4, weight, float32=True).check()
        assert scale or not got.any()


@on_each_device
@pytest.mark.parametrize("kind", BITS)
def test_equal_bits_on_every_grid_in_every_order_and_for_a_token_alone(device, seed, kind):
    weight = matrix(np.random.default_rng(seed), kind, 208, 2560, 128)
    product = Product(device, seed, 6, weight, norm=True, residual=True)
    first = product.run(Card(1, 80))
    for order, multiprocessors in ((1, 1), (2, 2), (3, 40)):
        assert np.array_equal(first, product.run(Card(multiprocessors, 80), order))
    assert np.array_equal(first[:1], product.run(Card(2, 80), tokens=1))


@on_each_device
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize(("rows", "size", "group"), [(34, 104, 32), (48, 640, 128), (16, 576, 576), (13, 1096, 64)])
def test_a_matrix_is_dequantized_as_numpy_does(device, seed, kind, rows, size, group):
    weight = matrix(np.random.default_rng(seed), kind, rows, size, group)
    out = device.empty((rows, size), BF16)
    device.run(quantized.dequantize(weight.map(device.array), out))
    assert np.array_equal(np.array(device.numpy(out)), weight.dequantize().astype(BF16))


@on_each_device
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize(("rows", "size"), [(34, 104), (48, 640), (13, 1096)])
def test_codes_are_repacked_as_numpy_does(device, seed, kind, rows, size):
    plain = random_plain(np.random.default_rng(seed), kind, rows, size, size)
    out = device.empty(quantized.words_shape(kind, rows, size), np.uint32)
    device.run(quantized.repack(kind, device.array(plain.codes), out))
    assert np.array_equal(np.array(device.numpy(out)), from_plain(plain).codes)


@on_each_backend
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("tokens", [1, 13, 300])
@pytest.mark.parametrize("parts", [{}, {"norm": True, "silu": True}, {"residual": True}, {"bias": True}])
def test_a_back_end_multiplies_any_number_of_tokens(make, kind, tokens, parts, seed):
    """300 tokens by cuBLAS, which takes weights rounded to BF16."""
    ops, weight = make(), matrix(np.random.default_rng(seed), kind, 544, 128, 64)  # blocks of e4m3 may have scale 0
    product = Product(None, seed, tokens, weight, **parts)
    on = ops.xp.asarray
    given = {"norm": (on(product.norm), EPS)} if parts.get("norm") else {}
    given |= {name: on(getattr(product, name)) for name in ("bias", "residual") if parts.get(name)}
    got = ops.numpy(ops.linear(on(product.x), weight.map(on), silu=parts.get("silu", False), **given))
    y, _ = product.exact()
    bound = 0.01 if tokens > 256 else 0.006
    assert np.linalg.norm(np.array(got).astype(np.float64) - y) <= bound * np.linalg.norm(y)  # all scales may be 0


def test_what_does_not_fit_is_refused(seed):
    rng = np.random.default_rng(seed)
    weight, out, norm = matrix(rng, "int4", 48, 12288, 128), np.empty((8, 48), BF16), (np.empty(12288, BF16), EPS)
    for tokens, capability, silu in ((8, 90, False), (5, 80, False), (4, 89, False), (0, 90, False), (1, 90, True)):
        assert not quantized.fits(tokens, weight, True, silu, Card(132, capability))
        with pytest.raises(ValueError, match="do not fit"):
            x = np.empty((tokens, 12288), BF16)
            quantized.linear(x, weight, out, Card(132, capability), silu=silu, norm=norm)
    for tokens, capability in ((7, 90), (4, 80), (2, 89)):
        assert quantized.fits(tokens, weight, True, False, Card(132, capability))
    for capability in (80, 90):  # not normed, x is copied beside the codes, a chunk at a time
        assert quantized.fits(8, weight, False, False, Card(132, capability))


@on_the_card
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts) or "plain")
@pytest.mark.parametrize(("kind", "group"), [("int4", 128), ("int4", 64), ("int4", 32), ("int8", 128), ("e4m3", 128)])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 48, 128, 256])
@pytest.mark.parametrize(("size", "rows"), [(4096, 6144), (576, 49152), (1536, 576), (9728, 2560)])
def test_products_of_models_shapes(device, seed, tokens, size, rows, kind, group, parts):
    if size % group:
        pytest.skip("no whole groups")
    weight = matrix(np.random.default_rng(seed), kind, rows, size, group)
    product = Product(device, seed, tokens, weight, **parts)
    got = product.check(card=Card(132, 90)).astype(np.float64)
    y, _ = product.exact()
    bound = (3e-5 if parts.get("float32") and not parts.get("norm") else 2e-3) * np.linalg.norm(y)
    rounding = 0 if parts.get("float32") else 1.1 * np.linalg.norm(rounded(y) - y)  # more where one number is all of y
    print(f"{np.linalg.norm(got - y) / np.linalg.norm(y):.2g}")
    assert np.linalg.norm(got - y) <= max(bound, rounding)
