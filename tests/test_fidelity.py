"""The metrics of `eval` on cases whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.evaluation import fidelity
from minioscar.oscar import SCHEMES, Scheme


@pytest.mark.parametrize("cuts", [[], [7], [2, 3]])
def test_identical_runs_have_kl_0_and_agree_everywhere(seed, cuts):
    """However the chunks of a run are cut: schemes pack at different lengths."""
    rng = np.random.default_rng(seed)
    truth, targets = fidelity.log_softmax(rng.standard_normal((10, 50)).astype(np.float32)), rng.integers(0, 50, 10)
    nll, kl, top1 = fidelity.compare(np.split(truth, cuts), truth, targets)
    assert (kl, top1) == (0, 1)
    assert nll == pytest.approx(-truth[np.arange(10), targets].mean())


def test_metrics_of_two_known_distributions():
    p, q = np.log(np.array([[0.5, 0.25, 0.25]], np.float32)), np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    nll, kl, top1 = fidelity.compare([q], p, np.array([0]))
    assert nll == pytest.approx(np.log(4)) and top1 == 0
    assert kl == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))


def test_a_scheme_that_loses_nothing_measures_nothing(monkeypatch):
    """Eight bits a code: the whole path of rotation, norms and packed blocks, and a KL of a millionth of what two bits
    cost."""
    monkeypatch.setitem(SCHEMES, "8bit", Scheme("8bit", key_bits=8, value_bits=8, rotate=True, scale=True))
    exact, ours, oscar = fidelity.evaluate(
        "smollm2-135m", ["8bit", "oscar"], prefill=260, decode=30, device="cpu"
    )["results"]
    assert (exact["kl"], exact["dnll"], exact["top1"]) == (0, 0, 1)
    assert 0 <= ours["kl"] < 1e-4 < oscar["kl"] / 100 and abs(ours["dnll"]) < 0.01


def test_log_softmax_is_normalized_for_large_logits():
    x = fidelity.log_softmax(np.array([[1000.0, 999.0, -1000.0]], np.float32))
    assert np.exp(x).sum() == pytest.approx(1) and x[0, 0] - x[0, 1] == pytest.approx(1)


def test_standard_errors_are_those_of_the_mean_over_windows():
    scores, baseline = np.array([[2.0, 0.1, 0.9], [2.4, 0.3, 0.7]]), np.array([[1.9, 0, 1], [2.0, 0, 1]])
    row = fidelity.summary(SCHEMES["oscar"], 64, scores, baseline)
    assert (row.kl, row.nll, row.top1, row.dnll) == pytest.approx((0.2, 2.2, 0.8, 0.25))
    assert row.kl_se == pytest.approx(0.1) and row.dnll_se == pytest.approx(0.15)
    assert fidelity.summary(SCHEMES["oscar"], 64, scores[:1], baseline[:1]).kl_se is None


def test_windows_follow_each_other_and_their_mean_is_reported():
    run = {
        n: fidelity.evaluate("smollm2-135m", ["int2"], prefill=140, decode=10, windows=n, device="cpu") for n in (1, 2)
    }
    text = fidelity.default_text()
    from minioscar.storage import hub
    from minioscar.tokenizer import Tokenizer

    words = Tokenizer(hub.resolve("smollm2-135m"))
    second = words.decode(words.encode(text)[151:400])
    alone = fidelity.evaluate("smollm2-135m", ["int2"], text=second, prefill=140, decode=10, device="cpu")
    means = [report["results"][1]["kl"] for report in (run[1], alone, run[2])]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2, rel=1e-3)
