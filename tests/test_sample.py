"""sample.cu against sampling.py, token by token; simulated and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from minioscar.errors import Failure
from minioscar.ops import sample as launches
from minioscar.penalties import adjusted, history
from minioscar.sampling import RowSampling, Sampling, exponentials, next_token, probabilities, sample

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
    Sampling(repetition_penalty=1.3, frequency_penalty=0.5),
    Sampling(1.0, top_k=20, repetition_penalty=0.7, presence_penalty=-1.5, seed=9),
    Sampling(0.7, top_p=0.8, presence_penalty=2.0, frequency_penalty=-0.25, seed=10),
]
MIXED = [RowSampling(s, sequence=3 * i) for i, s in enumerate(SAMPLINGS)]


class Drawn:
    """Steps of one batch on a device, and the same rows on the host."""

    def __init__(self, device, rows: Sequence[RowSampling], vocab: int):
        self.device, self.rows, self.vocab = device, rows, vocab
        xp = SimpleNamespace(
            asarray=device.array, empty=device.empty, zeros=lambda shape, dtype: device.array(np.zeros(shape, dtype))
        )
        self.drawing = launches.Drawing(xp, rows, vocab)

    def __call__(
        self, logits: np.ndarray, steps: np.ndarray, fed: np.ndarray, seen: np.ndarray | None = None, order: int = 0
    ):
        """Tokens of one step, twice, since a launch must leave the workspace as it was. seen: what penalties look back
        at, before `fed`."""
        there, at, found = self.device.array(logits), self.device.array(steps), []
        for again in range(2):
            if self.drawing.history is not None:
                self.drawing.history = self.device.array(np.zeros(logits.shape, np.int32) if seen is None else seen)
            tokens = self.device.array(fed)
            for launch in launches.sample(there, self.drawing, at, tokens):
                self.device.run(launch, seed=order + again)
            found.append(np.array(self.device.numpy(tokens)))
        assert np.array_equal(*found)
        return found[0]


def drawn(
    device, logits: np.ndarray, sampling: Sampling, sequences: np.ndarray, steps: np.ndarray, order: int = 0
) -> np.ndarray:
    rows = [RowSampling(sampling, sequence) for sequence in sequences.tolist()]
    return Drawn(device, rows, logits.shape[1])(logits, steps, np.zeros(len(logits), np.int32), order=order)


def check(device, seed: int, rows: Sequence[RowSampling], vocab: int, ties: bool = False) -> None:
    """One step of rows that have drawn some tokens, of logits that decide the token by more than float32 loses."""
    rng, batch = np.random.default_rng(seed), len(rows)
    rows = [row if row.sequence else replace(row, sequence=int(rng.integers(1000))) for row in rows]
    steps = rng.integers(1, 12, batch).astype(np.int32)
    past = [rng.integers(0, vocab, step).tolist() for step in steps]
    rows = [replace(row, prompt=rng.integers(0, vocab, 20).tolist()) for row in rows]
    logits = np.empty((batch, vocab), np.float32)
    for at, row, step, before in zip(logits, rows, steps.tolist(), past, strict=True):
        for _ in range(20):
            at[:] = 3 * rng.standard_normal(vocab)
            at[:] = np.round(at) if ties else at
            if not undecided(at, row, step, before):
                break
        else:
            raise AssertionError("every row is undecided")
    seen = np.stack([history(row, before[:-1], vocab) for row, before in zip(rows, past, strict=True)])
    got = Drawn(device, rows, vocab)(logits, steps, np.array([before[-1] for before in past], np.int32), seen)
    assert got.tolist() == [next_token(*given) for given in zip(logits, rows, steps.tolist(), past, strict=True)]


def undecided(logits: np.ndarray, row: RowSampling, step: int, past: list[int]) -> bool:
    """Whether the two best scores are nearer than float32 tells apart, or a cut is so near to a token that it may be on
    its other side.

    A logit 2^3 or 2^4 below the largest, in units of log2, is rounded by up to 2^-20, and its share by so much of it.
    """
    sampling, vocab = row.sampling, len(logits)
    x = adjusted(logits, row, step, history(row, past, vocab))
    if sampling.temperature == 0:
        return False
    whole = np.sort(probabilities(x, replace(sampling, top_p=1.0, min_p=0.0)))[::-1]
    ends = np.cumsum(whole[whole > 0])
    if sampling.top_p < 1 and abs(ends / ends[-1] - sampling.top_p)[:-1].min(initial=np.inf) < 2 * 2.0**-20:
        return True
    p = probabilities(x, sampling)
    if sampling.min_p > 0 and abs(whole / whole[0] - sampling.min_p).min() < 2.0**-20:
        return True
    kept, e = p > 0, exponentials(sampling.seed, row.sequence, step, vocab)
    best = np.sort(np.log(p[kept]) - np.log(e[kept]))[::-1][:2]
    return len(best) == 2 and best[0] - best[1] < 2.0**-16


@on_each_device
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_device_draws_the_tokens_that_the_host_draws(device, seed, sampling):
    for vocab, batch, ties in ((1, 1, False), (50, 3, True), (50, 20, False), (1500, 2, False), (4501, 1, False)):
        check(device, seed, [RowSampling(sampling)] * batch, vocab, ties)


@on_each_device
@pytest.mark.parametrize("vocab", [2047, 2048, 2049, 2052])
def test_rows_of_one_batch_draw_each_in_its_own_way(device, seed, vocab):
    """A part is 2,048 tokens, or 8,192 with 16 rows and more."""
    check(device, seed, MIXED, vocab)


@on_each_device
@pytest.mark.parametrize("vocab", [8191, 8193, 8196])
def test_many_rows_of_several_parts(device, seed, vocab):
    check(device, seed, [*MIXED, RowSampling(Sampling(1.2, top_p=0.9)), RowSampling()], vocab)


@on_each_device
def test_a_row_does_not_depend_on_its_neighbours(device, seed):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((len(MIXED), 700))).astype(np.float32)
    steps, fed = np.full(len(MIXED), 4, np.int32), np.arange(len(MIXED), dtype=np.int32)
    together = Drawn(device, MIXED, 700)(logits, steps, fed)
    for i, row in enumerate(MIXED):
        alone = slice(i, i + 1)
        assert Drawn(device, [row], 700)(logits[alone], steps[alone], fed[alone])[0] == together[i]


@on_each_device
def test_end_tokens_are_not_drawn_too_early(device):
    """Tokens 7 and 2,050, in two parts, are far above all others; of row 2 all tokens but one are end tokens."""
    vocab = 2060
    logits = np.zeros((3, vocab), np.float32)
    logits[:, [7, 2050]] = 30, 29
    rows = [
        RowSampling(Sampling(), ends=(7,), min_tokens=3),
        RowSampling(Sampling(1.0, top_k=5), ends=(7, 2050), min_tokens=2),
        RowSampling(Sampling(0.5, top_p=0.9), ends=tuple(i for i in range(vocab) if i != 2051), min_tokens=2),
    ]
    draw = Drawn(device, rows, vocab)
    for step in range(4):
        got = draw(logits, np.full(3, step, np.int32), np.zeros(3, np.int32)).tolist()
        assert got == [next_token(x, row, step) for x, row in zip(logits, rows, strict=True)]
        assert (got[0] == 2050) == (step < 3) and (got[1] in (7, 2050)) == (step >= 2)
        assert (got[2] == 2051) == (step < 2)


@on_each_device
def test_the_device_counts_what_it_is_fed(device, seed):
    """Twelve steps of few tokens, each fed with the token before it: history and draws stay the host's."""
    rng, vocab = np.random.default_rng(seed), 40
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4}
    rows = [
        RowSampling(Sampling(temperature, seed=i, **penalties), i, prompt=(1, 5, 5))
        for i, temperature in enumerate((0.0, 0.5))
    ]
    rows.append(RowSampling(Sampling(0.5, seed=2)))  # has none
    draw, past = Drawn(device, rows, vocab), [[3], [5], [5]]
    draw.drawing.history = device.array(np.stack([history(row, [], vocab) for row in rows]))
    tokens = device.array(np.array([3, 5, 5], np.int32))
    for step in range(1, 13):
        logits = (2 * rng.standard_normal((3, vocab))).astype(np.float32)
        for launch in launches.sample(
            device.array(logits), draw.drawing, device.array(np.full(3, step, np.int32)), tokens
        ):
            device.run(launch, seed=step)
        want = [next_token(x, row, step, before) for x, row, before in zip(logits, rows, past, strict=True)]
        assert device.numpy(tokens).tolist() == want
        counted = np.array(device.numpy(draw.drawing.history))
        assert all(np.array_equal(counted[i], history(rows[i], past[i], vocab)) for i in range(2))
        past = [[*before, token] for before, token in zip(past, want, strict=True)]


@on_each_device
def test_a_cut_among_more_tokens_than_the_list_holds(device, seed):
    """Of 9,000 equal ones the first are kept; of rounded ones thousands are equal."""
    at = np.zeros(1, np.int32)
    logits = np.zeros((1, 9000), np.float32)
    for sampling in (
        Sampling(1.0, top_p=0.00105, seed=seed), Sampling(1.0, top_k=9, min_p=0.5), Sampling(1.0, top_k=9, top_p=0.3)
    ):
        assert drawn(device, logits, sampling, at, at)[0] == sample(logits[0], sampling, 0, 0)
    logits = np.random.default_rng(seed).integers(0, 2, (1, 9000)).astype(np.float32) * 0.001
    for sampling in (Sampling(1.0, top_p=0.3, seed=seed), Sampling(1.0, top_k=5000, top_p=0.9, seed=seed)):
        assert drawn(device, logits, sampling, at, at)[0] == sample(logits[0], sampling, 0, 0)


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit sample.cu"):
        launches.Drawing(np, [RowSampling()], 2**21 + 1)


def test_what_no_row_asks_for_is_neither_launched_nor_allocated():
    def launched(*samplings: Sampling, **more) -> list[str]:
        drawing = launches.Drawing(np, [RowSampling(s, **more) for s in samplings], 100)
        assert (drawing.history is not None) == any(s.penalizes for s in samplings)
        logits, at = np.empty((len(samplings), 100), np.float32), np.empty(len(samplings), np.int32)
        return [launch.name.removeprefix("sample_") for launch in launches.sample(logits, drawing, at, at)]

    assert launched(Sampling(), Sampling(top_p=0.5)) == ["max"]
    assert launched(Sampling(), Sampling(1, top_k=3, top_p=0.5)) == ["max", "draw"]
    assert launched(Sampling(1, top_k=3), Sampling(1, top_k=100, top_p=0.5)) == ["max", "mass", "draw"]
    assert launched(Sampling(), Sampling(presence_penalty=1)) == ["adjust", "max"]
    assert launched(Sampling(), ends=(3,)) == ["max"]
    assert launched(Sampling(), ends=(3,), min_tokens=1) == ["adjust", "max"]


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
    penalties = Sampling(0.7, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=0.01, frequency_penalty=2.0)
    for sampling in (Sampling(), Sampling(0.7), Sampling(0.7, top_k=3, top_p=0.5, min_p=0.1), penalties):
        tokens = drawn(device, logits, sampling, at, at).tolist()
        for row, i, token in zip(logits, at.tolist(), tokens, strict=True):
            try:
                assert token == next_token(row, RowSampling(sampling, i), i, [0])
            except Failure:
                assert token == -1 and i in (1, 2)


@on_each_device
def test_tokens_do_not_depend_on_the_order_of_threads(device, seed):
    rng, sampling = np.random.default_rng(seed), Sampling(1.1, top_p=0.9, seed=9)
    logits, at = rng.standard_normal((3, 700)).astype(np.float32), np.arange(3, dtype=np.int32)
    first = drawn(device, logits, sampling, at, at + 5)
    assert all(np.array_equal(first, drawn(device, logits, sampling, at, at + 5, order)) for order in (1, 2))


@on_each_device
def test_near_ties_are_few(device, seed):
    """Of draws whose scores are as they come, next to none differ from float64's: a score is off by less than 2^-17."""
    rng, vocab, batch = np.random.default_rng(seed), 300, 40
    rows = [RowSampling(Sampling(1.0 if i % 2 else 2.5, seed=seed), i) for i in range(batch)]
    draw, other = Drawn(device, rows, vocab), 0
    for step in range(3):
        logits, at = (3 * rng.standard_normal((batch, vocab))).astype(np.float32), np.full(batch, step, np.int32)
        want = np.array([next_token(x, row, step) for x, row in zip(logits, rows, strict=True)])
        other += (draw(logits, at, at) != want).sum()
    print(f"{other} of {3 * batch} draws differ")
    assert other <= 1


@on_the_card
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_device_draws_from_real_vocabularies(device, seed, sampling):
    check(device, seed, [RowSampling(sampling)] * 64, 151936)
    check(device, seed, [RowSampling(sampling)] * 3, 151936)


@on_the_card
@pytest.mark.parametrize("vocab", [32000, 49152, 128256, 151936, 151669])
def test_rows_of_one_batch_draw_from_real_vocabularies(device, seed, vocab):
    check(device, seed, MIXED, vocab)
    check(device, seed, MIXED * 5, vocab)
