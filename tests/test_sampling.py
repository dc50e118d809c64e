"""Every filter of sampling against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.errors import UserError
from minioscar.sampling import Sampling, sample

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))


def drawn(sampling: Sampling, draws: int = 2000) -> np.ndarray:
    """Relative frequencies of the five tokens."""
    return np.bincount([sample(LOGITS, sampling, 0, step) for step in range(draws)], minlength=5) / draws


def test_temperature_0_takes_the_likeliest():
    assert sample(LOGITS, Sampling(), 0, 0) == 1


def test_temperature_1_draws_from_the_model():
    np.testing.assert_allclose(drawn(Sampling(temperature=1)), np.exp(LOGITS), atol=0.04)  # 3.6 sigma of 2,000 draws


def test_temperature_sharpens():
    p = np.exp(LOGITS / 0.5)
    np.testing.assert_allclose(drawn(Sampling(temperature=0.5)), p / p.sum(), atol=0.04)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1, top_k=1), {1}),
        (Sampling(temperature=1, top_k=3), {1, 3, 4}),
        (Sampling(temperature=1, top_k=50), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1, top_p=0.3), {1}),
        (Sampling(temperature=1, top_p=0.6), {1, 3}),
        (Sampling(temperature=1, top_p=0.7), {1, 3, 4}),
        (Sampling(temperature=1, min_p=0.6), {1, 3}),
        (Sampling(temperature=1, min_p=1.0), {1}),
        (Sampling(temperature=1, top_k=3, top_p=0.5), {1, 3}),
    ],
)
def test_filters_keep_exactly_their_tokens(sampling, kept):
    share = drawn(sampling)
    assert set(np.flatnonzero(share)) == kept
    p = np.exp(LOGITS) * [i in kept for i in range(5)]
    np.testing.assert_allclose(share, p / p.sum(), atol=0.045)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": -0.1}, {"seed": -1}],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
