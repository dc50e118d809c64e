"""Q4 and Q8 (minioscar/quantized): what they hold is what they were made of, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.formats.plain import BITS, E4M3, Plain
from minioscar.quantized import from_plain

F16 = np.dtype(np.float16)
# rows, columns, columns of a group
SHAPES = [(16, 64, 64), (13, 320, 64), (48, 256, 128), (100, 256, 256), (7, 72, 72), (34, 104, 32), (32, 1280, 512)]


def random_plain(
    rng: np.random.Generator, kind: str, rows: int, columns: int, group: int, dtype: np.dtype = F16
) -> Plain:
    """Codes over their whole range, scales of both signs and several magnitudes, some 0, whole zeros."""
    bits, groups = BITS[kind], -(-columns // group)
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scale = np.ldexp(rng.uniform(0.5, 1, (rows, groups)), rng.integers(-8, 1, (rows, groups)))
    scale = (scale * rng.choice([-1, 0, 1, 1, 1], (rows, groups))).astype(dtype).astype(np.float32)
    if kind == "e4m3":
        codes[codes & 127 == 127] -= 1
        scale = scale if groups == 1 else scale[np.arange(rows) // 128 * 128]
        return Plain(kind, codes, scale, None, group, dtype)
    zero = rng.integers(0, (1 << bits) + 1, (rows, groups)).astype(np.float32)
    return Plain(kind, codes, scale, zero, group, dtype)


@pytest.mark.parametrize("dtype", [F16, BF16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize("kind", BITS)
def test_what_is_packed_dequantizes_to_the_same_bits(kind, rows, columns, group, dtype, seed):
    plain = random_plain(np.random.default_rng(seed), kind, rows, columns, group, dtype)
    packed, exact = from_plain(plain), plain.dequantize(np)
    got = packed.dequantize()
    assert packed.shape == (rows, columns) and got.dtype == np.float32
    if dtype == np.float32 and kind != "e4m3" and group < columns:  # scales of 24 bits are rounded to 11
        assert np.all(abs(got - exact) <= 2.0**-11 * abs(exact))
    else:
        assert np.array_equal(got, exact)


def test_scales_of_a_row_may_be_far_apart(seed):
    rng = np.random.default_rng(seed)
    plain = random_plain(rng, "int4", 32, 640, 32)
    for dtype in (F16, BF16):
        scale = np.ldexp(rng.uniform(0.5, 1, (32, 20)), rng.integers(-13, 14, (32, 20))).astype(dtype)
        wide = Plain("int4", plain.codes, scale.astype(np.float32), plain.zero, 32, dtype)
        assert np.array_equal(from_plain(wide).dequantize(), wide.dequantize(np))


@pytest.mark.parametrize(("kind", "group", "bits"), [("int4", 128, 4.25), ("int4", 32, 5.0), ("int8", 128, 8.25)])
def test_bytes_are_those_of_the_codes_and_two_float16_a_group(kind, group, bits, seed):
    packed = from_plain(random_plain(np.random.default_rng(seed), kind, 4096, 1024, group))
    assert packed.nbytes == bits / 8 * 4096 * 1024 + 4 * 4096


@pytest.mark.parametrize("kind", BITS)
def test_the_word_of_a_lane_is_the_operand_of_its_products(kind, seed):
    """Read by the definition: lane 4r + c, half h, step s, register a = 2p + i, first and second number e."""
    rng = np.random.default_rng(seed)
    plain = random_plain(rng, kind, 32, 128, 128)
    codes = from_plain(plain).codes
    for tile, run, lane, h, s, p, i, e in rng.integers(0, [2, 2, 32, 2, 2, 2, 2, 2], (300, 8)).tolist():
        row, column = 16 * tile + 2 * (lane // 4) + i, 64 * run + 32 * h + 8 * (lane % 4) + 4 * s + 2 * p + e
        if kind == "int4":
            word = int(codes[tile, run, lane, 2 * h + s])
            found = word >> 4 * (2 * p + i) + 16 * e & 15
        else:
            half = int(codes[tile, run, h, lane, 2 * s + p]) >> 16 * e & 0xFFFF
            found = half >> 8 * i & 255
        if kind == "e4m3":
            bits = half & 0x87F0 if i == 0 else (half >> 4 & 0x0700 | half << 4 & 0xF8FF) & 0x87F0
            value = np.uint16(bits).view(BF16).astype(np.float64) * 2.0**120
            assert value == E4M3[plain.codes[row, column]]
        else:
            assert found == plain.codes[row, column]


def test_what_has_no_form_is_refused(seed):
    rng = np.random.default_rng(seed)
    for group in (16, 96):
        with pytest.raises(ValueError, match="power of two"):
            from_plain(random_plain(rng, "int4", 16, 192, group))
    plain = random_plain(rng, "e4m3", 32, 128, 64)
    plain.scale[3, 0] = 7
    with pytest.raises(ValueError, match="within 16 rows"):
        from_plain(plain)
    plain = random_plain(rng, "e4m3", 32, 128, 128)
    plain.codes[5, 5] = 0xFF
    with pytest.raises(ValueError, match="no numbers"):
        from_plain(plain)
