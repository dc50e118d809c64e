"""A short run of the fuzz (`make soak` runs 10,000 cases and more), and proof that it would notice."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from minioscar.app import cli

from . import fuzz
from .mutants import Case, make_originals


@pytest.mark.long
def test_mutated_models_caches_and_prompts_end_in_one_line_and_an_exit_code(seed):
    summary = fuzz.fuzz(450, seed)
    assert not summary["failures"], json.dumps(summary["failures"][:3], indent=1)
    assert sum(sum(codes.values()) for codes in summary["exit_codes"].values()) == 450
    codes = summary["exit_codes"]
    # some live
    assert all("2" in found for found in codes.values()) and "0" in codes["folder"] and "0" in codes["prompt"], summary


@pytest.mark.long
def test_some_mutated_caches_live():
    """One in forty or so: too few to ask for one under every seed."""
    assert fuzz.fuzz(450, 7)["exit_codes"]["cache"].keys() >= {"0", "2"}


@pytest.fixture
def place(tmp_path) -> Path:
    make_originals(tmp_path / "originals")
    return tmp_path


OPENED = fuzz.Opened()


def judged(place: Path, argv: list[str], stdin: bytes = b"") -> list[str]:
    """The broken promises of one command on the good model."""
    decoy = fuzz.Decoy(place / "decoy", place / "originals" / "model")
    case = Case(1, 2, place / "case", place / "originals", place / "decoy")
    shutil.rmtree(case.model)
    shutil.copytree(place / "originals" / "model", case.model)
    case.argv, case.stdin, case.writes = [
        *(str(case.model) if a == "MODEL" else a for a in argv), "--device", "cpu"
    ], stdin, set()
    decoy.touched()
    _, broken = fuzz.run_case(case, OPENED, decoy)
    if decoy.fd is not None:
        os.close(decoy.fd)
    return broken


GOOD = ["generate", "MODEL", "the cat", "--max-tokens", "1"]


def test_the_fuzz_notices_nothing_on_a_good_case(place):
    assert judged(place, GOOD) == []


def test_the_fuzz_notices_an_unexpected_error(place, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "generate", lambda args: 1 / 0)
    assert any("unexpected ZeroDivisionError" in line for line in judged(place, GOOD))


def test_the_fuzz_notices_a_file_opened_elsewhere_by_python(place, monkeypatch):
    outside = place / "outside.json"
    outside.write_text("{}")
    monkeypatch.setitem(cli.COMMANDS, "generate", lambda args: print(open(outside).read()))
    assert any("opened outside its folder" in line and "outside.json" in line for line in judged(place, GOOD))


def test_the_fuzz_notices_a_decoy_opened_by_a_library(place, monkeypatch):
    from safetensors import safe_open

    if not Path("/proc/self/fd").exists():
        pytest.skip("inotify is Linux's")
    monkeypatch.setitem(
        cli.COMMANDS, "generate", lambda args: print(safe_open(place / "decoy" / "model.safetensors", "np"))
    )
    assert any("the decoy" in line for line in judged(place, GOOD))


def test_the_fuzz_notices_a_file_that_was_left_behind(place, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "generate", lambda args: print(Path(args.model, "left").write_text("x")))
    assert any("wrote ['model/left']" in line for line in judged(place, GOOD))


def test_the_fuzz_notices_crashes_and_hangs(monkeypatch, tmp_path):
    """The worker is told to die in its third case and to sleep in its fifth."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import os, sys, time\nif '--worker' in sys.orig_argv:\n    import tests.mutants as m\n    make = "
        "m.Case.__init__\n    def init(self, seed, number, *rest):\n        make(self, seed, number, *rest)\n        "
        "os.abort() if number == 2 else time.sleep(99) if number == 4 else None\n    m.Case.__init__ = init\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}")
    monkeypatch.setattr(fuzz, "LIMIT", 3.0)
    failures = {failure["case"]: failure["broken"][0] for failure in fuzz.fuzz(6, 1)["failures"]}
    assert set(failures) == {2, 4} and "the process died with -6" in failures[2] and failures[4] == "hung for 3.0 s"
