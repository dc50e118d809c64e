"""The metrics of `eval` on cases whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.errors import UserError
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


@pytest.mark.long
def test_windows_follow_each_other_and_their_mean_is_reported():
    run = {
        n: fidelity.evaluate("smollm2-135m", ["oscar"], prefill=140, decode=10, windows=n, device="cpu") for n in (1, 2)
    }
    text = fidelity.default_text()
    from minioscar.storage import hub
    from minioscar.tokenizer import Tokenizer

    words = Tokenizer(hub.resolve("smollm2-135m"))
    second = words.decode(words.encode(text)[151:400])
    alone = fidelity.evaluate("smollm2-135m", ["oscar"], text=second, prefill=140, decode=10, device="cpu")
    means = [report["results"][1]["kl"] for report in (run[1], alone, run[2])]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2, rel=1e-3)


@pytest.mark.long
def test_schemes_of_several_windows_are_compared_position_by_position(windows):
    """In one table with others and alone, a scheme has the same KL, whose baseline is read in other chunks
    than it; a window as an option is one in the scheme."""
    how = {"prefill": 150, "decode": 50, "device": "cpu"}
    names = ["oscar", "plain-64-64", "plain-32-96"]
    rows = {row["kv"]: row["kl"] for row in fidelity.evaluate("smollm2-135m", names, **how)["results"]}
    alone = fidelity.evaluate("smollm2-135m", ["plain-64-64"], **how)["results"][1]
    asked = fidelity.evaluate("smollm2-135m", ["plain", "plain-64-64"], window=(64, 64), **how)
    assert rows["plain-64-64"] == pytest.approx(alone["kl"], rel=0.02)
    assert asked["window"] == [64, 64]
    assert [row["kl"] for row in asked["results"]] == pytest.approx([0, alone["kl"], alone["kl"]], rel=0.02)


@pytest.mark.long
def test_kl_with_an_emptied_window_is_that_of_the_same_scheme_without_kept_tokens(windows):
    how = {"prefill": 150, "decode": 50, "device": "cpu"}
    rows = fidelity.evaluate("smollm2-135m", ["plain-64-64", "kvarn-2"], emptied=True, **how)
    _, ours, theirs = rows["results"]
    (_, *small), (_, *large) = (
        fidelity.evaluate("smollm2-135m", names, window=window, **how)["results"]
        for names, window in ((["plain"], (64, 0)), (["kvarn-2"], (128, 0)))
    )
    assert ours["kl_emptied"] == pytest.approx(small[0]["kl"], rel=0.02) and ours["kl_emptied"] > ours["kl"]
    assert theirs["kl_emptied"] == pytest.approx(large[0]["kl"], rel=0.02) == pytest.approx(theirs["kl"], rel=0.02)
    assert "KL, window emptied" in fidelity.table(rows) and f"{ours['kl_emptied']:.4f}" in fidelity.table(rows)


def test_pieces_are_compared_with_prompts_read_whole_window_by_window():
    how = {"prefill": 130, "decode": 6, "windows": 2, "device": "cpu"}
    report = fidelity.evaluate("smollm2-135m", ["int2"], pieces=(64, 130), **how)
    plain, ours = report["results"]
    assert "pieces" not in plain and [one["tokens"] for one in ours["pieces"]] == [64, 130]
    cut, whole = ours["pieces"]
    assert (whole["more"], whole["more_se"], whole["kl"], whole["kl_se"]) == (0, 0, ours["kl"], ours["kl_se"])
    assert cut["more"] == pytest.approx(cut["kl"] - ours["kl"]) != 0 and cut["more_se"] > 0
    assert f"| int2 | 64 | {cut['kl']:.4f} ± {cut['kl_se']:.4f} | {cut['more']:.4f} ±" in fidelity.table(report)
    with pytest.raises(UserError, match="--pieces 0 is out of range; it must be at least 1"):
        fidelity.evaluate("smollm2-135m", ["int2"], pieces=(64, 0), **how)


@pytest.mark.parametrize(
    ("names", "window"), [(["ott", "int2"], (64, 64)), (["int2"], (48, 0)), (["int2-compact"], (32, 32))]
)
def test_a_window_that_a_scheme_cannot_have_is_refused_before_anything_is_loaded(names, window):
    with pytest.raises(UserError, match=rf"{names[0]}: a window that packs {window[0]} .*; --window 128/0 and 128/128"):
        fidelity.evaluate("no/such/model", names, window=window)
