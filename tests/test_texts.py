"""Texts that repeat themselves: what they are, and that two bits lose no more on them than the paper's method does."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from minioscar import engine
from minioscar.evaluation import fidelity
from minioscar.oscar import SCHEMES
from minioscar.storage import hub
from minioscar.tokenizer import Tokenizer
from tools import ideas, texts

SIZE = 3073  # 2,048 prefilled, 1,024 decoded, one more predicted


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(hub.resolve("smollm2-135m"))


@pytest.mark.parametrize("name", texts.TEXTS)
def test_every_text_has_four_whole_windows_that_are_the_same_in_every_run(tokenizer, name):
    found = texts.stretches(name, tokenizer, SIZE, 4)
    assert [len(stretch) for stretch in found] == [SIZE] * 4
    assert found == texts.stretches(name, tokenizer, SIZE, 4) and len(set(map(tuple, found))) == 4
    repeated = [len(set(stretch[texts.BEFORE :])) for stretch in found]
    assert (repeated == [1] * 4) == (name in texts.REPEATED)


@pytest.fixture(scope="module")
def engines(tokenizer) -> list[engine.Engine]:
    loaded = engine.load("smollm2-135m", "bf16", "cpu")
    wanted = [SCHEMES[name] for name in ("bf16", "oscar", "int2")]
    return fidelity.engines_for(wanted, loaded.model.weights, [loaded.config], tokenizer, loaded.ops)


@pytest.mark.parametrize("name", ["log", "csv", "source"])
def test_int2_loses_no_more_than_oscar_on_what_machines_write(engines, tokenizer, name):
    rows = fidelity.fidelity(engines, texts.stretches(name, tokenizer, 449, 1), 384, lambda tokens: None)
    kl = {row["kv"]: row["kl"] for row in rows}
    assert 0 < kl["int2"] < kl["oscar"], kl


def test_dither_takes_most_of_the_loss_on_one_token_repeated(engines, tokenizer):
    """A tenth was left when this was written."""
    baseline, _, dithered = engines
    weights, ops = dithered.model.weights, dithered.ops
    plain = engine.Engine(dithered.config, weights, tokenizer, texts.UNDITHERED, ops)
    windows = texts.stretches("one token", tokenizer, 449, 1)
    _, ours, theirs = fidelity.fidelity([baseline, dithered, plain], windows, 384, lambda tokens: None)
    assert 0 < ours["kl"] < 0.25 * theirs["kl"]


def test_equal_values_average_out_where_they_are_dithered_and_others_are_as_they_were(seed):
    rng = np.random.default_rng(seed)
    plain, dithered = ideas.Values(2.5), ideas.Values(2.5, dithered=0.25)
    different = rng.standard_normal((2, 64, 64)).astype(np.float32)
    np.testing.assert_allclose(dithered(different), plain(different), rtol=1e-6)
    equal = np.repeat(different[:, :1], 64, axis=1)
    step = abs(equal).reshape(2, 64, 2, 32).max(axis=3, keepdims=True) / 1.5  # of a group
    error = {name: abs((values(equal) - equal).mean(axis=1)).reshape(2, 2, 32) / step[:, 0]
             for name, values in (("plain", plain), ("dithered", dithered))}  # fmt: skip
    # of offsets an eighth of a step apart; the step is rounded to float16
    assert error["dithered"].max() < 1 / 16 + 0.001 and error["plain"].max() > 0.4


def test_a_norm_per_kv_head_does_not_see_how_loud_a_head_of_a_token_is(seed):
    """One norm over both heads makes the quiet one of that token a small number, whose error is larger."""
    keys = np.random.default_rng(seed).standard_normal((2, 128, 64)).astype(np.float32)
    louder = keys.copy()
    louder[0, 5] *= 16
    each, one = ideas.Keys(3, by_head=True), ideas.Keys(3)
    factor = louder / keys
    np.testing.assert_allclose(each(louder, None), factor * each(keys, None), rtol=2e-3, atol=2e-3)
    errors = [np.linalg.norm(back(louder, None)[1, 5] - keys[1, 5]) for back in (each, one)]
    assert errors[1] > 2 * errors[0]


def test_the_idea_called_int2_is_plain_rounding_as_eval_measures_it(monkeypatch, capsys, windows):
    for name, value in (("PREFILL", 256), ("DECODE", 40), ("WINDOWS", 1)):
        monkeypatch.setattr(ideas, name, value)
    monkeypatch.setattr(sys, "argv", ["ideas", "smollm2-135m", "int2", "--text", "log"])
    ideas.main()
    found = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer(hub.resolve("smollm2-135m"))
    (window,) = texts.stretches("log", tokenizer, 297, 1)
    expected = fidelity.evaluate(
        "smollm2-135m", ["oscar", "plain"], text=tokenizer.decode(window), prefill=256, decode=40, device="cpu"
    )["results"]
    assert found["text"] == "log" and [row["kv"] for row in found["results"]] == ["oscar", "int2"]
    for row, want in zip(found["results"], expected[1:], strict=True):
        assert row["kl"] == pytest.approx(want["kl"], rel=0.02) and row["kl"] > 0
