"""bench.py serve: rows of a real server with a tiny model, and the client against made-up ones."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

import bench
from benchmarks import serve, serve_target
from benchmarks.serve import Answer, Client, take, waits_within
from minioscar.errors import Failure, UserError

from .patience import PATIENCE
from .test_cuda_backend import on_each_backend
from .test_decode_step import of_backend
from .tiny import CONFIG, write_talker

pytest.importorskip("uvicorn")
KEYS = "model kv weights slots context load clients requests seconds prompt_tokens new_tokens first_p50_ms first_p99_ms"
KEYS += " between_p50_ms between_p99_ms tokens_per_s times_one of_chain hit_tokens read_tokens idle_share"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("serve") / "talker", 1)


@pytest.fixture(scope="module")
def report(talker, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "b.json"
    argv = f"serve --quick --model {talker} --kv int2 --clients 1,3 --device cpu --json {file}"
    assert bench.main(argv.split()) == 0
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def rows(report):
    return {(row["load"], row["clients"]): row for row in report["serve"]}


# --- rows


def test_every_load_has_its_row_with_the_stable_keys(report, rows, talker):
    assert [(row["load"], row["clients"]) for row in report["serve"]] == [
        ("closed", 1), ("closed", 3), ("poisson", None), ("prefix", 4), ("first turn", 1), ("second turn", 1),
        ("long", 3),
    ]  # fmt: skip
    assert {"card", "commit", "versions", "command"} <= set(report["meta"]) and report["decode"] == []
    for row in report["serve"]:
        assert set(KEYS.split()) <= set(row) and row["model"] == str(talker) and row["slots"] == 4
        assert 0 < row["first_p50_ms"] <= row["first_p99_ms"] and row["between_p50_ms"] <= row["between_p99_ms"]
        assert row["read_tokens"] == row["prompt_tokens"] - row["hit_tokens"]
        assert 0 <= row["idle_share"] < 1
    lines = [bench.line("serve", row) for row in report["serve"]]
    assert all(line.startswith(row["load"]) for line, row in zip(lines, report["serve"], strict=True))
    assert "of the first turn's time" in lines[-2] and re.search(r"longest wait of a token \d+\.\d\d pieces", lines[-1])


def test_rates_are_those_of_the_tokens_and_ratios_those_of_the_rates(rows):
    one, three = rows["closed", 1], rows["closed", 3]
    assert one["requests"] == 1 and three["requests"] == 3 and one["times_one"] == 1
    for row in (one, three):
        assert row["tokens_per_s"] == pytest.approx(row["requests"] * row["new_tokens"] / row["seconds"])
        assert row["of_chain"] == pytest.approx(row["tokens_per_s"] / row["chain_tokens_per_s"])
    assert three["times_one"] == pytest.approx(three["tokens_per_s"] / one["tokens_per_s"])
    assert one["one_slot_tokens_per_s"] > 0


def test_prompts_with_nothing_in_common_hit_nothing_and_a_prefix_is_read_once(rows):
    for kind in (("closed", 1), ("closed", 3), ("poisson", None), ("first turn", 1), ("long", 3)):
        assert rows[kind]["hit_tokens"] == 0
    shared = rows["prefix", 4]
    assert shared["requests"] == 4 and shared["hit_tokens"] == 3 * shared["shared_tokens"]


def test_a_second_turn_goes_on_from_the_first(rows):
    first, second = rows["first turn", 1], rows["second turn", 1]
    assert first["requests"] == second["requests"] == 3
    assert second["hit_tokens"] > 0.9 * first["prompt_tokens"]
    assert second["first_share"] == pytest.approx(second["first_p50_ms"] / first["first_p50_ms"])


def test_streams_beside_a_long_prompt_wait_while_it_is_read(rows):
    row = rows["long", 3]
    assert row["requests"] == 4 and row["waits"] >= 3  # every stream has a token that came while it was read
    assert row["times_a_piece"] == pytest.approx(row["longest_wait_ms"] / row["piece_ms"])


def test_random_weights_are_served_with_a_made_tokenizer(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    argv = f"serve --quick --random-weights {config} --kv bf16 --clients 1 --slots 1 --new-tokens 4 --device cpu"
    assert bench.main(argv.split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nserve\nload .*\nclosed +bf16 +1 ", out) and "\nlong " not in out  # one slot has no streams


@pytest.mark.parametrize("vocab", [100, 320, 1000])
def test_a_made_tokenizer_has_a_text_for_every_token(vocab):
    words = serve_target.made_tokenizer(vocab)
    ids = list(range(256, vocab))
    assert words.decode(ids).split() == list(map(str, ids)) and not words.eos_ids
    assert all(words.token_bytes(i) for i in range(vocab))
    if vocab >= 256:
        assert words.decode(words.encode("é, 1")) == "é, 1"


def test_a_chain_reads_short_prompts_together_and_makes_the_tokens_that_were_asked_for(talker):
    target = serve_target.Target(str(talker), None, None, "int2", "cpu", 3, 512, 128)
    chain = serve_target.Chain(serve_target.load(target), 3, 200, 128)
    for rows, prompt, new in ((3, 40, 9), (2, 150, 2)):
        assert chain.seconds(rows, prompt, new) > 0
        assert chain.cache.lengths[:rows].tolist() == [prompt + new - 1] * rows  # the last one is drawn, not fed
    assert chain.piece_seconds(150) > 0 and chain.cache.lengths[0] == 150


def test_the_tokens_of_a_chain_are_those_of_the_engine(talker):
    target = serve_target.Target(str(talker), None, None, "int2", "cpu", 2, 512, 128)
    e = serve_target.load(target)
    chain = serve_target.Chain(e, 2, 100, 128)
    chain.seconds(2, 30, 6)
    prompts = np.random.default_rng(2).integers(0, e.config.vocab_size, (2, 30)).tolist()
    wanted = [one.token_ids for one in e.generate(prompts, max_tokens=6, temperature=0, ignore_eos=True)]
    assert chain.decoder.drawn == wanted


@on_each_backend
def test_a_chain_runs_on_kernels_with_steps_launched_ahead(make, tmp_path, seed):
    folder = write_talker(tmp_path / "m", seed, num_hidden_layers=1)
    _, e, ops = of_backend(make, folder, "int2")
    e.ops = ops
    chain = serve_target.Chain(e, 2, 40, 64)
    assert chain.decoder.ahead == 1
    for rows in (1, 2):
        chain.seconds(rows, 20, 4)
        assert chain.cache.lengths[:rows].tolist() == [23] * rows
        assert [len(drawn) for drawn in chain.decoder.drawn[:rows]] == [4] * rows
    assert chain.piece_seconds(30) > 0


@pytest.mark.gpu
def test_a_server_is_measured_on_a_card(tmp_path):
    argv = "serve --quick --random-weights qwen3-0.6b --kv int2 --json".split()
    assert bench.main([*argv, str(tmp_path / "s.json")]) == 0
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["meta"]["device"] == "cuda" and len(report["serve"]) == 7
    assert all(0 < row["of_chain"] < 1.5 for row in report["serve"] if row["load"] == "closed")


# --- what cannot work


@pytest.mark.parametrize(
    "argv, said",
    [
        ("--clients 2,8", "must begin with 1"),
        ("--clients x", "positive whole numbers"),
        ("--new-tokens 1", "at least 2"),
        ("--prompt-tokens 0", "at least 1"),
        ("--slots 0", "--slots 0 is out of range"),
        ("--context 100", "multiples of 128"),
        ("--context 128", "too short: with these prompts and answers it takes 160"),
        ("--context 256,512", "serve takes one"),
        ("--context 2048", "1024 positions"),
        ("--kv int9", "not a scheme"),
    ],
)
def test_what_cannot_work_is_refused_before_a_server_is_started(argv, said, talker, monkeypatch, capsys):
    monkeypatch.setattr(serve, "Server", lambda *_: pytest.fail("it went on"))
    assert bench.main(["serve", "--quick", "--model", str(talker), "--device", "cpu", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and re.fullmatch(r"bench: [^\n]*\n", err)


def test_a_server_that_does_not_start_says_why(talker):
    target = serve_target.Target(str(talker), None, None, "int9", "cpu", 1, 512, 128)
    with pytest.raises(Failure, match="the server has ended: server: --kv 'int9' is not a scheme"):
        list(serve.measure(target, serve.QUICK))


def test_a_server_ends_with_the_bench_that_started_it(talker):
    """Or the memory of a card would be held by nobody's server."""
    target = serve_target.Target(str(talker), None, None, "bf16", "cpu", 4, 512, 128)
    server = serve.Server(target, serve.QUICK)
    server.wait()
    server.process.stdin.close()  # as when the bench is killed
    assert server.process.wait(PATIENCE) == 1


def test_long_prompts_are_as_long_as_the_context_lets_them_be():
    load = serve.USUAL
    assert load.context % 128 == 0 and load.within(load.context) == load
    less = load.within(4096)
    assert (less.prefix, less.turn, less.long) == (2000, 4096 - 128 - 512, 4096 - 256)
    assert less.context <= 4096 and less.prompt == load.prompt
    with pytest.raises(UserError, match="takes 1640"):
        load.within(1536)


# --- the client


def answered(script: Callable[[asyncio.StreamWriter], Awaitable[None]], new: int = 3) -> Answer:
    """What a client makes of a server that answers by `script`."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = json.loads(await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1])))
        assert body["prompt"] == [1, 2] and body["max_tokens"] == new and body["stream"] and body["ignore_eos"]
        await script(writer)
        writer.close()

    async def both() -> Answer:
        server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
        async with server, Client(server.sockets[0].getsockname()[1]) as client:
            return await client.complete([1, 2], new)

    return asyncio.run(asyncio.wait_for(both(), PATIENCE))


def token_event(*ids: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": "", "token_ids": ids}]}).encode() + b"\n\n"


async def send(writer: asyncio.StreamWriter, pieces: Sequence[bytes], seconds: Sequence[float]) -> None:
    """In the chunks of HTTP/1.1, each after so many seconds."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for piece, wait in zip((*pieces, b""), (*seconds, 0), strict=True):
        await asyncio.sleep(wait)
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()


def test_times_are_from_the_request_to_the_first_token_and_between_tokens():
    async def script(writer):
        pieces = [b":\n\n", token_event(7), token_event(8)[:11], token_event(8)[11:] + token_event(9)]
        await send(writer, [*pieces, b"data: [DONE]\n\n"], [0.05, 0.25, 0.1, 0.3, 0])

    answer = answered(script)
    assert answer.ids == [7, 8, 9] and 0.3 <= answer.first < 3
    assert 0.4 <= answer.between[0] < 3 and answer.between[1] < 0.4


@pytest.mark.parametrize("ids", [[], [7], [7, 8, 9, 10]])
def test_an_answer_of_another_length_is_a_failure(ids):
    with pytest.raises(Failure, match=f"has {len(ids)} tokens where 3 were asked for"):
        answered(lambda writer: send(writer, [*map(token_event, ids), b"data: [DONE]\n\n"], [0] * (len(ids) + 1)))


def test_what_the_server_refuses_or_breaks_off_is_a_failure():
    async def refuse(writer):
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")

    with pytest.raises(Failure, match="answered HTTP/1.1 503 Service Unavailable"):
        answered(refuse)
    with pytest.raises(Failure, match="is an error: no more memory"):
        answered(lambda writer: send(writer, [b'data: {"error": {"message": "no more memory"}}\n\n'], [0]))

    async def leave(writer):
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    with pytest.raises(EOFError):
        answered(leave)


def test_comments_and_the_end_are_no_tokens():
    answer = Answer(1, 0.0)
    for event in (b":", b"", b"data: [DONE]", b'data: {"choices": [{"token_ids": []}]}'):
        take(event, answer)
    assert answer.ids == answer.times == []


def test_a_wait_counts_where_it_overlaps_the_reading_of_the_long_prompt():
    answer = Answer(1, 0.0, [1.0, 2.0, 4.0, 4.5, 7.0, 7.5], [0] * 6)
    assert waits_within(answer, 3.0, 5.0) == [2.0, 0.5, 2.5]
    assert waits_within(answer, 0.0, 1.0) == waits_within(answer, 8.0, 9.0) == []
