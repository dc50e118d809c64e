"""Copies of the server without Ray: which of them a prompt goes to, and what a door makes of what a copy says."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial

import numpy as np
import pytest

from minioscar import load
from minioscar.app import cli, serving
from minioscar.errors import Failure, UserError
from minioscar.sampling import Sampling
from minioscar.serve import server
from minioscar.serve.cluster import merged
from minioscar.serve.cluster.door import Door
from minioscar.serve.cluster.names import BLOCK, Chain, names, sizes
from minioscar.serve.cluster.places import CHOICES, Places, sizes_of
from minioscar.serve.cluster.replica import Asked, Message, Replica
from minioscar.serve.http import MAX_BODY

from .asgi import Client
from .patience import PATIENCE
from .tiny import write_talker

HELLO = [{"role": "user", "content": "the cat"}]


def ids(seed: int, blocks: float) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, int(blocks * BLOCK)).tolist()


# --- names


def test_beginnings_have_equal_names_as_far_as_the_ids_are_equal():
    one, other = ids(1, 20.5), ids(1, 20.5)
    assert names(one) == names(other) and len(names(one)) == len(sizes(20)) == len(set(names(one)))
    other[12 * BLOCK] += 1
    same = sum(size <= 12 for size in sizes(20))
    assert names(one)[:same] == names(other)[:same] and not set(names(one)[same:]) & set(names(other)[same:])
    other[0] += 1
    assert not set(names(one)) & set(names(other))
    assert names(one[BLOCK:])[0] != names(one)[1]  # a block is named with what is before it
    assert names(one[: BLOCK - 1]) == []


def test_beginnings_that_have_names_grow_by_an_eighth():
    found = sizes(1000)
    assert found[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] and len(found) < 55
    assert all(b - a <= max(a / 8, 1) for a, b in zip(found, found[1:], strict=False)) and found[-1] > 1000 * 8 / 9 - 1
    assert all(sizes_of(sizes(blocks)) == sizes(blocks) for blocks in range(200))


def test_a_chain_that_goes_on_or_begins_anew_has_the_names_of_its_ids():
    chain, rng = Chain(), np.random.default_rng(0)
    held = ids(3, 9)
    for _ in range(20):
        cut = int(rng.integers(0, len(held)))
        held = held[:cut] + ids(int(rng.integers(1000)), rng.uniform(0, 6))
        assert chain.names(held) == names(held)


# --- places


class Fleet:
    """So many replicas with 4 slots, whose running answers the test says."""

    def __init__(self, count: int):
        self.running = {f"r{i}": 0 for i in range(count)}
        self.places = Places(4, self.running.__getitem__)
        self.places.set(list(self.running))

    def choose(self, prompt: Sequence[int]) -> list[str]:
        return self.places.choose(names(prompt), sum(self.running.values()) / len(self.running))


def test_a_prompt_goes_where_most_of_its_beginning_is():
    fleet = Fleet(8)
    fleet.places.send("r5", names(ids(1, 3)), 0.0)
    fleet.places.send("r2", names(ids(1, 6)), 0.0)
    assert fleet.choose(ids(1, 9))[:2] == ["r2", "r5"]
    fleet.places.report("r2", names(ids(1, 2)), 1.0)  # the rest was evicted
    assert fleet.choose(ids(1, 9))[:2] == ["r5", "r2"]


def test_what_was_sent_before_as_many_others_as_there_are_slots_is_gone():
    fleet = Fleet(2)
    for turn in (3, 4, 5):  # one conversation, one slot
        fleet.places.send("r1", names(ids(1, turn)), 0.0)
    for other in (2, 3, 4):
        fleet.places.send("r1", names(ids(other, 3)), 0.0)
    assert fleet.places.held(names(ids(1, 6))) == {"r1": 5}
    fleet.places.send("r1", names(ids(5, 3)), 0.0)
    assert fleet.places.held(names(ids(1, 6))) == {} and fleet.places.held(names(ids(2, 6))) == {"r1": 3}


def test_a_replica_without_a_free_slot_is_passed_over_and_so_is_one_where_too_much_runs():
    fleet = Fleet(4)
    fleet.places.send("r1", names(ids(1, 2)), 0.0)
    assert fleet.choose(ids(1, 2))[0] == "r1"
    fleet.running["r1"] = 1  # costs more than two blocks
    assert fleet.choose(ids(1, 2))[0] != "r1"
    fleet.places.send("r1", names(ids(1, 40)), 0.0)
    fleet.running["r1"] = 3
    assert fleet.choose(ids(1, 40))[0] == "r1"
    fleet.running["r1"] = 4
    assert fleet.choose(ids(1, 40))[0] != "r1"
    fleet.running.update(dict.fromkeys(fleet.running, 4))
    assert fleet.choose(ids(1, 40))[0] == "r1"  # all wait: then where it is


def test_doors_that_know_nothing_send_equal_beginnings_to_the_same_replica():
    one, other = Fleet(50), Fleet(50)
    firsts = [one.choose(ids(seed, 3))[0] for seed in range(200)]
    assert firsts == [other.choose(ids(seed, 3) + ids(seed + 1000, 2))[0] for seed in range(200)]
    assert len(set(firsts)) > 40
    gone = firsts[0]
    other.places.set([name for name in other.running if name != gone])
    moved = [a != other.choose(ids(seed, 3))[0] for seed, a in enumerate(firsts)]
    assert moved == [a == gone for a in firsts]


def test_no_replica_of_the_ring_has_much_more_than_the_mean():
    fleet = Fleet(10)
    for seed in range(200):
        fleet.running[fleet.choose(ids(seed % 5, 2))[0]] += 1
    assert max(fleet.running.values()) <= 1.25 * 20 + 2


def test_a_prompt_without_a_whole_block_goes_to_the_least_of_some():
    fleet = Fleet(10)
    for _ in range(100):
        fleet.running[fleet.choose([1, 2, 3])[0]] += 1
    assert max(fleet.running.values()) <= 13
    assert len(fleet.choose([])) == CHOICES and len(Fleet(2).choose([])) == 2


def test_nothing_is_kept_of_what_is_gone():
    fleet, rng = Fleet(5), np.random.default_rng(0)
    for step in range(300):
        name, prompt = f"r{rng.integers(5)}", names(ids(int(rng.integers(9)), rng.uniform(0, 12)))
        if rng.random() < 0.2:
            fleet.places.report(name, prompt, step - 10.0)
        else:
            fleet.places.send(name, prompt, float(step))
    known = {name for found in fleet.places.holders.values() for name in found}
    assert known == set(fleet.running) and all(len(sent) <= 4 for sent in fleet.places.sent.values())
    fleet.places.set(["r9"])
    assert fleet.places.holders == {} and {name for _, name in fleet.places.ring} == {"r9"}
    fleet.places.send("r1", names(ids(1, 3)), 0.0)  # it has died meanwhile
    fleet.places.report("r1", names(ids(1, 3)), 0.0)
    assert fleet.places.holders == {}


# --- the command


@pytest.mark.parametrize(
    ("given", "why"),
    [("0", "'0' must be a number"), ("3:2", "the smaller first"), ("x", "'x'"), ("1:", "'1:'"), ("-1", "'-1'")],
)
def test_wrong_numbers_of_replicas_are_one_line(folder, capsys, given, why):
    assert cli.main(["serve", folder, f"--replicas={given}", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1


def test_without_ray_it_is_said_how_to_get_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["serve", folder, "--replicas", "2", "--port", "0"]) == 2
    assert "pip install 'minioscar[ray]'" in capsys.readouterr().err


def test_more_replicas_than_the_cluster_has_room_for_are_refused():
    serving.check_room({"CPU": 4.0, "GPU": 2.0}, 2, 1)
    with pytest.raises(UserError, match="--replicas 3 takes 3 GPUs and the cluster has 2"):
        serving.check_room({"CPU": 4.0, "GPU": 2.0}, 3, 1)
    with pytest.raises(UserError, match="takes 5 CPUs"):
        serving.check_room({"CPU": 4.0}, 5, 0)


# --- doors and replicas


class Near:
    """Replicas in this process, asked in turns. breaks: an error after so many calls back of each answer."""

    def __init__(self, replicas: Sequence[Replica]):
        self.replicas, self.asked, self.breaks = replicas, [], None

    def ask(self, asked: Asked) -> NearCall:
        self.asked.append(asked)
        return NearCall(self.replicas[len(self.asked) % len(self.replicas)], asked, self.breaks)

    async def every(self, asked: Asked) -> list[tuple[str, bytes]]:
        return [(f"r{i}", (await one.whole(asked))[1]) for i, one in enumerate(self.replicas)]


class NearCall:
    """As Ray has it: what is cancelled is the task that runs the answer."""

    def __init__(self, replica: Replica, asked: Asked, breaks: int | None):
        self.came: asyncio.Queue = asyncio.Queue()
        self.task = asyncio.create_task(self._run(replica, asked))
        self.breaks = breaks

    async def _run(self, replica: Replica, asked: Asked) -> None:
        try:
            async for ready in replica.answer(asked):
                self.came.put_nowait(ready)
        finally:
            self.came.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[list[Message]]:
        count = 0
        while self.breaks is None or count < self.breaks:
            if (ready := await self.came.get()) is None:
                return
            yield ready
            count += 1
        self.cancel()
        raise ConnectionError("the other side is gone")

    def cancel(self) -> None:
        self.task.cancel()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    made = write_talker(tmp_path_factory.mktemp("m") / "tiny", 3, num_hidden_layers=1, max_position_embeddings=4096)
    return str(made)


@pytest.fixture(scope="module")
def replicas(folder) -> Iterator[list[Replica]]:
    plan = server.Plan(2, 1024, 128, None, "tiny", key="sesame")
    made = [Replica(partial(server.assemble, load(folder, device="cpu"), plan, Sampling(0.0))) for _ in range(2)]
    yield made
    for one in made:
        one.scheduler.close()


@pytest.fixture
def near(replicas) -> Near:
    return Near(replicas)


@pytest.fixture
def client(near, replicas) -> Client:
    return Client(Door(near, replicas[0].app.service, "sesame"))


KEY = {"authorization": "Bearer sesame"}


def asked(**more) -> dict:
    return {"messages": HELLO, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}


def test_an_answer_through_a_door_is_the_servers(client, replicas):
    alone = Client(replicas[0].app)
    for stream in (False, True):
        one, other = (at.post("/v1/chat/completions", asked(stream=stream), headers=KEY) for at in (client, alone))
        assert one.status == other.status == 200 and one.headers["content-type"] == other.headers["content-type"]
        said, want = ([event["choices"] for event in got.events()] if stream else got.json() for got in (one, other))
        assert said == want if stream else said["choices"] == want["choices"]
    assert client.get("/v1/models", **KEY).json() == alone.get("/v1/models", **KEY).json()
    assert client.get("/nowhere", **KEY).status == 404 and client.get("/health").json() == {"status": "ok"}
    wrong = client.post("/v1/chat/completions", {"messages": 7}, headers=KEY)
    assert wrong.status == 400 and wrong.json()["error"]["param"] == "messages"


def test_a_prompt_is_named_as_the_replica_names_what_it_holds(client, near, replicas):
    prompt = ids(7, 3.5)
    prompt = [token % 300 for token in prompt]
    client.post("/v1/completions", {"prompt": prompt, "max_tokens": 2}, headers=KEY)
    replica = near.replicas[len(near.asked) % 2]
    assert near.asked[-1].names == tuple(names(prompt)) and len(names(prompt)) == 3
    assert set(names(prompt)) <= set(replica.record_routing_stats()["names"])
    text = [{"role": "user", "content": "the cat sat on the mat " * 60}]
    client.post("/v1/chat/completions", asked(messages=text), headers=KEY)
    assert near.asked[-1].names and set(near.asked[-1].names) <= set(
        near.replicas[len(near.asked) % 2].record_routing_stats()["names"]
    )
    client.post("/v1/chat/completions", asked(messages=text))  # nobody reads a prompt for whoever has no key
    client.post("/v1/chat/completions", b"{", headers=KEY)
    assert near.asked[-1].names == near.asked[-2].names == ()


def test_a_replica_that_ends_in_a_stream_is_its_last_event_and_before_it_a_503(client, near):
    near.breaks = 1
    got = client.post("/v1/chat/completions", asked(stream=True, max_tokens=500), headers=KEY)
    assert got.status == 200 and got.is_whole
    *_, last = got.events()
    assert last["error"]["code"] == "overloaded" and "ask again" in last["error"]["message"]
    near.breaks = 0
    for stream in (True, False):
        got = client.post("/v1/chat/completions", asked(stream=stream), headers=KEY)
        assert got.status == 503 and got.headers["retry-after"] == "1" and got.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_row_in_the_replica(client, replicas, stream):
    before = sum(one.scheduler.metrics.cancelled for one in replicas)
    body = asked(stream=stream, max_tokens=900)
    client.post("/v1/chat/completions", body, headers=KEY, leaves=lambda got: not stream or len(got.pieces) > 1)
    end = time.monotonic() + PATIENCE
    while sum(one.scheduler.metrics.cancelled for one in replicas) == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert all(row.job is None or row.job.is_cancelled for one in replicas for row in one.scheduler.rows)


def test_what_all_replicas_say_of_themselves_is_one_answer(client, replicas):
    lines = client.get("/metrics", **KEY).body.decode().splitlines()
    assert len([line for line in lines if line.startswith("# TYPE minioscar_requests_total")]) == 1
    assert [line.split("{")[1].split("}")[0] for line in lines if line.startswith("minioscar_requests_total")] == [
        'replica="r0"', 'replica="r1"'
    ]  # fmt: skip
    assert 'minioscar_step_seconds_bucket{replica="r1",le="+Inf"}' in "\n".join(lines)
    assert [row["replica"] for row in client.get("/slots", **KEY).json()] == ["r0", "r0", "r1", "r1"]
    status = client.get("/status", **KEY).json()
    assert status["slots"] == 4 and status["replicas"] == 2 and status["model"] == "tiny"
    assert client.get("/metrics").status == client.get("/slots").status == 401


def test_a_body_that_is_too_large_is_refused_at_the_door(client, near):
    before = len(near.asked)
    got = client.post("/v1/chat/completions", b" " * (MAX_BODY + 1), headers=KEY, parts=4)
    assert got.status == 413 and len(near.asked) == before


def test_nothing_answers_where_there_is_no_replica(replicas):
    client = Client(Door(Near([]), replicas[0].app.service, None))
    assert client.get("/metrics").status == 503


def test_a_replica_whose_engine_has_failed_says_so_to_ray(replicas, monkeypatch):
    replicas[0].check_health()
    monkeypatch.setattr(replicas[0].scheduler, "dead", "the engine has failed")
    with pytest.raises(Failure, match="the engine has failed"):
        replicas[0].check_health()


def test_a_fleet_is_well_while_one_of_it_is(client, replicas, monkeypatch):
    monkeypatch.setattr(replicas[0].scheduler, "dead", "the engine has failed")
    assert client.get("/health").status == 200
    monkeypatch.setattr(replicas[1].scheduler, "dead", "the engine has failed")
    assert client.get("/health").status == 503 and client.get("/v1/models").status == 401


def test_what_comes_while_a_call_is_paced_goes_together(replicas):
    body = json.dumps(asked(stream=True, max_tokens=400)).encode()
    headers = ((b"content-type", b"application/json"), (b"authorization", b"Bearer sesame"))

    async def calls() -> list[int]:
        one = Asked("POST", "/v1/chat/completions", headers, body)
        return [len(ready) async for ready in replicas[0].answer(one)]

    counts = asyncio.run(calls())
    assert sum(counts) > 200 and len(counts) < sum(counts) / 2


def test_metrics_of_one_name_stand_together():
    body = b"# HELP a_total x\n# TYPE a_total counter\na_total 1\n# HELP h y\n# TYPE h histogram\nh_sum 2.0\n"
    text = merged.metrics([("p", body), ("q", body)])[0].decode()
    assert text.splitlines() == [
        "# HELP a_total x", "# TYPE a_total counter", 'a_total{replica="p"} 1', 'a_total{replica="q"} 1',
        "# HELP h y", "# TYPE h histogram", 'h_sum{replica="p"} 2.0', 'h_sum{replica="q"} 2.0',
    ]  # fmt: skip
