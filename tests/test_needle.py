"""Passkey retrieval: where the needle is planted, what counts as found, and that the question reads the quantized
cache."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar import engine
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.evaluation import fidelity, needle
from minioscar.layer_cache import PackedCache
from minioscar.oscar import SCHEMES, WINDOW

from .tiny import CONFIG


def test_needle_is_planted_at_its_depth_and_the_text_is_whole_around_it():
    hay, pin, first = list(range(1000)), [-1, -2, -3], needle.FIRST
    for depth, at in ((0, 0), (0.5, 50), (1, 100)):
        text = needle.plant(hay, pin, needle.FIRST + needle.LAST + 103, depth)
        assert len(text) == first + needle.LAST + 103 and text[first + at : first + at + 3] == pin
        assert text[: first + at] + text[first + at + 3 :] == hay[: len(text) - 3]
    with pytest.raises(UserError, match="too few"):
        needle.plant(hay, pin, needle.SHORTEST, 0)


def test_no_scheme_has_a_planted_needle_among_its_sinks_or_in_its_window():
    assert all(scheme.sinks <= needle.FIRST for scheme in SCHEMES.values())
    longest = {name: PackedCache.layout(Config.from_dict(CONFIG), scheme, 1, 1024, 8)["window_keys"][0][2]
               for name, scheme in SCHEMES.items() if scheme.quantized}  # fmt: skip
    assert max(longest.values()) <= needle.LAST


@pytest.mark.parametrize(
    ("answer", "found"),
    [(" 71432.\n\nNote", True), ("71432", True), (" is 71432, not 5", True)]
    + [(" 7143", False), (" 714321", False), (" 5 71432", False), ("", False)],
)
def test_only_the_first_number_of_an_answer_counts_and_digit_for_digit(answer, found):
    assert needle.retrieved(answer, "71432") is found


def test_trials_are_the_same_in_every_run_and_their_passkeys_differ():
    first, second = (needle.trials([128, 256], needle.DEPTHS, 2) for _ in range(2))
    assert first == second and len({trial.passkey for trial in first}) == len(first) == 2 * 5 * 2
    assert all(len(trial.passkey) == 5 for trial in first)
    assert needle.blocks([100, 129, 256, 200]) == [128, 256]


@pytest.fixture(scope="module")
def smollm2():
    return engine.load("smollm2-135m", "oscar", "cpu")


def test_the_question_reads_the_haystack_from_the_packed_cache(smollm2, monkeypatch):
    """At depth 1, too: with the packed part zeroed the passkey is lost."""
    encode = smollm2.tokenizer.encode
    text = needle.plant(encode(fidelity.default_text()[:3000]), encode(needle.HIDDEN.format(71432)), 4 * WINDOW, 1.0)
    question = encode(needle.QUESTION)
    assert needle.retrieved(needle.ask(smollm2, text, question), "71432")
    packed = PackedCache.packed
    monkeypatch.setattr(PackedCache, "packed", lambda *args: tuple(np.zeros_like(x) for x in packed(*args)))
    assert not needle.retrieved(needle.ask(smollm2, text, question), "71432")


def test_report_has_a_cell_for_every_length_and_depth_and_a_table(smollm2, monkeypatch):
    passkeys = iter(trial.passkey for trial in needle.trials([512, 640], needle.DEPTHS, needle.REPEATS))
    answers = [f" {key}." if i % 2 else " 1" for i, key in enumerate(passkeys)]  # one of two repeats is found
    monkeypatch.setattr(needle, "ask", lambda *args: answers.pop(0))
    report = needle.needle([smollm2], smollm2.tokenizer.encode(fidelity.default_text()[:4000]), [640, 500])
    assert report["lengths"] == [512, 640] and report["results"][0]["by_length_and_depth"] == [[0.5] * 5] * 2
    assert report["results"][0]["exact_match"] == 0.5
    assert needle.table(report).splitlines()[-1] == "| oscar | 50% | 50% | 50% |"
