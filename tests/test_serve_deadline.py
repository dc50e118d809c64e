"""Requests that take too long, through the whole server with a tiny model; and how long the card had work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from minioscar.engine import Engine
from minioscar.options import Options
from minioscar.sampling import Sampling
from minioscar.serve import metrics, server
from minioscar.serve.metrics import Metrics, Occupancy
from minioscar.serve.scheduler import Scheduler

from .asgi import Client
from .test_serve_scheduler import Asked, idle, prompt, running, submit
from .tiny import talker, write_talker

LONG = {"prompt": "the cat", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return talker(write_talker(tmp_path_factory.mktemp("m") / "m", 3, num_hidden_layers=1), "int2")


@contextmanager
def serving(engine: Engine, deadline: float | None, slots: int = 2) -> Iterator[tuple[Client, Scheduler]]:
    plan = server.Plan(slots, 1024, 128, None, "tiny", deadline=deadline)
    plan.check()
    app, scheduler = server.assemble(engine, plan, Sampling())
    scheduler.start()
    try:
        yield Client(app), scheduler
    finally:
        scheduler.close()


def slowly(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 10 ms at least."""
    launch = scheduler.decoder.launch
    monkeypatch.setattr(scheduler.decoder, "launch", lambda slots: (time.sleep(0.01), launch(slots)))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_runs_too_long_ends_with_what_it_has(engine, monkeypatch, stream):
    """As if it had reached max_tokens; both answers of a prompt do, and others go on."""
    with serving(engine, None) as (client, _):
        whole = client.post("/v1/completions", {**LONG, "max_tokens": 600}).json()["choices"][0]["text"]
    with serving(engine, 1.0, slots=3) as (client, scheduler):
        slowly(scheduler, monkeypatch)
        got = client.post("/v1/completions", {**LONG, "n": 2, "stream": stream, "return_token_ids": True})
        assert got.status == 200
        choices = [c for event in got.events() for c in event["choices"]] if stream else got.json()["choices"]
        for index in range(2):
            mine = [choice for choice in choices if choice["index"] == index]
            assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]
            text, tokens = "".join(c["text"] for c in mine), sum(len(c["token_ids"]) for c in mine)
            assert 0 < tokens < 900 and text and whole.startswith(text.rstrip("\ufffd"))
        idle(scheduler)
        assert scheduler.metrics.finished == 2 and not scheduler.metrics.failed
        short = client.post("/v1/completions", {**LONG, "max_tokens": 3}).json()
        assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("never", ["admitted", "read"])
def test_a_prompt_that_waits_too_long_is_told_to_come_back(engine, monkeypatch, stream, never):
    """In a stream by its last event but one, else by 503 and Retry-After, which OpenAI's client obeys."""
    with serving(engine, 0.3) as (client, scheduler):
        with monkeypatch.context() as patch:
            if never == "admitted":
                patch.setattr(scheduler.room, "admits", lambda job: False)
            else:
                patch.setattr(scheduler.pieces, "next", list)
            got = client.post("/v1/completions", {**LONG, "stream": stream})
        error = got.events()[-1]["error"] if stream else got.json()["error"]
        assert error["code"] == "deadline_exceeded" and "was not read within 0.3 seconds" in error["message"]
        assert got.status == (200 if stream else 503) and (stream or got.headers["retry-after"] == "2")
        idle(scheduler)
        assert scheduler.metrics.failed == 1
        assert client.post("/v1/completions", {**LONG, "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("wrong", [0, -1, float("nan")])
def test_a_deadline_is_a_positive_number(wrong):
    with pytest.raises(Exception, match=r"--deadline .* is out of range; it must be a positive number of seconds"):
        server.Plan(1, None, 128, None, "x", deadline=wrong).check()


def test_the_card_has_work_from_a_launch_until_the_last_one_is_read(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    one = Occupancy()
    one.read()
    assert one.seconds == 0
    first = one.launch()
    clock[0] += 1
    second = one.launch()
    clock[0] += 1
    one.read(first)
    assert one.seconds == 0 and one.since
    clock[0] += 1
    one.read(second)
    clock[0] += 5
    assert one.seconds == 3 and not one.since
    one.launch()
    clock[0] += 2
    one.read()
    assert one.seconds == 5
    assert "minioscar_busy_seconds_total 5" in Metrics(occupancy=one).text({})


def test_busy_time_is_within_the_time_of_answers_and_ends_with_them(engine, seed, monkeypatch):
    """Also where a prompt is cancelled between two of its pieces, which nobody waits for."""
    rng = np.random.default_rng(seed)
    with running(engine, slots=2, context=1024, chunk=128) as scheduler:
        one, spent = scheduler.metrics.occupancy, 0.0
        for _ in range(3):
            before, busy = time.monotonic(), one.seconds
            submit(scheduler, Asked(prompt(rng, 200), Options(20, ignore_eos=True)))[0].wait()
            idle(scheduler)
            spent = time.monotonic() - before
            assert 0 < one.seconds - busy <= spent and not one.since
            time.sleep(0.05)
        read, passes = scheduler._pass, []
        long = Asked(prompt(rng, 800), Options(20))

        def counted(pieces):
            read(pieces)
            passes.append(pieces)
            if len(passes) == 2:
                scheduler.cancel([long.job])

        monkeypatch.setattr(scheduler, "_pass", counted)
        submit(scheduler, long)
        while len(passes) < 2:
            time.sleep(0.001)
        idle(scheduler)
        end = time.monotonic() + 5
        while one.since:
            assert time.monotonic() < end
            time.sleep(0.001)
        assert len(passes) == 2 and not long.events
