"""`bench.py serve`: many clients of a real server over HTTP, and what they wait for.

closed   so many clients, each of which asks again as soon as it has its answer; prompts have nothing in common
poisson  clients come at random times, on average 0.7 times as many as the server can answer
prefix   all at once, prompts that begin alike
turns    conversations one after the other, and then their second turns: the prompt and its answer, and a bit more
long     a long prompt beside streams: the longest that a token of theirs waits, against a piece of the prompt alone

Prompts are random token ids and answers as long as they are asked for, so that every run has the same work. Times are
those of the client: from a request to its first token, and between the tokens of an answer. The server is a process of
its own (serve_target.py), which has measured before what its engine does without HTTP: "of chain" is the share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from benchmarks.runs import asked_schemes, model_of, numbers
from benchmarks.serve_target import Target
from benchmarks.start import environment
from minioscar import memory
from minioscar.errors import Failure, UserError
from minioscar.ops.reference import Reference
from minioscar.oscar import WINDOW
from minioscar.pages import check_scheme
from minioscar.serve import server

T = TypeVar("T")
STARTING, PATIENCE = 600.0, 600.0  # seconds until a server is ready, and for one row
ARRIVALS = 0.7  # of what the server can answer
STREAMS = 8  # beside a long prompt
AGENTS = 3


@dataclass(frozen=True)
class Load:
    """Tokens, but for clients and rounds (requests of each client in a row). suffix: what differs behind a prefix, and
    what a second turn adds; sharers: requests with the prefix."""

    clients: Sequence[int]
    prompt: int
    new: int
    rounds: int
    prefix: int
    sharers: int
    suffix: int
    turn: int
    long: int
    chunk: int

    @property
    def context(self) -> int:
        """What all of it needs, rounded up."""
        need = max(self.prompt, self.prefix + self.suffix, self.turn + self.suffix + self.new, self.long) + self.new
        return -(-need // WINDOW) * WINDOW

    def within(self, context: int) -> Load:
        """Long prompts as far as the context goes. Raises UserError where nothing is left of them."""
        room = context - self.suffix - 2 * self.new
        if room < max(self.prompt, WINDOW):
            least = max(self.prompt, WINDOW) + self.suffix + 2 * self.new
            raise UserError(f"--context {context} is too short: with these prompts and answers it takes {least}")
        long = min(self.long, context - self.new)
        return replace(self, prefix=min(self.prefix, room), turn=min(self.turn, room), long=long)


USUAL = Load((1, 8, 48), 1000, 256, 3, 2000, 32, 128, 8000, 30000, 1024)
USUAL_CPU = Load((1, 8), 128, 32, 1, 256, 8, 32, 512, 1024, 128)
QUICK = Load((1, 3), 64, 8, 1, 160, 4, 16, 256, 384, 128)


def add_options(found: argparse.ArgumentParser) -> None:
    found.add_argument("--slots", type=int, help="serve: answers that run at a time (as many as clients, at least 4)")
    found.add_argument("--clients", help="serve: clients at a time, 1 first (1,8,48; on a CPU 1,8)")
    found.add_argument("--prompt-tokens", type=int, help="serve: of a request (1000; on a CPU 128)")
    found.add_argument("--new-tokens", type=int, help="serve: of an answer (256; on a CPU 32)")


def parse(args: argparse.Namespace, ops: Reference) -> tuple[Target, Load]:
    """Raises UserError for whatever cannot work."""
    load = QUICK if args.quick else USUAL if ops.name == "cuda" else USUAL_CPU
    given = {"prompt": args.prompt_tokens, "new": args.new_tokens, "clients": numbers("--clients", args.clients)}
    for name, least in (("prompt", 1), ("new", 2)):
        if given[name] is not None and given[name] < least:
            raise UserError(f"--{name}-tokens {given[name]} is out of range; it must be at least {least}")
    load = replace(load, **{name: value for name, value in given.items() if value})
    if load.clients[0] != 1:
        raise UserError(f"--clients {args.clients} must begin with 1, which the others are held against")
    server.check_installed()
    config, _ = model_of(args)
    scheme = asked_schemes(args.kv or "int2")[-1]
    check_scheme(config, scheme)
    contexts = numbers("--context", args.context, multiple_of=WINDOW)
    if len(contexts) > 1:
        raise UserError(f"--context {args.context}: serve takes one, the tokens of a slot")
    context = contexts[0] if contexts else min(load.context, config.max_context)
    if context > config.max_context:
        raise UserError(f"--context {context} is out of range; {config.limit}")
    slots = max(*load.clients, 4) if args.slots is None else args.slots
    server.Plan(slots, context, load.chunk, None, "bench").check()
    load = load.within(context)
    try:
        weights, piece = ops.weight_bytes(config), min(load.chunk, context)
        memory.check(config, scheme, ops, slots, context, piece, weights, penalties=None)
    except UserError as error:
        raise UserError(str(error).replace("--ctx", "--context")) from None
    which = args.model, args.random_weights, args.weights, scheme.name, ops.name
    return Target(*which, slots, context, load.chunk), load


# --- a client


@dataclass
class Answer:
    """sent, times: seconds, of the request and of every token."""

    prompt: int
    sent: float
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.times[0] - self.sent

    @property
    def between(self) -> np.ndarray:
        return np.diff(self.times)


class Client:
    """One connection, HTTP/1.1, for one request after another. Raises Failure where an answer is not what was asked."""

    def __init__(self, port: int):
        self.port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def complete(self, ids: Sequence[int], new: int, seen: Callable[[Answer], None] = lambda _: None) -> Answer:
        """`new` tokens behind `ids`. seen: is told after each event."""
        asked = {"prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        body = json.dumps({**asked, "stream": True, "return_token_ids": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n"
        answer = Answer(len(ids), time.perf_counter())
        self.writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        status = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0].decode()
        if " 200 " not in status:
            raise Failure(f"the server answered {status}")
        events = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            events += (await self.reader.readexactly(size + 2))[:-2]
            *whole, events = events.split(b"\n\n")
            for event in whole:
                take(event, answer)
            seen(answer)
        await self.reader.readuntil(b"\r\n")
        if len(answer.ids) != new:
            raise Failure(f"an answer has {len(answer.ids)} tokens where {new} were asked for")
        return answer


def take(event: bytes, answer: Answer) -> None:
    """Of a stream of events (html.spec.whatwg.org, server-sent events): data, or a comment. Raises Failure."""
    name, _, data = event.partition(b": ")
    if name != b"data" or data == b"[DONE]":
        return
    value = json.loads(data)
    if "error" in value:
        raise Failure(f"the server's answer is an error: {value['error']['message']}")
    now, (choice,) = time.perf_counter(), value["choices"]
    answer.ids += choice["token_ids"]
    answer.times += [now] * len(choice["token_ids"])


# --- a server


class Server:
    """ready: what it says then. lines: what it says else on stderr."""

    def __init__(self, target: Target, load: Load):
        asked = {"target": asdict(target)}
        asked |= {name: getattr(load, name) for name in ("clients", "prompt", "new", "long")}
        command = [sys.executable, "-m", "benchmarks.serve_target", json.dumps(asked)]
        pipes = dict.fromkeys(("stdin", "stderr"), subprocess.PIPE)  # stdin: it ends when we do
        self.process = subprocess.Popen(command, text=True, env=environment(), **pipes)
        self.lines: list[str] = []
        self.ready: dict[str, Any] = {}
        self.has_news = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stderr:
            if line.startswith("{"):
                self.ready = json.loads(line)
                self.has_news.set()
            elif line.strip():
                self.lines.append(line.strip())
        self.has_news.set()

    def wait(self) -> None:
        """Until it is ready. Raises Failure where it never is."""
        if not self.has_news.wait(STARTING):
            raise Failure(f"the server is not ready after {STARTING:g} seconds")
        if not self.ready:
            raise Failure(f"the server has ended: {self.reason}")

    @property
    def reason(self) -> str:
        return (self.lines or ["it said nothing"])[-1]

    def run(self, work: Awaitable[T]) -> T:
        """Raises Failure where the server breaks off, or takes too long."""

        async def limited() -> T:
            return await asyncio.wait_for(work, PATIENCE)

        try:
            return asyncio.run(limited())
        except asyncio.TimeoutError:
            raise Failure(f"the server has not answered all within {PATIENCE:g} seconds") from None
        except (OSError, EOFError) as error:
            raise Failure(f"the connection to the server broke ({error}); {self.reason}") from None

    def counted(self) -> dict[str, float]:
        """What it counts: name -> number."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ready['port']}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        return {name: json.loads(value) for name, value in re.findall(r"^minioscar_(\w+)_total (\S+)$", text, re.M)}

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def running(target: Target, load: Load) -> Iterator[Server]:
    one = Server(target, load)
    try:
        one.wait()
        yield one
    finally:
        one.end()


# --- what is measured


class Bench:
    """The rows of one server."""

    def __init__(self, target: Target, load: Load, server: Server):
        self.load, self.server, self.port = load, server, server.ready["port"]
        self.vocab, self.slots, self.rng = server.ready["vocab"], target.slots, np.random.default_rng(0)
        self.head = {"model": target.random_weights or target.model, "kv": target.kv}
        self.head |= {"weights": target.weights, "slots": target.slots, "context": target.context}

    def rows(self) -> Iterator[dict]:
        one = best = None
        self.server.run(self.one_by_one([self.ids(self.load.prompt)], 2))  # what HTTP itself does first
        for clients in self.load.clients:
            row = self.closed(clients)
            one = one or row
            row["times_one"] = row["tokens_per_s"] / one["tokens_per_s"]
            best = row if best is None or row["tokens_per_s"] > best["tokens_per_s"] else best
            yield row
        yield self.poisson(best["tokens_per_s"] * ARRIVALS / self.load.new)
        yield self.prefix()
        yield from self.turns()
        if self.slots > 1:
            yield self.long()

    def ids(self, tokens: int) -> list[int]:
        return self.rng.integers(0, self.vocab, tokens).tolist()

    async def one_by_one(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        async with Client(self.port) as client:
            return [await client.complete(ids, new) for ids in prompts]

    async def together(self, clients: Sequence[Sequence[Sequence[int]]], new: int) -> list[Answer]:
        """The prompts of each client."""
        return sum(await asyncio.gather(*(self.one_by_one(prompts, new) for prompts in clients)), [])

    def row(self, kind: str, clients: int | None, work: Awaitable[list[Answer]], **more: Any) -> dict:
        before = self.server.counted()
        answers = self.server.run(work)
        counted = {name: value - before[name] for name, value in self.server.counted().items()}
        seconds = max(answer.times[-1] for answer in answers) - min(answer.sent for answer in answers)
        first, between = [answer.first for answer in answers], np.concatenate([answer.between for answer in answers])
        row = {**self.head, "load": kind, "clients": clients, "requests": len(answers), "seconds": seconds}
        row |= {"prompt_tokens": sum(answer.prompt for answer in answers), "new_tokens": self.load.new}
        for name, times in (("first", first), ("between", between)):
            row |= {f"{name}_p{n}_ms": float(np.percentile(times, n)) * 1e3 for n in (50, 99)}
        row |= {"tokens_per_s": sum(len(answer.ids) for answer in answers) / seconds, "times_one": None}
        row |= {"of_chain": None, "hit_tokens": counted["cached_tokens"], "read_tokens": counted["prompt_tokens"]}
        row["idle_share"] = 1 - counted["busy_seconds"] / seconds
        return row | more

    def closed(self, clients: int) -> dict:
        load, chain = self.load, self.server.ready["chain"][str(clients)]
        prompts = [[self.ids(load.prompt) for _ in range(load.rounds)] for _ in range(clients)]
        row = self.row("closed", clients, self.together(prompts, load.new), chain_tokens_per_s=chain)
        row["of_chain"] = row["tokens_per_s"] / chain
        return row | ({"one_slot_tokens_per_s": self.server.ready["alone"]} if clients == 1 else {})

    def poisson(self, rate: float) -> dict:
        """rate: requests a second."""
        load, count = self.load, 2 * max(self.load.clients)
        starts = np.cumsum(self.rng.exponential(1 / rate, count))
        prompts = [self.ids(load.prompt) for _ in starts]

        async def later(start: float, ids: list[int]) -> list[Answer]:
            await asyncio.sleep(start)
            return await self.one_by_one([ids], load.new)

        async def work() -> list[Answer]:
            return sum(await asyncio.gather(*map(later, starts, prompts)), [])

        return self.row("poisson", None, work(), requests_per_s=rate)

    def prefix(self) -> dict:
        load, shared = self.load, self.ids(self.load.prefix)
        prompts = [[shared + self.ids(load.suffix)] for _ in range(load.sharers)]
        return self.row("prefix", load.sharers, self.together(prompts, load.new), shared_tokens=load.prefix)

    def turns(self) -> Iterator[dict]:
        load, prompts, answers = self.load, [self.ids(self.load.turn) for _ in range(min(AGENTS, self.slots))], []

        async def work(asked: list[list[int]]) -> list[Answer]:
            answers[:] = await self.one_by_one(asked, load.new)
            return answers

        first = self.row("first turn", 1, work(prompts))
        prompts = [ids + answer.ids + self.ids(load.suffix) for ids, answer in zip(prompts, answers, strict=True)]
        second = self.row("second turn", 1, work(prompts))
        yield first
        yield second | {"first_share": second["first_p50_ms"] / first["first_p50_ms"]}

    def long(self) -> dict:
        load, streams = self.load, min(STREAMS, self.slots - 1)
        lasting = load.new + 4 * (2 + -(-load.long // load.chunk))  # they are not to end before it is read
        new = min(lasting, load.long + load.new - load.prompt)
        prompts, longer = [self.ids(load.prompt) for _ in range(streams)], self.ids(load.long)
        waits: list[float] = []

        async def work() -> list[Answer]:
            begun, running = asyncio.Event(), dict[int, int]()

            def seen(answer: Answer) -> None:
                running[id(answer)] = len(answer.ids)
                if len(running) == streams and min(running.values()) > 1:
                    begun.set()

            async def stream(ids: list[int]) -> Answer:
                async with Client(self.port) as client:
                    return await client.complete(ids, new, seen)

            tasks = [asyncio.create_task(stream(ids)) for ids in prompts]
            await asyncio.wait([asyncio.create_task(begun.wait()), *tasks], return_when=asyncio.FIRST_COMPLETED)
            (last,) = await self.one_by_one([longer], load.new)
            answers = await asyncio.gather(*tasks)
            waits.extend(wait for answer in answers for wait in waits_within(answer, last.sent, last.times[0]))
            return [last, *answers]

        row = self.row("long", streams, work(), long_tokens=load.long, stream_tokens=new)
        piece = self.server.ready["piece_s"]
        row |= {"piece_ms": piece * 1e3, "waits": len(waits)}
        return row | ({"longest_wait_ms": max(waits) * 1e3, "times_a_piece": max(waits) / piece} if waits else {})


def waits_within(answer: Answer, start: float, end: float) -> list[float]:
    """Times between two tokens that overlap start ... end."""
    pairs = zip(answer.times, answer.times[1:], strict=False)
    return [after - before for before, after in pairs if after > start and before < end]


def measure(target: Target, load: Load) -> Iterator[dict]:
    with running(target, load) as one:
        yield from Bench(target, load, one).rows()
