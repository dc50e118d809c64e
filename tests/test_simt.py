"""The simulated CUDA operations mean what CUDA documents: the same tests hold on a GPU."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from .kernel_device import on_each_device, on_simt

CASES = Path(__file__).parent / "simt" / "cases"
TYPES = {"half": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PAIRS = {"half": "arithmetic<__half2>", "bfloat16": "arithmetic<__nv_bfloat162>"}
BLOCK = 256


def same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, but that any NaN equals any other."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        a, b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.all((a == b) & (np.signbit(a) == np.signbit(b)) | np.isnan(a) & np.isnan(b)))


@on_each_device
@pytest.mark.parametrize("name", TYPES)
def test_every_16_bit_pattern_widens_exactly(device, name):
    bits = np.arange(65536, dtype=np.uint16)
    out = device.empty(65536, np.float32)
    device.compile(CASES / "numbers.cu", f"from_{name}")(65536 // BLOCK, BLOCK, [device.array(bits), out])
    assert same_numbers(device.numpy(out), bits.view(TYPES[name]).astype(np.float32))


@on_each_device
@pytest.mark.parametrize("name", TYPES)
def test_floats_round_to_nearest_even(device, name, seed):
    rng = np.random.default_rng(seed)
    values = np.arange(65536, dtype=np.uint16).view(TYPES[name]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        middles = np.float32((values[:-1].astype(np.float64) + values[1:]) / 2)  # ties, and the numbers beside them
    x = np.concatenate(
        [values, middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))]
    )
    x = np.concatenate([x, rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)])
    x = np.resize(x, -(-x.size // BLOCK) * BLOCK)
    out = device.empty(x.size, np.uint16)
    device.compile(CASES / "numbers.cu", f"to_{name}")(x.size // BLOCK, BLOCK, [device.array(x), out])
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_numbers(device.numpy(out).view(TYPES[name]), x.astype(TYPES[name]))


def rounded(exact: Fraction, dtype: np.dtype) -> float:
    """The number of dtype nearest to exact, ties to the even one; exact lies well within its range."""
    near = np.array([float(exact)]).astype(dtype)
    bits = near.view(np.uint16)[0]
    around = np.array([b for b in (int(bits) - 1, int(bits), int(bits) + 1, 0x8000, 0) if 0 <= b < 65536], np.uint16)
    choices = [(float(v), int(b) & 1) for b, v in zip(around, around.view(dtype), strict=True) if np.isfinite(v)]
    return min((abs(Fraction(v) - exact), odd, v) for v, odd in choices)[2]


@on_each_device
@pytest.mark.parametrize("name", TYPES)
def test_arithmetic_of_pairs_is_rounded_once(device, name, seed):
    rng = np.random.default_rng(seed)
    n, dtype = 2048, TYPES[name]
    low = -9 if name == "half" else -60  # so that sums and products reach the subnormals of half
    a, b, c = (np.ldexp(rng.uniform(-2, 2, n), rng.integers(low, 5, n)).astype(dtype) for _ in range(3))
    c[: n // 2] = -(a[: n // 2].astype(np.float64) * b[: n // 2]).astype(
        dtype
    )  # cancellation: what is left is the product's rounding
    # Decides alone about products in the middle of two numbers
    c[-n // 4 :] = np.ldexp(c[-n // 4 :].astype(np.float64), -50).astype(dtype)
    out = device.empty((4, n), dtype)
    device.compile(CASES / "numbers.cu", PAIRS[name])(n // 2 // 64, 64, [*map(device.array, (a, b, c)), out])
    exact = [[Fraction(float(v)) for v in x] for x in (a, b, c)]
    expected = [[x + y, x - y, x * y, x * y + z] for x, y, z in zip(*exact, strict=True)]
    expected = np.array([[rounded(v, dtype) for v in row] for row in expected]).T
    assert np.array_equal(device.numpy(out).astype(np.float64), expected)


@on_each_device
def test_integer_intrinsics(device, seed):
    a, b = np.random.default_rng(seed).integers(0, 2**32, (2, 256), dtype=np.uint32)
    a[0] = 0
    out = device.empty((8, 256), np.uint32)
    device.compile(CASES / "numbers.cu", "integers")(2, 128, [device.array(a), device.array(b), out])
    wide = a.astype(np.uint64) | b.astype(np.uint64) << 32
    byte = [(wide >> np.uint64(8 * i)) & np.uint64(255) for i in (0, 5, 2, 7)]
    text = [f"{int(v):032b}" for v in a]
    products = [((x << 32) + y) * ((y << 32) + x) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    expected = [
        sum(v << np.uint64(8 * i) for i, v in enumerate(byte)),
        wide >> np.uint64(7) & np.uint64(0xFFFFFFFF),
        a.astype(np.uint64) * b >> np.uint64(32),
        [t.count("1") for t in text],
        [t[::-1].find("1") + 1 for t in text],
        [int(t[::-1], 2) for t in text],
        *zip(*((high & 0xFFFFFFFF, high >> 32) for high in products), strict=True),
    ]
    assert np.array_equal(device.numpy(out), np.array(expected, np.uint32))


@on_each_device
def test_shuffles_and_votes_follow_the_manual(device, seed):
    n = 96
    x = np.random.default_rng(seed).integers(0, 1000, n).astype(np.int32)
    out = device.empty((9, n), np.int32)
    device.compile(CASES / "warps.cu", "exchange")(1, n, [device.array(x), out])
    t = np.arange(n)
    lane, warp = t % 32, t // 32 * 32
    odd = np.array([sum(int(x[w + i] & 1) << i for i in range(32)) for w in range(0, n, 32)], np.uint32).view(np.int32)
    expected = [
        x[warp + 5],
        x[t // 8 * 8 + (t + 3) % 8],
        x[t ^ 9],
        x[np.where(lane >= 3, t - 3, t)],
        x[np.where(t % 16 + 3 < 16, t + 3, t)],
        odd[t // 32],
        2 * np.array([np.any(x[w : w + 32] == x[0]) for w in range(0, n, 32)])[t // 32] + 1,
        np.full(n, (x & 1).sum()),
        x[np.where(lane < 16, t ^ 1, t ^ 2)],
    ]
    assert np.array_equal(device.numpy(out), np.array(expected))


@on_each_device
@pytest.mark.parametrize("order", range(3))
def test_blocks_and_threads_of_two_dimensions_share_static_and_dynamic_memory(device, seed, order):
    x = np.random.default_rng(seed).normal(size=(6, 96)).astype(np.float32)
    out, counter = device.empty(x.shape, np.float32), device.array(np.zeros(1, np.int32))
    device.compile(CASES / "warps.cu", "reverse<96>")(
        (3, 2), (24, 4), [device.array(x), out, counter], shared=96 * 4, seed=order
    )
    assert np.array_equal(device.numpy(out), x[:, ::-1])
    assert device.numpy(counter)[0] == 6 * sum(range(96))


@on_simt
def test_structs_tables_and_classes_in_shared_memory(device):
    x, y = device.array(np.arange(1024, dtype=np.float32)), device.array(np.zeros(1025, np.float32))
    a = np.zeros((), np.dtype([("x", "u8"), ("y", "u8"), ("n", "i4"), ("k", "f4", 5)], align=True))
    a["x"], a["y"], a["n"], a["k"] = x.ctypes.data, y.ctypes.data, 1024, range(5)
    device.compile(CASES / "mixed.cu", "mixed")(
        1, 1024, [a[()], np.bool_(True), np.uint8(7), np.int64(100)], shared=4096
    )
    t = np.arange(1024)
    assert np.array_equal(
        device.numpy(y)[:1024], 1023 - t + t % 4 + np.where(t % 2, 22, 6) + (t ^ 1) % 4 + 1 + t % 5 + 107
    )
    assert device.numpy(y).view(np.int32)[1024] == 5


def fragments(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[32, registers] of 32 bits from a matrix of 16-bit numbers: rows and columns [32, 2 * registers] say which
    element stands where."""
    return np.ascontiguousarray(matrix.view(np.uint16)[rows, columns]).view(np.uint32)


@on_each_device
@pytest.mark.parametrize("name", ["f16", "fresh_f16", "bf16"])
def test_mma_fragments_multiply_like_numpy(device, name, seed):
    rng = np.random.default_rng(seed)
    dtype = TYPES["bfloat16" if name == "bf16" else "half"]
    a, b = rng.normal(size=(16, 16)).astype(dtype), rng.normal(size=(16, 8)).astype(dtype)
    # Subnormals: codes that were only masked out
    a[::3] = rng.integers(0, 4, a[::3].shape).astype(np.uint16).view(dtype)
    c = rng.normal(size=(16, 8)).astype(np.float32)
    lane = np.arange(32)[:, None]
    group, inside = (
        lane >> 2,
        lane % 4,
    )  # the PTX manual's groupID and threadID_in_group, "Matrix fragments for mma.m16n8k16"
    i = np.arange(8)
    fa = fragments(a, group + 8 * ((i & 2) > 0), inside * 2 + (i & 1) + 8 * (i >= 4))
    i = np.arange(4)
    fb = fragments(b, inside * 2 + (i & 1) + 8 * (i >= 2), group + 0 * i)
    rows, columns = group + 8 * (i >= 2), inside * 2 + (i & 1)
    out = device.empty((32, 4), np.float32)
    kernel = device.compile(CASES / "matrices.cu", f"multiply_{name}")
    kernel(1, 32, [*map(device.array, (fa, fb, np.ascontiguousarray(c[rows, columns]))), out])
    if name == "fresh_f16":
        c[:] = 0
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    # A tensor core aligns the 17 addends to the largest exponent and truncates each to at least 24 bits of it (Fasi,
    # Higham, Mikaitis,
    # Pranesh, PeerJ Computer Science 7:e330, 2021), where a subnormal fp16 counts with the exponent of 2^-14 (seen on
    # an H200).
    exponent = np.where(a != 0, np.maximum(np.abs(a.astype(np.float64)), 0 if name == "bf16" else 2.0**-14), 0)
    largest = np.maximum((exponent[:, :, None] * np.abs(b.astype(np.float64))).max(axis=1), np.abs(c))
    error = np.abs(device.numpy(out) - exact[rows, columns]) / largest[rows, columns]
    assert error.max() < 17 * 2.0**-23


def sums(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the sums of a wgmma of n columns, [128, n / 2]: the PTX manual's fragment of accumulator
    D."""
    t, i = np.arange(128)[:, None], np.arange(n // 2)
    return t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2), i // 4 * 8 + t % 4 * 2 + i % 2


def operand_a(a: np.ndarray) -> np.ndarray:
    """a [64, 16] as each of 128 threads holds it: the PTX manual's fragment of operand A."""
    t, i = np.arange(128)[:, None], np.arange(8)
    return fragments(a, t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2), t % 4 * 2 + i % 2 + 8 * (i // 4))


@on_each_device
@pytest.mark.parametrize("fresh", [False, True])
def test_wgmma_of_registers_and_columns_of_shared_memory_multiplies_like_numpy(device, fresh, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(64, 16)).astype(TYPES["bfloat16"]), rng.normal(size=(128, 64)).astype(TYPES["bfloat16"])
    c, out = rng.normal(size=(64, 128)).astype(np.float32), device.empty((128, 64), np.float32)
    given = None if fresh else device.array(np.ascontiguousarray(c[sums(128)]))
    kernel = device.compile(CASES / "sm90/warpgroups.cu", "registers_rows", arch=90)
    kernel(1, 128, [device.array(operand_a(a)), device.array(b), given, out, np.int32(0)], shared=16384)
    exact = a.astype(np.float64) @ b[:, 48:].astype(np.float64).T + (0 if fresh else c)
    assert abs(device.numpy(out) - exact[sums(128)]).max() < 17 * 2.0**-23 * abs(exact).max()


@on_each_device
@pytest.mark.parametrize("n", [64, 80, 128])
def test_wgmma_of_registers_and_rows_of_shared_memory_multiplies_like_numpy(device, n, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(64, 16)).astype(TYPES["bfloat16"]), rng.normal(size=(16, n)).astype(TYPES["bfloat16"])
    c, out = rng.normal(size=(64, n)).astype(np.float32), device.empty((128, n // 2), np.float32)
    given = device.array(np.ascontiguousarray(c[sums(n)]))
    kernel = device.compile(CASES / "sm90/warpgroups.cu", f"registers_shared_{n}", arch=90)
    kernel(1, 128, [device.array(operand_a(a)), device.array(b), given, out], shared=4096)
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    assert abs(device.numpy(out) - exact[sums(n)]).max() < 17 * 2.0**-23 * abs(exact).max()


@on_each_device
@pytest.mark.parametrize("n", [16, 32, 48, 64, 96, 128])
def test_wgmma_of_two_operands_in_shared_memory_multiplies_like_numpy(device, n, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(rows, 64)).astype(TYPES["bfloat16"]) for rows in (64, n))
    c, out = rng.normal(size=(64, n)).astype(np.float32), device.empty((128, n // 2), np.float32)
    given = device.array(np.ascontiguousarray(c[sums(n)]))
    kernel = device.compile(CASES / "sm90/warpgroups.cu", f"shared_{n}", arch=90)
    kernel(1, 128, [device.array(a), device.array(b), given, out], shared=(64 + n) * 128)
    exact = a[:, 32:48].astype(np.float64) @ b[:, 32:48].astype(np.float64).T + c
    assert abs(device.numpy(out) - exact[sums(n)]).max() < 17 * 2.0**-23 * abs(exact).max()


@on_each_device
def test_movmatrix_transposes(device, seed):
    x = np.random.default_rng(seed).integers(0, 65536, (8, 8)).astype(np.uint16)
    lane, i = np.arange(32)[:, None], np.arange(2)
    rows, columns = lane // 4 + 0 * i, lane % 4 * 2 + i  # thread l holds elements 2(l % 4) and the next of row l / 4
    out = device.empty((32, 1), np.uint32)
    device.compile(CASES / "matrices.cu", "transpose")(1, 32, [device.array(fragments(x, rows, columns)), out])
    assert np.array_equal(device.numpy(out), fragments(np.ascontiguousarray(x.T), rows, columns))


@on_each_device
def test_ldmatrix_gives_each_lane_its_elements(device, seed):
    x = np.random.default_rng(seed).integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    out = device.empty((2, 32, 4), np.uint32)
    device.compile(CASES / "ldmatrix.cu", "load")(1, 32, [device.array(x), out])
    lane, i = np.arange(32)[:, None], np.arange(2)
    for got, matrices in zip(device.numpy(out), (x, x.transpose(0, 2, 1)), strict=True):
        for number, matrix in enumerate(matrices):
            assert np.array_equal(
                got[:, number], fragments(np.ascontiguousarray(matrix), lane // 4 + 0 * i, lane % 4 * 2 + i)[:, 0]
            )


@on_each_device
def test_wrapped_arithmetic(device, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-30, 30, (2, 512)).astype(np.float32)
    x[:6] = [-126, -127, -149, 0, 1e-40, -np.inf]
    powers, pairs = device.empty((2, 512), np.float32), device.empty((3, 512, 2), np.uint16)
    device.compile(CASES / "matrices.cu", "wrapped")(4, 128, [device.array(x), device.array(y), powers, pairs])
    exact = np.exp2(x.astype(np.float64))
    exact[exact < np.finfo(np.float32).tiny] = 0  # .ftz
    powers = device.numpy(powers)
    assert np.all(np.abs(powers[0] - exact) <= 2.0**-22 * exact)  # ex2.approx: PTX manual
    assert np.all(np.abs(powers[1] - 1 / y.astype(np.float64)) <= np.spacing(np.abs(1 / y)))  # rcp.approx: 1 ulp
    half = np.stack([x, y], 1).astype(np.float16)
    pairs = device.numpy(pairs)
    assert same_numbers(pairs[0].view(np.float16), half)
    assert same_numbers(pairs[1].view(ml_dtypes.bfloat16), np.stack([x, y], 1).astype(ml_dtypes.bfloat16))
    assert same_numbers(pairs[2].view(np.float16), half * half[:, 1:])
