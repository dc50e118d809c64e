"""A Ray cluster of this machine that serves a model as users start it, and what is asked of it: an agent's turns, and
that a replica which is killed takes nothing with it but what it was answering.

    python -m tests.cluster --json docs/results/ray.json       SmolLM2 on this machine; `make soak` runs it, too
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from .serving import Server, server


class Cluster(Server):
    """replicas: name of each that answers, which ends in the number of its process."""

    def replicas(self) -> list[str]:
        return sorted(set(re.findall(r'answers_total\{replica="(.*?)"', self.get("/metrics"))))

    def metric(self, name: str) -> float:
        return sum(map(float, re.findall(rf"^minioscar_{name}\{{.*\}} (\S+)$", self.get("/metrics"), re.M)))

    @property
    def client(self) -> openai.OpenAI:
        return client(self)


@contextmanager
def cluster(*args: str) -> Iterator[Cluster]:
    with server(*args, kind=Cluster, seconds=300) as one:
        yield one
        assert one.end() == 0, one.lines


def client(one: Server, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=one.url, api_key="none", max_retries=retries, timeout=300)


# --- an agent's turns


@dataclass(frozen=True)
class Replay:
    """Tokens, but for agents and turns. system: what all prompts begin with; task: what an agent's begin with, then;
    result: what a tool answers to a call. lasting: of an answer in the middle of which a replica is killed."""

    agents: int
    turns: int
    system: int
    task: int
    new: int
    result: int
    lasting: int

    @property
    def context(self) -> int:
        return self.system + self.task + self.turns * (self.new + self.result)


def replayed(one: Server, load: Replay, seed: int, vocab: int) -> dict[str, int]:
    """All agents at a time, each of which asks again as soon as it has its answer; how much of their prompts was in a
    cache."""
    rng, asks = random.Random(seed), client(one)
    ids = lambda size: [rng.randrange(4, vocab) for _ in range(size)]  # noqa: E731
    system = ids(load.system)
    scripts = [[ids(load.task), *(ids(load.result) for _ in range(load.turns - 1))] for _ in range(load.agents)]

    def agent(script: Sequence[list[int]]) -> tuple[int, int]:
        held, read, cached = list(system), 0, 0
        for more in script:
            held += more
            how = {"ignore_eos": True, "return_token_ids": True}
            got = asks.completions.create(model="x", prompt=held, max_tokens=load.new, temperature=0, extra_body=how)
            read, cached = read + len(held), cached + got.usage.prompt_tokens_details.cached_tokens
            held += got.choices[0].model_extra["token_ids"]
        return read, cached

    with ThreadPoolExecutor(load.agents) as threads:
        found = list(threads.map(agent, scripts))
    return {"prompt_tokens": sum(read for read, _ in found), "cached_tokens": sum(cached for _, cached in found)}


# --- one that is killed


class Stream(threading.Thread):
    """ended: "whole", "error" (an event of the stream), "refused" (before its first byte), or how it broke off."""

    def __init__(self, asks: openai.OpenAI, number: int, new: int):
        super().__init__()
        self.asks, self.number, self.new, self.ended, self.has_begun = asks, number, new, "", threading.Event()
        self.chunks = 0
        self.start()

    def run(self) -> None:
        prompt = [4 + (self.number * 37 + i) % 200 for i in range(20)]
        how = {"prompt": prompt, "max_tokens": self.new, "extra_body": {"ignore_eos": True}, "stream": True}
        try:
            reason = None
            for chunk in self.asks.completions.create(model="x", **how):
                self.has_begun.set()
                self.chunks += 1
                reason = chunk.choices[0].finish_reason or reason
            self.ended = "whole" if reason == "length" else f"ended as {reason}"
        except openai.APIStatusError as error:
            self.ended = "refused" if error.status_code == 503 else repr(error)
        except openai.APIConnectionError as error:
            self.ended = repr(error)
        except openai.APIError:
            self.ended = "error"
        self.has_begun.set()


def killed(one: Cluster, streams: int, new: int, seconds: float = 300) -> dict[str, Any]:
    """Streams run in all replicas; one is killed; others are asked until there are as many again."""
    running = [Stream(client(one), number, new) for number in range(streams)]
    for stream in running:
        assert stream.has_begun.wait(seconds)
    before = one.replicas()
    victim = max(before, key=lambda name: _used(one, name))
    begun = time.monotonic()
    os.kill(int(victim.rpartition("-")[2]), signal.SIGKILL)
    later, back = [], None
    while back is None or len(later) < streams:
        later.append(Stream(client(one, retries=2), 100 + len(later), 8))
        later[-1].join(seconds)
        names = one.replicas()
        if back is None and len(names) == len(before) and victim not in names:
            back = time.monotonic() - begun
        assert time.monotonic() - begun < seconds, (names, before)
        time.sleep(0.1)
    for stream in running:
        stream.join(seconds)
    return {
        "streams": streams, "ended": _counted(running), "later": len(later), "later_ended": _counted(later),
        "back_after_s": round(back, 1),
    }  # fmt: skip


def _used(one: Cluster, name: str) -> int:
    return sum(row["is_processing"] for row in json.loads(one.get("/slots")) if row["replica"] == name)


def _counted(streams: Sequence[Stream]) -> dict[str, int]:
    ends = [stream.ended for stream in streams]
    return {end: ends.count(end) for end in sorted(set(ends))}


def left(one: Cluster, new: int, seconds: float = 60) -> float:
    """Seconds after a client has closed its stream until no row runs any more."""
    how = {"prompt": [5] * 20, "max_tokens": new, "extra_body": {"ignore_eos": True}}
    stream = client(one).completions.create(model="x", stream=True, **how)
    next(iter(stream))
    before, begun = one.metric("cancelled_total"), time.monotonic()
    stream.close()
    while one.metric("slots_used") or one.metric("cancelled_total") == before:
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)
    return time.monotonic() - begun


def passing(one: Cluster, streams: int, new: int) -> dict[str, Any]:
    """CPU time that Ray's proxy and the doors take for each chunk that they pass on."""
    before = {name: _cpu_seconds(name) for name in PASSING}
    running = [Stream(client(one), number, new) for number in range(streams)]
    for stream in running:
        stream.join()
        assert stream.ended == "whole", stream.ended
    chunks = sum(stream.chunks for stream in running)
    took = {PASSING[name]: round((_cpu_seconds(name) - seconds) / chunks * 1e6) for name, seconds in before.items()}
    return {"streams": streams, "chunks": chunks, "cpu_us_per_chunk": took}


def _cpu_seconds(title: str) -> float:
    """Of the processes whose title begins like this (proc(5): utime and stime of stat)."""
    ticks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(title.encode()):
                ticks += sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13]))
        except OSError:  # it has ended
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def grown(one: Cluster, clients: int, seconds: float = 300) -> float:
    """Seconds of a load for two until a second replica answers."""
    ended, begun = threading.Event(), time.monotonic()

    def work(number: int) -> None:
        while not ended.is_set():
            Stream(client(one), number, 64).join(seconds)

    with ThreadPoolExecutor(clients) as threads:
        for number in range(clients):
            threads.submit(work, number)
        try:
            while len(one.replicas()) < 2:
                assert time.monotonic() - begun < seconds
                time.sleep(0.5)
        finally:
            ended.set()
    return time.monotonic() - begun


# --- figures

PASSING = {"ray::ProxyActor": "proxy", "ray::ServeReplica:minioscar:door": "door"}
SMOLLM2 = Replay(agents=4, turns=4, system=384, task=128, new=16, result=64, lasting=100)


def measured(model: str, load: Replay, vocab: int, seed: int) -> dict[str, Any]:
    """The same turns of a single server with two slots for each agent, and of two replicas with half as many slots
    each; then one of them is killed."""
    common = "--ctx", str(-(-load.context // 128) * 128), "--chunk", "128"
    report: dict[str, Any] = {"model": model, "load": vars(load)}
    with server(model, "--slots", str(2 * load.agents), *common) as one:
        report["single"] = {"slots": 2 * load.agents} | timed(one, load, seed, vocab)
    begun = time.monotonic()
    with cluster(model, "--slots", str(load.agents), *common, "--replicas", "2") as many:
        report["cluster"] = {"replicas": 2, "slots": load.agents, "ready_s": round(time.monotonic() - begun, 1)}
        report["cluster"] |= timed(many, load, seed, vocab) | {"left_s": round(left(many, load.lasting), 2)}
        report["passing"] = passing(many, load.agents, load.lasting)
        report["killed"] = killed(many, load.agents, load.lasting)
    report["hits_of_single"] = report["cluster"]["hit_rate"] / report["single"]["hit_rate"]
    return report


def timed(one: Server, load: Replay, seed: int, vocab: int) -> dict[str, Any]:
    begun = time.monotonic()
    found = replayed(one, load, seed, vocab)
    seconds = time.monotonic() - begun
    return found | {"hit_rate": found["cached_tokens"] / found["prompt_tokens"], "seconds": round(seconds, 1)}


def figures(seed: int, model: str = "smollm2-135m") -> dict[str, Any]:
    import ray

    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "ray": ray.__version__}
    meta = machine | {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    return {"meta": meta, **measured(model, SMOLLM2, 49152, seed), "grown": measured_growth(model, 2)}


def measured_growth(model: str, slots: int) -> dict[str, Any]:
    with cluster(model, "--slots", str(slots), "--ctx", "256", "--chunk", "128", "--replicas", "1:2") as one:
        return {"slots": slots, "clients": 3 * slots, "second_after_s": round(grown(one, 3 * slots), 1)}


def passed(report: dict[str, Any]) -> bool:
    killed, later = report["killed"]["ended"], report["killed"]["later_ended"]
    is_whole = set(killed) == {"whole", "error"} and set(later) == {"whole"}
    return is_whole and report["hits_of_single"] >= 0.8


def main() -> int:
    parser = argparse.ArgumentParser(description="a Ray cluster of this machine")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="F")
    args = parser.parse_args()
    report = figures(args.seed)
    text = json.dumps(report, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)
    return 0 if passed(report) else 1


if __name__ == "__main__":
    sys.exit(main())
