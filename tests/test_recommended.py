"""generation_config.json: what its authors recommend is used and said, what the user gives comes first, and nothing in
it stops a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minioscar.app.cli import main
from minioscar.app.recommended import recommended
from minioscar.sampling import Sampling

from .tiny import talker, write_talker

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "bos_token_id": 1, "eos_token_id": [0, 2]}
LINE = "sampling: temperature 0.6, top-p 0.95, top-k 20 from generation_config.json; --temperature 0 is greedy"


def said(folder: Path, config, given: dict | None = None) -> tuple[Sampling, list[str]]:
    (folder / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return recommended(folder, given or {})


@pytest.mark.parametrize(
    ("config", "given", "want", "line"),
    [
        (QWEN3, {}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}, LINE),
        (QWEN3, {"seed": 3}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 3}, LINE),
        (QWEN3, {"temperature": 0.0}, {}, None),
        (QWEN3 | {"repetition_penalty": 1.1}, {"temperature": 0.0}, {}, None),
        (QWEN3, {"top_p": 1.0}, {"temperature": 0.6, "top_k": 20}, "sampling: temperature 0.6, top-k 20 from"),
        (QWEN3, {"temperature": 1.5, "top_k": 0}, {"temperature": 1.5, "top_p": 0.95}, "sampling: top-p 0.95 from"),
        (QWEN3 | {"do_sample": False}, {}, {}, None),
        (
            QWEN3 | {"do_sample": False}, {"temperature": 0.5}, {"temperature": 0.5, "top_p": 0.95, "top_k": 20},
            "top-p 0.95, top-k"
        ),
        ({"temperature": 0.6, "top_k": 20}, {}, {}, None),  # do_sample is false where it is not named
        ({"do_sample": None, "temperature": 0.6}, {}, {}, None),
        # transformers' own
        ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}, "sampling: temperature 1, top-k 50 from"),
        (
            {"do_sample": True, "top_k": None, "temperature": 0.7}, {}, {"temperature": 0.7, "top_k": 50},
            "temperature 0.7, top-k 50"
        ),
        (
            {"do_sample": True, "top_k": 0, "min_p": 0.1}, {}, {"temperature": 1.0, "min_p": 0.1},
            "sampling: temperature 1, min-p 0.1"
        ),
        ({"do_sample": True, "temperature": 0.0, "top_k": 5}, {}, {}, None),
        # greedy, too
        ({"repetition_penalty": 1.2}, {}, {"repetition_penalty": 1.2}, "sampling: repetition-penalty 1.2 from"),
        ({"repetition_penalty": 1.0}, {}, {}, None),
        ({}, {}, {}, None),
        ({"eos_token_id": 2}, {"temperature": 0.7}, {"temperature": 0.7}, None),
    ],
)
def test_each_option_comes_from_the_user_else_from_the_model_else_is_off(tmp_path, config, given, want, line):
    sampling, lines = said(tmp_path, config, given)
    assert sampling == Sampling(**want)
    assert len(lines) == (line is not None) and (
        line is None or line in lines[0] and lines[0].endswith("--temperature 0 is greedy")
    )


@pytest.mark.parametrize(
    ("config", "want", "line"),
    [
        (QWEN3 | {"top_p": 2}, {"temperature": 0.6, "top_k": 20}, "top_p 2 is out of range"),
        (QWEN3 | {"top_p": 0}, {"temperature": 0.6, "top_k": 20}, "top_p 0 is out of range"),
        (QWEN3 | {"top_k": -1}, {"temperature": 0.6, "top_p": 0.95, "top_k": 50}, "top_k -1 is out of range"),
        (QWEN3 | {"top_k": "20"}, {"temperature": 0.6, "top_p": 0.95, "top_k": 50}, "top_k '20'"),
        (QWEN3 | {"temperature": "hot"}, {"temperature": 1.0, "top_p": 0.95, "top_k": 20}, "temperature 'hot'"),
        (QWEN3 | {"temperature": [0.6]}, {"temperature": 1.0, "top_p": 0.95, "top_k": 20}, "temperature [0.6]"),
        (QWEN3 | {"temperature": True}, {"temperature": 1.0, "top_p": 0.95, "top_k": 20}, "temperature True"),
        (QWEN3 | {"repetition_penalty": 0}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}, "repetition_penalty 0"),
        (QWEN3 | {"do_sample": "yes"}, {}, "do_sample 'yes' must be true or false"),
        ("{", {}, "generation_config.json is left out: "),
        ("[]", {}, "it is not an object"),
        ('{"do_sample": true, "temperature": NaN}', {}, "generation_config.json is left out: temperature is nan"),
        ("[" * 100_000, {}, "generation_config.json is left out: "),
        ("caf\0", {}, "generation_config.json is left out: "),
    ],
)
def test_what_cannot_be_is_said_and_stops_nothing(tmp_path, config, want, line):
    sampling, lines = said(tmp_path, config)
    assert sampling == Sampling(**want) and line in lines[0] and "\n" not in lines[0]


def test_a_folder_that_says_nothing_is_greedy_and_silent(tmp_path):
    assert recommended(tmp_path, {}) == (Sampling(), [])


# --- the commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_talker(tmp_path_factory.mktemp("recommended") / "model", 5)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 1.5, "top_k": 100}))
    return folder


def answers(capsys, *argv: object) -> tuple[list[list[int]], str]:
    assert main([*map(str, argv), "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line)["token_ids"] for line in out.splitlines()], err


def test_generate_and_prompts_file_draw_as_the_model_recommends(folder, capsys, tmp_path):
    (tmp_path / "p").write_text('"the cat"\n')
    one = "generate", folder, "the cat", "--json"
    greedy, err = answers(capsys, *one, "--temperature", 0)
    # Python is greedy
    assert "sampling" not in err and greedy == [talker(folder).generate("the cat", max_tokens=12).token_ids]
    drawn, err = answers(capsys, *one, "--seed", 3)
    assert err == "[sampling: temperature 1.5, top-k 100 from generation_config.json; --temperature 0 is greedy]\n"
    assert drawn != greedy and drawn == answers(capsys, *one, "--seed", 3, "--temperature", 1.5, "--top-k", 100)[0]
    lines, err = answers(capsys, "generate", folder, "--prompts-file", tmp_path / "p")
    assert err.count("from generation_config.json") == 1 and lines != greedy
    assert answers(capsys, "generate", folder, "--prompts-file", tmp_path / "p", "--temperature", 0)[0] == greedy


def test_what_the_user_gives_is_still_refused_before_the_model_is_loaded(folder, capsys):
    assert main(["generate", str(folder), "x", "--top-p", "2"]) == 2
    assert capsys.readouterr().err.startswith("minioscar: top_p 2")


# --- --system


def test_system_comes_first_in_one_prompt_and_in_each_of_many(folder, capsys, tmp_path):
    engine = talker(folder)
    system, user, own = (
        {"role": role, "content": text} for role, text in (("system", "so"), ("user", "the cat"), ("system", "own"))
    )
    want = [engine.generate([[first, user]], max_tokens=12)[0].token_ids for first in (system, own)]
    options = "--system", "so", "--temperature", 0
    assert answers(capsys, "generate", folder, "the cat", "--json", *options)[0] == want[:1]
    (tmp_path / "p").write_text(
        "\n".join(map(json.dumps, ["the cat", {"messages": [user]}, {"messages": [own, user]}]))
    )
    assert answers(
        capsys, "generate", folder, "--prompts-file", tmp_path / "p", *options
    )[0] == [want[0], want[0], want[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--raw"], "--raw continues a plain text"), (["--cache", "c"], "a prompt cache has its own beginning")],
)
def test_system_is_refused_where_it_has_no_place(folder, capsys, options, message):
    assert main(["generate", str(folder), "x", "--system", "so", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_system_needs_a_chat_template(tmp_path, capsys):
    folder = write_talker(tmp_path / "m", 5, template=None)
    assert main(["generate", str(folder), "x", "--system", "so"]) == 2
    assert "m has no chat template to put a system message into" in capsys.readouterr().err
