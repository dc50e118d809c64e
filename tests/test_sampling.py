"""Every filter of sampling and every penalty against its definition; what a draw depends on; which values are taken."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.errors import UserError
from minioscar.generation import Options
from minioscar.penalties import adjusted, history
from minioscar.sampling import RowSampling, Sampling, exponentials, next_token, probabilities, sample

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


# --- the draw


def test_a_draw_is_exact(seed):
    """Chi-square of 8,000 draws from 60 tokens, against the distribution itself: 6 sigma above its mean at most."""
    rng = np.random.default_rng(seed)
    logits = (2 * rng.standard_normal(60)).astype(np.float32)
    for sampling in (
        Sampling(1.0, seed=seed), Sampling(1.7, top_p=0.9, seed=seed), Sampling(0.8, top_k=20, min_p=0.01, seed=seed)
    ):
        p = probabilities(logits, sampling)
        p, draws = p / p.sum(), 8_000
        found = np.bincount([sample(logits, sampling, 5, step) for step in range(draws)], minlength=60)
        assert not found[p == 0].any()
        rare = p * draws < 5  # together in one class
        want = np.append(p[~rare], p[rare].sum()) * draws
        got = np.append(found[~rare], found[rare].sum())
        chi2, freedom = (((got - want) ** 2)[want > 0] / want[want > 0]).sum(), (want > 0).sum() - 1
        print(f"seed {seed}: chi2 {chi2:.1f} of {freedom} degrees of freedom")
        assert chi2 < freedom + 6 * np.sqrt(2 * freedom)


def test_the_random_numbers_are_numpys_philox_word_by_word():
    """Token i has word i % 4 of block i // 4, so a longer vocabulary gives the first tokens the same numbers."""
    e = exponentials(7, 3, 11, 1001)
    words = np.random.Philox(key=7, counter=[0, 0, 3, 11]).random_raw(1001)
    np.testing.assert_array_equal(e, -np.log1p(-((words >> np.uint64(11)).astype(float) * 2.0**-53)))
    np.testing.assert_array_equal(exponentials(7, 3, 11, 10), e[:10])
    assert not np.array_equal(exponentials(7, 3, 12, 10), e[:10])
    assert not np.array_equal(exponentials(8, 3, 11, 10), e[:10])


def test_a_rounding_of_the_logits_moves_few_draws(seed):
    """Another batch, or another back end, rounds a logit otherwise: of 2,000 draws a thousandth of a logit may move a
    few."""
    rng, moved = np.random.default_rng(seed), 0
    for step in range(2000):
        logits = (3 * rng.standard_normal(500)).astype(np.float32)
        rounded = logits + rng.uniform(-1e-3, 1e-3, 500).astype(np.float32)
        moved += sample(logits, Sampling(0.9, seed=3), 0, step) != sample(rounded, Sampling(0.9, seed=3), 0, step)
    assert moved <= 10


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e-5, 1e30, 1e300])
def test_extreme_temperatures_draw_what_they_say(temperature):
    logits = np.array([0, -1, 2, 2, -np.inf], np.float32)
    found = {sample(logits, Sampling(temperature), 0, step) for step in range(60)}
    assert found == ({2, 3} if temperature < 1 else {0, 1, 2, 3})


# --- penalties and end tokens


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer():
    logits = np.array([2, -2, 3, -3, 1, 0], np.float32)
    row = RowSampling(Sampling(repetition_penalty=2.0), prompt=(0, 1, 1))
    np.testing.assert_array_equal(adjusted(logits, row, 2, history(row, [2, 3], 6)), [1, -4, 1.5, -6, 1, 0])
    np.testing.assert_array_equal(logits, [2, -2, 3, -3, 1, 0])  # a copy


def test_presence_and_frequency_count_the_answer_alone():
    row = RowSampling(Sampling(presence_penalty=1.0, frequency_penalty=0.25), prompt=(0, 1))
    logits = adjusted(np.zeros(5, np.float32), row, 4, history(row, [1, 3, 3, 3], 5))
    np.testing.assert_array_equal(logits, [0, -1.25, 0, -1.75, 0])


def test_greedy_obeys_penalties_too():
    logits = np.array([1.0, 0.9, 0.5], np.float32)
    row = RowSampling(Sampling(frequency_penalty=0.3))
    drawn: list[int] = []
    for step in range(4):
        drawn.append(next_token(logits, row, step, drawn))
    assert drawn == [0, 1, 0, 1]


def test_end_tokens_are_out_until_there_are_enough_tokens():
    logits, row = np.array([1.0, 9.0, 8.0], np.float32), RowSampling(ends=(1, 2), min_tokens=2)
    assert [next_token(logits, row, step) for step in range(4)] == [0, 0, 1, 1]
    with np.errstate(invalid="raise"):
        assert next_token(logits, RowSampling(Sampling(1.0), ends=(1, 2), min_tokens=1), 0) == 0


# --- values


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {
        "temperature": float("nan")
    }, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": -0.1}, {"seed": -1},
     {"seed": 2**64},
     {"top_k": 2.5}, {"seed": 1.9}, {"seed": 1.0}, {"top_k": True}, {"temperature": True}, {"temperature": "1"},
     {"top_p": float("nan")},
     {"min_p": np.float32("nan")}, {"temperature": float("inf")}, {"temperature": 10**400}, {"temperature": 10**5000},
     {"top_k": "40"},
     {"temperature": [1.0]}, {"temperature": 1j}, {"top_k": np.float64(3)}, {"temperature": np.bool_(True)},
     {"seed": b"1"},
     {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"repetition_penalty": float("inf")},
     {"presence_penalty": 2.1},
     {"frequency_penalty": float("nan")}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_none_is_the_default_and_numpys_numbers_are_numbers():
    assert Sampling(**dict.fromkeys(vars(Sampling()))) == Sampling()
    given = Sampling(np.float32(0.5), np.int64(3), np.float64(0.9), 0, np.uint64(2**64 - 1), 1, np.int8(1), -2)
    assert given == Sampling(0.5, 3, 0.9, 0.0, 2**64 - 1, 1.0, 1.0, -2.0)
    assert all(type(value) in (int, float) for value in vars(given).values())
    assert Options(**dict.fromkeys(vars(Options()))) == Options()


@pytest.mark.parametrize(
    "wrong",
    [{"logprobs": 2.5}, {"logprobs": True}, {"logprobs": "3"}, {"max_tokens": 3.0}, {
        "max_tokens": float("nan")
    }, {"max_tokens": True},
     {"n": 1.5}, {"n": "2"}, {"stop": "END"}, {"stop": b"END"}, {"stop": {"END": 1}}, {"stop": 5}, {"stop": [None]},
     {"stop": [b"x"]},
     {"stop_ids": 3}, {"stop_ids": "3"}, {"stop_ids": [2.0]}, {"stop_ids": [True]}, {"stop_ids": [-1]},
     {"stop_ids": ["</s>"]},
     {"min_tokens": -1}, {"min_tokens": 1.5}, {"min_tokens": 257}, {"ignore_eos": 1}, {"ignore_eos": "yes"},
     {"graph": 0},
     {"sampling": {"temperature": 1}}, {"sampling": 0.7}, {"max_tokens": -(10**5000)}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_options_of_a_wrong_type_are_refused_by_name(wrong):
    with pytest.raises(UserError, match="stop id|" + next(iter(wrong))) as error:
        Options(**wrong)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_options_take_any_list_of_stops():
    assert Options(stop={"a"}, stop_ids=np.array([3, 4])) == Options(stop=("a",), stop_ids=(3, 4))
    assert Options(stop=(text for text in "ab"), stop_ids=frozenset({1})).stop == ("a", "b")
