"""Tool calls copied from a context: the cases, what counts as copied, and that the packed cache is what is read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from minioscar import engine
from minioscar.evaluation import fidelity, tool_calls
from minioscar.evaluation.needle import plant
from minioscar.layer_cache import PackedCache
from minioscar.oscar import WINDOW
from minioscar.storage import hub
from minioscar.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def smollm2():
    return engine.load("smollm2-135m", "int4", "cpu")


def test_calls_are_the_same_in_every_run_and_valid_json_of_a_known_tool():
    first, second = tool_calls.calls(50), tool_calls.calls(50)
    assert first == second and {call.name for call in first} == set(tool_calls.TOOLS)
    assert len({json.dumps(call.arguments) for call in first}) == len(first)
    for call in first:
        _, answer, _ = call.tokens(lambda text: [text])
        assert json.loads(answer[0]) == {"name": call.name, "arguments": call.arguments}
        assert all(value in tool_calls.TOOLS[call.name][key] for key, value in call.arguments.items())


def test_question_and_answer_fit_the_margin_and_the_name_is_counted_in_tokens():
    tokenizer = Tokenizer(hub.resolve("smollm2-135m"))
    for call in tool_calls.calls(50):
        question, answer, named = call.tokens(tokenizer.encode)
        assert len(question) + len(answer) <= tool_calls.MARGIN
        assert tokenizer.decode(answer[:named]) == f' {{"name": "{call.name}'


def test_a_call_is_copied_from_the_packed_cache_and_lost_with_it(smollm2, monkeypatch):
    encode, call = smollm2.tokenizer.encode, tool_calls.calls(1)[0]
    question, answer, _ = call.tokens(encode)
    haystack = encode(fidelity.default_text()[:4000])
    context = plant(haystack, [*question, *answer, *encode(tool_calls.AFTER)], 4 * WINDOW, 1.0)
    assert tool_calls.copied(smollm2, context, call) == (True, True)
    packed = PackedCache.packed
    monkeypatch.setattr(PackedCache, "packed", lambda *args: tuple(np.zeros_like(x) for x in packed(*args)))
    assert tool_calls.copied(smollm2, context, call) == (False, False)


def test_a_wrong_argument_leaves_the_name_right_and_the_call_wrong(smollm2, monkeypatch):
    call = tool_calls.calls(1)[0]
    question, answer, named = call.tokens(smollm2.tokenizer.encode)
    for wrong, expected in ((named - 1, (False, False)), (named, (True, False)), (None, (True, True))):
        said = np.zeros((len(question) + len(answer) - 1, 49152), np.float32)
        said[np.arange(-len(answer), 0), answer] = 1
        if wrong is not None:
            said[wrong - len(answer), :] = 0
            said[wrong - len(answer), answer[wrong] - 1] = 1
        monkeypatch.setattr(tool_calls, "teacher_forced", lambda *args, said=said: iter(np.array_split(said, 3)))
        assert tool_calls.copied(smollm2, [1], call) == expected


def test_report_has_shares_for_every_length_and_depth_and_a_table(smollm2, monkeypatch):
    said = [(i % 4 != 3, i % 2 == 0) for i in range(2 * 5 * tool_calls.REPEATS)]
    monkeypatch.setattr(tool_calls, "copied", lambda *args: said.pop(0))
    haystack = smollm2.tokenizer.encode(fidelity.default_text()[:4000])
    report = tool_calls.tool_calls([smollm2], haystack, [640, 500])
    row = report["results"][0]
    assert report["lengths"] == [512, 640] and report["seed"] == tool_calls.SEED
    assert row["names_by_length_and_depth"] == [[0.75] * 5] * 2
    assert row["exact_by_length_and_depth"] == [[0.5] * 5] * 2 and (row["names"], row["exact"]) == (0.75, 0.5)
    assert tool_calls.table(report).splitlines()[-1] == "| int4 | 75% / 50% | 75% / 50% | 75% / 50% |"
