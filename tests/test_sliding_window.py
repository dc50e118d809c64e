"""A model with a sliding window: exact within it, refused beyond it by the window's name, wherever a context is
checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minioscar import memory
from minioscar.app import info
from minioscar.app.conversation import Conversation
from minioscar.engine import load
from minioscar.errors import UserError
from minioscar.evaluation import fidelity, inspection
from minioscar.oscar import SCHEMES

from .tiny import talker, write_talker

WINDOW, POSITIONS = 300, 1024  # no multiple of the 128 tokens of a block
NAMED = f"{POSITIONS} positions, but layers with a sliding window of {WINDOW} tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_talker(tmp_path_factory.mktemp("window") / "m", 3, model_type="mistral", sliding_window=WINDOW)


@pytest.fixture(scope="module")
def engine(folder):
    return talker(folder)


def refusals(folder: Path):
    """What checks a context, by name: each is to be called with an engine."""
    beyond, name, text = [1] * (WINDOW + 1), str(folder), "the cat sat on the mat. " * 200
    return {
        "prompt": lambda m: m.generate(beyond),
        "ctx": lambda m: m.generate([1], ctx=WINDOW + 1),
        "load": lambda m: load(folder, device="cpu", ctx=WINDOW + 1),
        "prefill": lambda m: m.prefill(beyond),
        "logits": lambda m: m.logits(beyond),
        "conversation": lambda m: Conversation(m, ctx=WINDOW + 1),
        "message": lambda m: list(Conversation(m).say("the cat sat " * 100)),
        "info": lambda m: info.describe(name, WINDOW + 1, 1, "cpu"),
        "eval": lambda m: fidelity.evaluate(name, ["int2"], text=text, prefill=200, decode=101, device="cpu"),
        "drift": lambda m: fidelity.evaluate(
            name, ["int2"], text=text, prefill=200, decode=9, continued=100, device="cpu"
        ),
        "needle": lambda m: fidelity.evaluate(
            name, ["int2"], text=text, prefill=9, decode=9, needles=[400], device="cpu"
        ),
        "tools": lambda m: fidelity.evaluate(
            name, ["int2"], text=text, prefill=9, decode=9, tools=[400], device="cpu"
        ),
        "inspect": lambda m: inspection.inspect(name, ["int2"], text=text, tokens=384, device="cpu"),
    }


@pytest.mark.parametrize("where", refusals(Path()))
def test_a_context_beyond_the_window_is_refused_by_its_name(folder, engine, where):
    with pytest.raises(UserError) as error:
        refusals(folder)[where](engine)
    assert NAMED in str(error.value) and "\n" not in str(error.value)


def test_the_whole_window_runs_as_the_same_model_without_one_does(folder, engine, tmp_path):
    plain = talker(write_talker(tmp_path / "m", 3, model_type="mistral", sliding_window=None))
    ids = np.random.default_rng(0).integers(0, 320, WINDOW).tolist()
    np.testing.assert_array_equal(engine.logits(ids), plain.logits(ids))
    answer = engine.generate(ids[:-8], max_tokens=20)
    assert answer.token_ids == plain.generate(ids[:-8], max_tokens=20).token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) in (8, 9)  # the last one needs no room
    saved, path = engine.prefill(ids[:-1]), tmp_path / "x.safetensors"
    saved.save(path)
    assert len(engine.load_cache(path)) == WINDOW - 1 and Conversation(engine).context == WINDOW


def test_the_longest_context_is_the_window_and_info_shows_both_numbers(folder, engine):
    config, scheme, ops = engine.config, SCHEMES["int2"], engine.ops
    assert memory.longest_context(config, scheme, ops, 1, 2**40) == WINDOW
    report = info.describe(str(folder), None, 1, "cpu")
    assert (report["max_positions"], report["sliding_window"], report["context"]) == (POSITIONS, WINDOW, WINDOW)
    assert f"positions: {POSITIONS}, sliding window {WINDOW}: no longer context runs" in info.text(report)
    assert all(row["longest_context"] == WINDOW for row in report["schemes"])
