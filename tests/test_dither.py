"""Dither: where values repeat their errors average out, and everywhere else nothing changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minioscar import dither, oscar
from minioscar.oscar import SCHEMES, Scheme

DITHERED = [scheme for scheme in SCHEMES.values() if scheme.dithered]


def read_back(values: np.ndarray, scheme: Scheme) -> np.ndarray:
    return oscar.dequantize_values(*oscar.quantize_values(values, scheme), scheme)


@pytest.mark.parametrize("scheme", DITHERED, ids=lambda scheme: scheme.name)
def test_the_mean_of_eight_equal_tokens_is_within_a_sixteenth_of_a_step(seed, scheme):
    values = np.repeat(np.random.default_rng(seed).standard_normal((2, 1, 128)).astype(np.float32), 64, axis=1)
    _, step, _ = oscar.quantize_values(values, scheme)
    step = np.repeat(step[:, 0].astype(np.float32), 64, axis=1)
    error = {
        name: abs((read_back(values, kv) - values).reshape(2, 8, 8, 128).mean(axis=2)) / step[:, None]
        for name, kv in (("dithered", scheme), ("plain", replace(scheme, dithered=False)))
    }
    assert error["dithered"].max() < 1 / 16 + 0.002  # steps are rounded to float16: 15.5 * 2^-11 of one, at most
    assert error["plain"].max() > 0.3


@pytest.mark.parametrize("scheme", DITHERED, ids=lambda scheme: scheme.name)
def test_values_that_do_not_repeat_are_rounded_as_they_were(seed, scheme):
    values = np.random.default_rng(seed).standard_normal((2, 64, 128)).astype(np.float32)
    values[1, 1::2, 64:] = values[1, ::2, 64:]  # repeats, in one head and one group
    theirs = [oscar.quantize_values(values, kv)[:2] for kv in (scheme, replace(scheme, dithered=False))]
    groups = [[x.reshape(2, 64, 2, -1) for x in pair] for pair in theirs]
    for dithered, plain in zip(*groups, strict=True):
        same = (dithered == plain).all(axis=(1, 3))
        assert same.tolist() == [[True, True], [True, False]]


def test_a_pair_is_near_up_to_a_quarter_of_each_token_s_own_largest_value():
    values = np.ones((2, 8, 64), np.float32) * (np.arange(64) == 0)
    values[0, [1, 3], 0] = 0.75, np.nextafter(np.float32(0.75), np.float32(0))
    values[1, 1, 0] = 1.25
    near = np.ones((2, 8), bool)
    near[0, [1, 2, 3]] = False
    expected = np.where(near & near[:, [4, 5, 6, 7, 0, 1, 2, 3]], dither.OFFSETS, 0)
    assert dither.offsets(values, 64)[..., 0, 0].tolist() == expected.tolist()
    assert dither.offsets(np.zeros((1, 8, 64), np.float32), 64).all()  # harmless: their step is 0, and so are all codes


def test_one_equal_pair_is_no_repetition_and_two_four_tokens_apart_are_one(seed):
    values = np.random.default_rng(seed).standard_normal((1, 32, 64)).astype(np.float32)
    for pair in (2, 8, 10, 12, 22):
        values[0, pair + 1] = values[0, pair]
    repeats = dither.offsets(values, 64)[0, :, 0, 0] != 0
    assert np.flatnonzero(repeats).tolist() == [8, 9, 12, 13]


def test_offsets_are_the_eighths_of_a_step_in_the_order_of_reversed_bits():
    reversed_bits = [int(f"{t:03b}"[::-1], 2) for t in range(8)]
    assert dither.OFFSETS.tolist() == [bits / 8 - 7 / 16 for bits in reversed_bits]


@pytest.mark.parametrize("flush", [32, 64])
def test_codes_do_not_depend_on_what_is_packed_at_once(seed, flush):
    rng, scheme = np.random.default_rng(seed), SCHEMES["int2"]
    values = np.repeat(rng.standard_normal((2, 64, 64)).astype(np.float32), 3, axis=1)
    assert 0 < (dither.offsets(values, 64) != 0).mean() < 1
    codes, step, _ = oscar.quantize_values(values, scheme)
    for first in range(0, values.shape[1], flush):
        some = slice(first, first + flush)
        for mine, theirs in zip(oscar.quantize_values(values[:, some], scheme), (codes, step), strict=False):
            np.testing.assert_array_equal(mine, theirs[:, some])


def test_values_with_a_minimum_are_not_dithered():
    with pytest.raises(ValueError, match="values that are dithered must be symmetric"):
        Scheme("both", dithered=True)
