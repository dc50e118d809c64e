"""sample.cu against sampling.py, token by token; simulated and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minioscar.errors import Failure
from minioscar.ops import raw_dense
from minioscar.sampling import Sampling, probabilities, sample, uniform

from .kernel_device import on_each_device, on_the_card

SAMPLINGS = [
    Sampling(),
    Sampling(1.0, seed=2**64 - 1),
    Sampling(0.3, seed=7),
    Sampling(1.0, top_k=1),
    Sampling(1.5, top_k=40, seed=3),
    Sampling(1.0, top_p=0.9, seed=4),
    Sampling(2.0, top_p=0.05),
    Sampling(1.0, min_p=0.1, seed=6),
    Sampling(0.8, top_k=20, top_p=0.95, min_p=0.02, seed=5),
    Sampling(1.0, top_k=30, top_p=1 - 2**-53, seed=8),  # of which top-p takes nothing away
    Sampling(1e-38),
]


def drawn(device, logits: np.ndarray, sampling: Sampling, sequences: np.ndarray, steps: np.ndarray, order: int = 0) -> np.ndarray:
    """Twice, since a launch must leave the workspace as it was."""
    there, at = device.array(logits), [device.array(x) for x in (sequences, steps)]
    workspace = device.array(np.zeros((len(logits), raw_dense.sample_words(logits.shape[1])), np.uint64))
    found = []
    for again in range(2):
        tokens = device.empty(len(logits), np.int32)
        for launch in raw_dense.sample(there, sampling, *at, tokens, workspace):
            device.run(launch, seed=order + again)
        found.append(np.array(device.numpy(tokens)))
    assert np.array_equal(*found)
    return found[0]


def check(device, seed: int, sampling: Sampling, vocab: int, batch: int, ties: bool = False) -> None:
    rng = np.random.default_rng(seed)
    logits = np.empty((batch, vocab), np.float32)
    sequences, steps = rng.integers(0, 1000, (2, batch)).astype(np.int32)
    for row, n, step in zip(logits, sequences.tolist(), steps.tolist(), strict=True):
        drawn_again = True
        while drawn_again:
            row[:] = 3 * rng.standard_normal(vocab)
            row[:] = np.round(row) if ties else row
            drawn_again = undecided(row, sampling, n, step)
    got = drawn(device, logits, sampling, sequences, steps)
    expected = [sample(row, sampling, int(n), int(step)) for row, n, step in zip(logits, sequences, steps, strict=True)]
    assert got.tolist() == expected


def undecided(row: np.ndarray, sampling: Sampling, sequence: int, step: int) -> bool:
    """Whether the random number is so near the end of a token's share, or top-p so near one, that float32 may see it on the other side.

    A logit 2^3 or 2^4 below the largest, in units of log2, is rounded by up to 2^-20, and its share by so much of it.
    """
    if sampling.temperature == 0:
        return False

    def near(p: np.ndarray, x: float) -> bool:
        ends = np.cumsum(p[p > 0])
        return bool(abs(ends / ends[-1] - x)[:-1].min(initial=np.inf) < 2 * 2.0**-20)

    whole = -np.sort(-probabilities(row, replace(sampling, top_p=1.0, min_p=0.0)))
    return sampling.top_p < 1 and near(whole, sampling.top_p) or near(probabilities(row, sampling), uniform(sampling, sequence, step))


@on_each_device
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_device_draws_the_tokens_that_the_host_draws(device, seed, sampling):
    for vocab, batch, ties in ((1, 1, False), (50, 3, True), (50, 20, False), (1500, 2, False), (4500, 1, False)):
        check(device, seed, sampling, vocab, batch, ties)


@on_each_device
def test_many_rows_of_several_parts(device, seed):
    for sampling in (Sampling(), Sampling(1.0, top_k=40, top_p=0.9), Sampling(1.2, top_p=0.9)):
        check(device, seed, sampling, 8400, 16)


@on_each_device
def test_a_cut_among_more_tokens_than_the_list_holds(device, seed):
    """Of 9,000 equal ones the first are kept; of rounded ones thousands are equal."""
    at = np.zeros(1, np.int32)
    logits = np.zeros((1, 9000), np.float32)
    for sampling in (Sampling(1.0, top_p=0.00105, seed=seed), Sampling(1.0, top_k=9, min_p=0.5), Sampling(1.0, top_k=9, top_p=0.3)):
        assert drawn(device, logits, sampling, at, at)[0] == sample(logits[0], sampling, 0, 0)
    logits = np.random.default_rng(seed).integers(0, 2, (1, 9000)).astype(np.float32) * 0.001
    for sampling in (Sampling(1.0, top_p=0.3, seed=seed), Sampling(1.0, top_k=5000, top_p=0.9, seed=seed)):
        assert drawn(device, logits, sampling, at, at)[0] == sample(logits[0], sampling, 0, 0)


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no place"):
        raw_dense.sample(np.empty((1, 2**21 + 1), np.float32), Sampling(), None, None, None, np.empty((1, 1)))


@on_each_device
def test_extreme_logits(device):
    logits = np.full((5, 40), -np.inf, np.float32)
    logits[0, 7] = -5  # one token alone can be drawn
    logits[1], logits[1, 3] = 0, np.nan
    logits[2, [1, 2]] = np.inf
    logits[3] = np.linspace(-1e30, 1e30, 40)
    logits[4] = -0.0
    logits[4, 11] = 0.0  # equal to the others: the first is the largest
    at = np.arange(5, dtype=np.int32)
    for sampling in (Sampling(), Sampling(0.7, top_k=3, top_p=0.5, min_p=0.1)):
        tokens = drawn(device, logits, sampling, at, at).tolist()
        for row, i, token in zip(logits, at.tolist(), tokens, strict=True):
            try:
                assert token == sample(row, sampling, i, i)
            except Failure:
                assert token == -1 and i in (1, 2)


@on_each_device
def test_tokens_do_not_depend_on_the_order_of_threads_nor_on_the_batch(device, seed):
    rng, sampling = np.random.default_rng(seed), Sampling(1.1, top_p=0.9, seed=9)
    logits, at = rng.standard_normal((3, 700)).astype(np.float32), np.arange(3, dtype=np.int32)
    first = drawn(device, logits, sampling, at, at + 5)
    assert all(np.array_equal(first, drawn(device, logits, sampling, at, at + 5, order)) for order in (1, 2))
    assert first[2] == drawn(device, logits[2:], sampling, at[2:], at[2:] + 5)[0]


@on_the_card
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_device_draws_from_real_vocabularies(device, seed, sampling):
    check(device, seed, sampling, 151936, 64)
    check(device, seed, sampling, 151936, 3)
