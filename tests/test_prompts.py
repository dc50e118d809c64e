"""Many prompts from one JSONL file: order kept, batches that change nothing, and a bad line that spoils no other."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minioscar.app.cli import main
from minioscar.app.prompts import answers, parse
from minioscar.errors import Failure, UserError
from minioscar.generation import Options
from minioscar.sampling import Sampling

from .tiny import talker, write_talker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("prompts") / "model", 5)


@pytest.fixture(scope="module")
def engine(folder):
    return talker(folder)


# --- lines

keys = st.sampled_from(["prompt", "messages", "id", "role", "content", "seed", "x"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda value: st.lists(value) | st.dictionaries(keys, value, max_size=4),
    max_leaves=6,
)
lines = st.one_of(
    st.binary(max_size=20), values.map(lambda v: json.dumps(v).encode()),
    values.map(lambda v: json.dumps(v).encode()[:-1])
)


@settings(max_examples=400, deadline=None, print_blob=True)
@given(raw=st.lists(lines, max_size=8))
def test_every_line_is_a_prompt_or_an_error_in_its_place(raw):
    raw = [line.replace(b"\n", b" ") for line in raw]
    found = list(parse(raw))
    assert [line.number for line in found] == [
        n for n, line in enumerate(raw, 1) if line.removeprefix(b"\xef\xbb\xbf").strip()
    ]
    for line in found:
        assert (line.prompt is None) != (line.error is None)
        assert line.error is None or "\n" not in line.error
        json.dumps(line.head())
        if line.prompt is not None:
            value = json.loads(raw[line.number - 1].decode().removeprefix("\ufeff"))
            assert line.prompt == (value if isinstance(value, str) else value.get("prompt") or value.get("messages"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "not JSON in UTF-8"),
        (b'"caf\xe9"', "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON in UTF-8"),
        (b"9" * 10_000, "not JSON in UTF-8"),
        (b"[1]", "needs to be a string, or an object"),
        (b"{}", "needs to be a string, or an object"),
        (b'{"prompt": "a", "messages": []}', "either"),
        (b'{"prompt": ""}', '"prompt" must be text, and not empty'),
        (b'{"prompt": ["a"]}', '"prompt" must be text'),
        (b'{"messages": "a"}', '"messages" must be a list'),
        (b'{"messages": []}', '"messages" must be a list'),
        (b'{"messages": [{"role": "user"}]}', '"messages" must be a list'),
        (b'{"prompt": "a", "id": 7, "temprature": 1}', "there is no key 'temprature'; did you mean \"temperature\"?"),
        (b'{"prompt": "a", "maxtokens": 3}', 'did you mean "max_tokens"?'),
        (b'{"prompt": "a", "": 3}', "there are prompt, messages, id"),
        (b'{"prompt": "a", "graph": true}', "there is no key 'graph'"),
        (b'{"prompt": "a", "sampling": {}}', "there is no key 'sampling'"),
        (b'{"prompt": "a", "system": 3}', '"system" must be text'),
        (b'{"messages": [{"role": "system", "content": "x"}], "system": "y"}', "leave one of them out"),
        (b'{"prompt": "a", "seed": NaN}', "seed is nan, which JSON does not have"),
        (b'{"prompt": "a", "x": [1, {"y": 1e999}]}', "x[1].y is inf"),
        (b'{"prompt": "a", "temperature": -Infinity}', "temperature is -inf"),
        (b"NaN", "is nan"),
    ],
)
def test_a_bad_line_says_what_is_wrong_with_it(line, message):
    (found,) = parse([line])
    assert found.prompt is None and message in found.error


@pytest.mark.parametrize("line", [b'"temprature": 1', b'"top_p": NaN', b'"system": []', b'"messages": []'])
def test_the_id_of_a_bad_line_comes_back(line):
    (found,) = parse([b'{"prompt": "a", ' + line + b', "id": ["x", 7]}'])
    assert found.error and found.head() == {"line": 1, "id": ["x", 7]}
    for id in (b"NaN", b"1e999", b'{"a": [-Infinity]}'):
        (found,) = parse([b'{"prompt": "a", "id": ' + id + b"}"])
        assert found.error and found.head() == {"line": 1}


def test_blank_lines_a_byte_order_mark_and_carriage_returns_are_nothing():
    found = list(parse([b'\xef\xbb\xbf"a"\r', b"", b"  \r", b'"b"']))
    assert [(line.number, line.prompt) for line in found] == [(1, "a"), (4, "b")]


# --- answers


def texts(engine, lines, batch, **options) -> list:
    return [
        (line.number, [r.token_ids for r in results])
        for line, results in answers(engine, lines, batch=batch, **options)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_changes_neither_order_nor_answers(engine, temperature):
    given = list(parse(json.dumps("the cat " * n).encode() for n in (1, 9, 2, 30, 1, 4, 7)))
    options = Options(max_tokens=10, sampling=Sampling(temperature=temperature, seed=5))
    found = [texts(engine, given, batch, options=options) for batch in (1, 3, 8)]
    assert [number for number, _ in found[0]] == [1, 2, 3, 4, 5, 6, 7]
    assert found[0] == found[1] == found[2]
    if temperature:
        assert found[0][0][1] != found[0][4][1]  # equal prompts on two lines draw other numbers


LINES = [
    {"prompt": "the cat", "max_tokens": 4},
    {"prompt": "the cat", "temperature": 1.0, "seed": 9, "n": 3, "max_tokens": None},
    {
        "prompt": "the dog", "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 1,
        "frequency_penalty": 0.5
    },
    {"messages": [{"role": "user", "content": "a"}], "logprobs": 2, "repetition_penalty": 1.3, "min_tokens": 6},
    {"prompt": "the mat", "system": "be brief", "stop": ["e", "<|end|>"], "stop_ids": [9], "ignore_eos": True},
    "the cat",
]


def test_a_line_has_settings_of_its_own_and_its_draws_do_not_depend_on_its_batch(engine):
    given, options = list(parse(json.dumps(line).encode() for line in LINES)), Options(8, Sampling(0.5, seed=2))
    found = [texts(engine, given, batch, options=options) for batch in (1, 2, 6)]
    assert found[0] == found[1] == found[2]
    lines = [line for line, _ in answers(engine, given, batch=6, options=options)]
    assert all(line.error is None for line in lines)
    assert [line.options.max_tokens for line in lines] == [4, 8, 8, 8, 8, 8]
    assert [line.options.n for line in lines] == [1, 3, 1, 1, 1, 1]
    assert lines[1].options.sampling == Sampling(1.0, seed=9) and lines[5].options == options
    assert [len(answer) for _, answer in found[0]] == [1, 3, 1, 1, 1, 1]
    assert len({tuple(ids) for ids in found[0][1][1]}) == 3
    assert len(found[0][0][1][0]) <= 4 and len(found[0][3][1][0]) >= 6
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the mat"}]
    assert lines[4].prompt == messages


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": "1"}, "temperature '1' is not a number"), ({"top_k": 2.5}, "top_k 2.5"),
        ({"seed": -1}, "seed -1"),
        ({"n": 0}, "n 0"), ({"n": 300}, "300 answers at a time"), ({"logprobs": True}, "logprobs True"),
        ({"stop": "x"}, "list of strings"),
        ({"stop_ids": [320]}, "stop id 320 is not a token"),
        ({"min_tokens": 9}, "min_tokens 9 is more than max_tokens 8"),
        ({"max_tokens": 2.0}, "max_tokens 2.0 is not a whole number"),
        ({"ignore_eos": 1}, "ignore_eos 1 must be true or false"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_of_its_line(engine, setting, message):
    raw = [b'"the cat"', json.dumps({"prompt": "a", "id": 3} | setting).encode(), b'"a"']
    good, bad, last = answers(engine, list(parse(raw)), batch=3, options=Options(8))
    assert message in bad[0].error and bad[0].head() == {"line": 2, "id": 3} and bad[1] == []
    assert good[0].error is None and last[0].error is None


def test_a_system_message_needs_the_chat_template(engine):
    lines = list(parse([b'{"prompt": "a", "system": "b"}', b'"a"']))
    (bad, none), (good, _) = answers(engine, lines, batch=2, options=Options(2), chat=False)
    assert "chat template" in bad.error and not none and good.error is None


def test_pieces_come_before_their_answer_and_never_twice(engine, monkeypatch):
    told, start, given = [], engine.start, list(parse(json.dumps(line).encode() for line in LINES))

    def failing(prompts, **options):
        """Runs of more than two prompts end midway."""
        run = start(prompts, **options)
        if len(prompts) > 2:
            read = run._steps
            monkeypatch.setattr(run, "_steps", lambda first: broken(read(first)))
        return run

    def broken(steps):
        for _ in range(3):
            yield next(steps)
        raise Failure("a card that is gone")

    options = Options(8, Sampling(0.5, seed=2))
    whole = dict(texts(engine, given, 6, options=options))
    found = list(
        answers(
            engine, given, batch=6, options=options,
            piece=lambda line, i, text: told.append((line.number, i, text)),
        )
    )
    for line, results in found:
        for i, result in enumerate(results):
            assert "".join(text for number, at, text in told if (number, at) == (line.number, i)) == result.text
    told.clear()
    monkeypatch.setattr(engine, "start", failing)
    again = list(
        answers(
            engine, given, batch=6, options=options,
            piece=lambda line, i, text: told.append((line.number, i, text)),
        )
    )
    assert {line.number: [r.token_ids for r in results] for line, results in again} == whole
    for line, results in again:
        for i, result in enumerate(results):
            assert result.text.startswith(
                "".join(text for number, at, text in told if (number, at) == (line.number, i))
            )


def test_a_line_that_does_not_fit_spoils_no_other(engine):
    given = list(parse([b'"the cat"', json.dumps("the dog " * 900).encode(), b"oops", b'"\\ud800"', b'"a"']))
    found = list(answers(engine, given, batch=5, options=Options(max_tokens=4)))
    assert [line.error is None for line, _ in found] == [True, False, False, False, True]
    assert "tokens, but the context holds 1024" in found[1][0].error and "not valid Unicode" in found[3][0].error
    assert [len(results) for _, results in found] == [1, 0, 0, 0, 1]
    assert found[0][1][0].token_ids == engine.generate("the cat", max_tokens=4).token_ids


def test_a_batch_that_does_not_fit_into_memory_is_halved(engine, monkeypatch):
    given, started, start = list(parse([b'"the cat"'] * 6)), [], engine.start

    def refuse(prompts, **options):
        started.append(len(prompts))
        if len(prompts) > 2:
            raise UserError("too much")
        return start(prompts, **options)

    monkeypatch.setattr(engine, "start", refuse)
    found = list(answers(engine, given, batch=6, options=Options(max_tokens=3)))
    assert started == [6, 3, 1, 2, 3, 1, 2] and all(line.error is None for line, _ in found)
    assert [line.number for line, _ in found] == [1, 2, 3, 4, 5, 6]


def test_more_prompts_than_go_at_a_time_are_answered_in_waves(engine):
    lines = list(parse([b'"a"'] * 300))
    found = list(answers(engine, lines, batch=300, options=Options(max_tokens=1)))
    assert [line.number for line, _ in found] == [line.number for line in lines]
    assert all(len(results) == 1 for _, results in found)


def test_a_document_is_shared_by_all_lines(engine):
    cache = engine.prefill("the dog saw that the cat sat there. " * 9)
    found = list(
        answers(engine, list(parse([b'"who?"', b'"where?"'])), batch=2, options=Options(max_tokens=4), cache=cache)
    )
    assert all(results[0].prefilled_tokens < 30 < results[0].prompt_tokens for _, results in found)


# --- the command line


def run(capsys, *argv) -> tuple[int, list[dict], str]:
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_prompts_file_is_jsonl_in_and_out(folder, engine, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    messages = [{"role": "system", "content": "so"}, {"role": "user", "content": "the cat"}]
    file.write_text(
        f'"the cat"\n{json.dumps({"prompt": "the dog", "id": [7]})}\n\n{json.dumps({"messages": messages, "id": "m"})}'
    )
    base = ["generate", folder, "--prompts-file", file, "--device", "cpu", "--max-tokens", 6]
    code, found, err = run(capsys, *base)
    assert code == 0 and err == ""
    assert [(one["line"], one.get("id")) for one in found] == [(1, None), (2, [7]), (4, "m")]
    assert found[0]["token_ids"] == engine.generate("the cat", max_tokens=6).token_ids
    assert found[2]["token_ids"] == engine.generate(messages, max_tokens=6).token_ids
    stable = set("text token_ids prompt_tokens new_tokens finish_reason kv kv_bytes device".split())
    stable |= {"prefill_s", "decode_s", "tokens_per_s"}
    assert set(found[0]) == stable | {"line"}
    code, found, _ = run(capsys, *base, "--n", 2, "--temperature", 1, "--logprobs", 2)
    assert [(one["line"], one["index"]) for one in found] == [(1, 0), (1, 1), (2, 0), (2, 1), (4, 0), (4, 1)]
    assert all(len(one["logprobs"]) == one["new_tokens"] for one in found)
    assert set(found[0]["logprobs"][0]) == {"token_id", "token", "logprob", "top"}
    assert set(found[0]["logprobs"][0]["top"][1]) == {"token_id", "token", "logprob"}


def test_stream_writes_pieces_and_then_the_whole_object(folder, tmp_path, capsys):
    base = ["generate", folder, "--device", "cpu", "--max-tokens", 6, "--temperature", 1, "--stream"]
    code, (*pieces, last), _ = run(capsys, *base, "the cat", "--json")
    assert code == 0 and "".join(one["piece"] for one in pieces) == last["text"]
    assert all(set(one) == {"piece"} for one in pieces)
    code, (*pieces, last), _ = run(capsys, *base, "the cat", "--json", "--n", 2)
    assert code == 0
    assert all("".join(p["piece"] for p in pieces if p["index"] == i) == last["answers"][i]["text"] for i in range(2))
    (tmp_path / "p.jsonl").write_text('"the cat"\n{"prompt": "a", "n": 2, "id": "x"}\n{"prompt": 1}\n')
    code, found, _ = run(capsys, *base, "--prompts-file", tmp_path / "p.jsonl")
    assert code == 2
    wholes = [one for one in found if "text" in one]
    assert [
        (one["line"], one.get("id"), one.get("index")) for one in wholes
    ] == [(1, None, None), (2, "x", 0), (2, "x", 1)]
    for whole in wholes:
        head = {name: whole[name] for name in ("line", "id", "index") if name in whole}
        assert "".join(one["piece"] for one in found if one == head | {"piece": one.get("piece")}) == whole["text"]
    assert main([str(a) for a in (*base, "the cat")]) == 2 and "--stream is for JSON output" in capsys.readouterr().err


def test_options_of_ends_and_penalties_reach_the_answer(folder, engine, capsys):
    base = ["generate", folder, "the cat", "--device", "cpu", "--json", "--max-tokens", 12]
    plain = engine.generate("the cat", max_tokens=12).token_ids
    _, (found,), _ = run(capsys, *base, "--stop-id", plain[4], "--stop-id", 319)
    assert found["finish_reason"] == "stop" and found["token_ids"] == plain[: plain.index(plain[4])]
    penalties = {
        "repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": -0.5, "min_tokens": 3,
        "ignore_eos": True
    }
    flags = [
        "--repetition-penalty", 1.7, "--presence-penalty", 0.5, "--frequency-penalty", -0.5, "--min-tokens", 3,
        "--ignore-eos"
    ]
    _, (found,), _ = run(capsys, *base, *flags)
    assert found["token_ids"] == engine.generate("the cat", max_tokens=12, **penalties).token_ids != plain


def test_bad_lines_are_reported_on_both_streams_and_the_exit_code_is_2(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_bytes(b'"the cat"\n{"id": 3}\n"caf\xe9"\n"a"\n')
    code, found, err = run(
        capsys, "generate", folder, "--prompts-file", tmp_path / "p.jsonl", "--device", "cpu", "--max-tokens", 2
    )
    assert code == 2 and [one["line"] for one in found] == [1, 2, 3, 4]
    assert "error" in found[1] and found[1]["id"] == 3 and "error" in found[2] and "text" in found[3]
    assert err.count("\n") == 1 and "2 of 4 prompts failed (lines 2, 3)" in err


def test_a_dash_is_standard_input(folder, engine, capsys, monkeypatch):
    want = engine.generate("the cat\n", max_tokens=5).text

    def stdin(raw: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))

    for argv in (["-"], ["--prompt-file", "-"]):
        stdin(b"the cat\n")
        assert main(["generate", str(folder), *argv, "--device", "cpu", "--max-tokens", "5"]) == 0
        assert capsys.readouterr().out == want + "\n"
    stdin(b'"the cat\\n"\n')
    code, found, _ = run(capsys, "generate", folder, "--prompts-file", "-", "--device", "cpu", "--max-tokens", 5)
    assert code == 0 and found[0]["text"] == want
    stdin(b"")
    assert main(["generate", str(folder), "-"]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_n_answers_stop_and_logprobs_of_one_prompt(folder, engine, capsys):
    base = ["generate", folder, "the cat", "--device", "cpu", "--max-tokens", 8, "--temperature", 1, "--seed", 2]
    code, (found,), _ = run(capsys, *base, "--n", 3, "--json", "--logprobs", 1)
    assert code == 0 and set(found) == {"n", "answers"} and len(found["answers"]) == 3
    assert all(answer["logprobs"][0]["top"][0]["logprob"] <= 0 for answer in found["answers"])
    assert main([str(a) for a in (*base, "--n", 3)]) == 0
    assert capsys.readouterr().out == "\n---\n".join(answer["text"] for answer in found["answers"]) + "\n"
    plain = engine.generate("the cat", max_tokens=30)
    stops = ["--stop", plain.text[5:8], "--stop", "nothing"]
    code, (found,), _ = run(capsys, "generate", folder, "the cat", "--device", "cpu", "--json", *stops)
    assert code == 0 and found["text"] == plain.text[: plain.text.index(plain.text[5:8])]
    assert found["finish_reason"] == "stop"


def test_an_answer_that_ends_where_the_context_is_full_says_so(folder, capsys):
    base = ["generate", str(folder), "the cat", "--raw", "--device", "cpu", "--ignore-eos"]
    for more, full in (["--max-tokens", "1000000"], True), (["--ctx", "64"], True), (["--max-tokens", "9"], False):
        assert main([*base, *more]) == 0
        err = capsys.readouterr().err
        assert (
            "context (the context of 64 is full)" if more[0] == "--ctx" else "(the context of 1024 is full)"
        ) in err or not full
        assert full or "is full" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--prompts-file", "f"], "give one of PROMPT (- is standard input), --prompt-file and --prompts-file"),
        (["x", "--logprobs", "3"], "--logprobs needs --json"),
        (["x", "--json", "--logprobs", "-1"], "logprobs -1"),
        (["x", "--n", "0"], "n 0 is out of range"),
        (["x", "--stop", ""], "none of them empty"),
        (["--prompts-file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts-file", "/dev/null"], "has no prompts"),
        (["--prompts-file", "."], "Is a directory"),
        (["--prompts-file", "-", "--prompt-file", "-"], "give one of"),
        (["--prompts-file", "MODEL/model.safetensors"], "holds zero bytes and no prompts"),
        (["--prompt-file", "MODEL/model.safetensors"], "holds zero bytes"),
        (["--prompts-file", "/dev/null", "--batch", "0"], "--batch 0"),
        (["--prompt-file", "a\0b"], "cannot be read"),
    ],
)
def test_wrong_use_is_one_line(folder, capsys, argv, message):
    argv = [word.replace("MODEL", str(folder)) for word in argv]
    assert main(["generate", str(folder), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minioscar: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_prompts_from_windows_are_the_same_prompts(folder, tmp_path, capsys, encoding, newline):
    lines = [
        json.dumps("the cat é", ensure_ascii=False), "", json.dumps({"prompt": "so", "id": 7}), "nothing",
        json.dumps("the dog")
    ]
    seen = []
    for data in ("\n".join(lines).encode(), newline.join([*lines, ""]).encode(encoding)):
        (tmp_path / "p").write_bytes(data)
        assert main(["generate", str(folder), "--prompts-file", str(tmp_path / "p"), "--max-tokens", "3"]) == 2
        found = map(json.loads, capsys.readouterr().out.splitlines())
        seen.append([[one.get(key) for key in ("line", "id", "token_ids", "error")] for one in found])
    assert seen[0] == seen[1] and [line for line, *_ in seen[0]] == [1, 3, 4, 5]


def test_a_line_with_a_zero_byte_spoils_no_others(folder, tmp_path, capsys):
    (tmp_path / "p").write_bytes(b'"a"\n"b\0"\n"c"\n')
    assert main(["generate", str(folder), "--prompts-file", str(tmp_path / "p"), "--max-tokens", "3"]) == 2
    out, _ = capsys.readouterr()
    assert ["error" in json.loads(line) for line in out.splitlines()] == [False, True, False]
