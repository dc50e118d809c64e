"""oscar.py against definitions written out another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minioscar import oscar
from minioscar.error_feedback import feedback_matrix
from minioscar.evaluation import baselines as codebook
from minioscar.oscar import SCHEMES

from .tiny import PLAIN_64, WINDOWS, key_feedback


@pytest.mark.parametrize("n", [1, 2, 4, 12, 16, 20, 32, 64, 80, 96, 128, 160, 192, 256])
def test_hadamard_is_symmetric_orthogonal_and_flat(n):
    h = oscar.hadamard(n)
    np.testing.assert_allclose(h @ h, np.eye(n), atol=2e-6)
    assert (h == h.T).all()
    np.testing.assert_allclose(abs(h), 1 / np.sqrt(n), rtol=1e-6)


@pytest.mark.parametrize("n", [0, 3, 6, 7, 10, 28, 72, 100, 112])
def test_orders_without_a_hadamard_matrix_are_refused(n):
    with pytest.raises(ValueError, match=f"order {n}"):
        oscar.hadamard(n)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_rotation_keeps_inner_products_and_flattens_an_outlier_channel(dim, seed):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 50, dim)).astype(np.float32)
    k[:, 3] += 100
    np.testing.assert_allclose(oscar.rotate(q) @ oscar.rotate(k).T, q @ k.T, atol=2e-2)
    assert abs(oscar.rotate(k)).max() < 100 / np.sqrt(dim) * 2 + 5


def test_norm_of_a_token_covers_all_heads_and_is_1_for_a_zero_token(seed):
    keys = np.random.default_rng(seed).standard_normal((5, 3, 64)).astype(np.float32)
    keys[2] = 0
    expected = [np.linalg.norm(token) if i != 2 else 1 for i, token in enumerate(keys)]
    np.testing.assert_allclose(oscar.token_norms(keys), expected, rtol=1e-6)


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.85])
@pytest.mark.parametrize("bits", [2, 4])
def test_asymmetric_codes_follow_the_formula_group_by_group(bits, shrink, seed):
    x = np.random.default_rng(seed).standard_normal((3, 64, 16)).astype(np.float32)
    codes, step, minimum = oscar.quantize(x, -2, 32, bits, shrink)
    assert codes.dtype == np.uint8 and step.dtype == minimum.dtype == np.float16 and step.shape == (3, 2, 16)
    top = 2**bits - 1
    for h, g, c in np.ndindex(3, 2, 16):
        group = x[h, 32 * g : 32 * g + 32, c].astype(np.float64)
        mid, half = (group.max() + group.min()) / 2, (group.max() - group.min()) / 2 * shrink
        assert step[h, g, c] == pytest.approx(2 * half / top, rel=2**-11 + 1e-6)
        assert minimum[h, g, c] == pytest.approx(mid - half, rel=2**-11 + 1e-6, abs=1e-6)
        exact = (group - float(minimum[h, g, c])) / float(step[h, g, c])
        tie = abs(exact - np.floor(exact) - 0.5) < 1e-5
        want = np.clip(np.rint(exact), 0, top)
        assert (tie | (codes[h, 32 * g : 32 * g + 32, c] == want)).all()
    back = oscar.dequantize(codes, step, minimum, -2, 32)
    if shrink == 1.0:  # every number lies inside the range, so it is at most half a step (and fp16 rounding) away
        bound = np.repeat(step.astype(np.float32), 32, axis=1) * 0.5 + abs(x).max() * 2.0**-10
        assert (abs(back - x) <= bound).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_symmetric_codes_follow_the_formula(bits, seed):
    x = np.random.default_rng(seed).standard_normal((4, 7, 64)).astype(np.float32)
    codes, step = oscar.quantize_symmetric(x, -1, 32, bits, 0.9)
    c = (2**bits - 1) / 2
    largest = abs(x).reshape(4, 7, 2, 32).max(-1)
    np.testing.assert_allclose(step.astype(np.float64), 0.9 * largest / c, rtol=2**-11 + 1e-6)
    wide = np.repeat(step.astype(np.float32), 32, axis=-1)
    np.testing.assert_array_equal(codes, np.clip(np.rint(x / wide + np.float32(c)), 0, 2**bits - 1))
    np.testing.assert_allclose(oscar.dequantize_symmetric(codes, step, -1, 32, bits), (codes - c) * wide, rtol=1e-6)


def test_codes_are_chosen_with_the_rounded_step_and_minimum():
    """1/3 has no float16: with the exact step the last number would be 3.0 steps away, with the rounded one it still is
    code 3."""
    x = np.linspace(0, 1.0001, 32, dtype=np.float32)[None, :, None]
    codes, step, minimum = oscar.quantize(x, -2, 32, 2)
    assert step[0, 0, 0] == np.float16(1.0001 / 3) and minimum[0, 0, 0] == 0
    np.testing.assert_array_equal(codes[0, :, 0], np.clip(np.rint(x[0, :, 0] / np.float32(step[0, 0, 0])), 0, 3))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.25])
def test_a_constant_group_gets_codes_0_and_comes_back(value):
    x = np.full((1, 32, 8), value, np.float32)
    codes, step, minimum = oscar.quantize(x, -2, 32, 2)
    assert not codes.any() and not step.any()
    np.testing.assert_array_equal(oscar.dequantize(codes, step, minimum, -2, 32), x)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_unpack_undoes_pack(bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 5, 64)).astype(np.uint8)
    packed = oscar.pack(codes, bits)
    assert packed.shape == (3, 5, 64 * bits // 8)
    np.testing.assert_array_equal(oscar.unpack(packed, bits), codes)
    by_hand = sum(int(codes[0, 0, i]) << (bits * i) for i in range(64))
    assert packed[0, 0].tobytes() == by_hand.to_bytes(8 * bits, "little")


@pytest.mark.parametrize(
    ("name", "dim", "bits"),
    [("bf16", 128, 16), ("kivi", 128, 3), ("quarot", 64, 3), ("oscar", 64, 3), ("int2", 128, 2.625), ("int4", 64, 5)]
    + [
        ("int2-compact", 128, 2.375),
        ("int2-compact", 96, 2.5),
        ("int2-long", 64, 2.25),
    ]
    + [("turboquant", 64, 2.25), ("turboquant", 128, 2.125), ("ott", 64, 3 + 3 * 16.0625 / 128)]
    + [
        ("kvarn-2", 128, 2.375),
        ("kvarn-k4v2", 128, 3.375),
        ("oscar-cov", 128, 2.25),
        ("oscar-cov", 64, 2.5),
        ("q4_0", 64, 4.5),
    ],
)
def test_bits_per_element_are_those_of_the_paper_and_the_design(name, dim, bits):
    assert SCHEMES[name].bits_per_element(dim) == bits


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.quantized])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_scheme_comes_back_near_what_went_in(name, dim, seed):
    scheme = SCHEMES[name]
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 3, 128, dim)).astype(np.float32)
    norms = oscar.token_norms(keys.swapaxes(0, 1))
    packed = scheme.pack(keys, values, norms, feedback=key_feedback(scheme, 3, dim))
    assert {name: (x.shape[1:], x.dtype) for name, x in packed.items()} == scheme.packed_layout(128, dim)
    got_keys, got_values = scheme.unpack(packed, norms)
    # A normal in 4 levels over +-2 sigma of 32 samples: a third of it is error.
    for got, want, bits in ((got_keys, keys, scheme.key_bits), (got_values, values, scheme.value_bits)):
        bound = 0.12 if bits == 4 else 0.55
        assert got.shape == want.shape
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < bound


def test_scaling_shields_a_group_from_a_token_of_another_norm(seed):
    """Token Norm Imbalance: one token of 50 times the norm ruins the 31 others of its group, unless norms are divided
    out."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((2, 128, 64)).astype(np.float32)
    keys[:, 5] *= 50
    norms = oscar.token_norms(keys.swapaxes(0, 1))
    others = np.delete(np.arange(128), 5)

    def error(name: str) -> float:
        scheme = SCHEMES[name]
        back = oscar.dequantize_keys(*oscar.quantize_keys(keys, norms, scheme), norms, scheme)
        return float(np.linalg.norm((back - keys)[:, others]) / np.linalg.norm(keys[:, others]))

    assert error("scaling") < 0.5 < error("kivi")


def shaped_error(energy: np.ndarray, seed: int, scheme) -> tuple[float, float]:
    """Mean square error that queries of this energy per channel make of shaped keys, and of keys rounded one by one."""
    rng = np.random.default_rng(seed)
    keys = oscar.rotate(rng.standard_normal((1, 256, 64)).astype(np.float32))
    norms = oscar.token_norms(keys.swapaxes(0, 1))
    errors = []
    for feedback in (feedback_matrix(energy)[None], np.zeros((1, 64, 64), np.float32)):
        codes = oscar.quantize_keys(keys, norms, scheme, feedback=feedback)
        error = oscar.rotate(oscar.dequantize_keys(*codes, norms, scheme) - keys)[
            0
        ]  # in the channels that the queries have
        errors.append(float((error * error * energy).sum(axis=1).mean()))
    return errors[0], errors[1]


def test_shaped_rounding_avoids_the_channels_that_queries_look_at(seed):
    """Half of the RoPE pairs weigh 3 or 30 times as much: 0.88 and 0.60 of the error, stable to 0.02 over seeds."""
    for ratio, bound in ((3.0, 0.92), (30.0, 0.65)):
        shaped, plain = shaped_error(np.repeat([ratio, 1.0, ratio, 1.0], 16), seed, WINDOWS["shaped"])
        assert shaped < bound * plain


def test_shaped_rounding_with_equal_weights_or_no_feedback_is_plain_rounding(seed):
    rng, scheme = np.random.default_rng(seed), replace(PLAIN_64, shaped=True)
    assert abs(feedback_matrix(np.ones(64))).max() < 1e-12
    keys = rng.standard_normal((2, 128, 64)).astype(np.float32)
    norms = oscar.token_norms(keys.swapaxes(0, 1))
    plain = oscar.quantize_keys(keys, norms, PLAIN_64)
    for a, b in zip(
        oscar.quantize_keys(keys, norms, scheme, feedback=np.zeros((2, 64, 64), np.float32)), plain, strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="feedback"):
        oscar.quantize_keys(keys, norms, scheme)


def test_feedback_matrix_makes_rounding_the_nearest_plane_of_its_metric(seed):
    """With (I + feedback) = unit upper factor of M^-1, e.M.e is a sum of d independent rounding errors, each with its
    own weight."""
    energy = np.random.default_rng(seed).uniform(0.1, 10, 64)
    h, floor = oscar.hadamard(64).astype(np.float64), 0.03 * energy.mean()
    m = h @ np.diag(energy + floor) @ h
    factor = np.eye(64) + feedback_matrix(energy)
    diagonal = np.linalg.inv(factor.T) @ np.linalg.inv(m) @ np.linalg.inv(factor)
    np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-5 * np.diag(diagonal).max())


def test_codebook_levels_are_the_centroids_of_their_cells_and_its_rotation_is_orthogonal(seed):
    """What makes a quantizer of a normal variable the best (Lloyd 1982, Max 1960): by 200,000 samples."""
    x = np.random.default_rng(seed).standard_normal(200_000)
    nearest = abs(x[:, None] - codebook.LEVELS).argmin(axis=1)
    for index, level in enumerate(codebook.LEVELS):
        assert x[nearest == index].mean() == pytest.approx(level, abs=0.012)  # 4 standard errors of the outer cells
    turn = codebook.rotation(64)
    np.testing.assert_allclose(turn @ turn.T, np.eye(64), atol=1e-5)


def test_codebook_error_does_not_depend_on_what_the_vector_looks_like(seed):
    """A single spike costs what noise costs: 0.1175 of the energy, the distortion of four levels (Max 1960)."""
    spike, noise = (
        np.zeros((1, 64, 64), np.float32),
        np.random.default_rng(seed).standard_normal((1, 64, 64)).astype(np.float32),
    )
    spike[0, np.arange(64), np.arange(64)] = 7
    for x in (spike, noise):
        error = codebook.dequantize(*codebook.quantize(x, 64)) - x
        assert (error**2).sum() / (x**2).sum() == pytest.approx(0.1175, abs=0.02)
    assert (codebook.dequantize(*codebook.quantize(0 * x, 64)) == 0).all()
