"""A simulation of many servers: prompts that begin alike, which replica each goes to, and what its cache holds.

A replica does in a round what serve/scheduler.py does: one decode step of all running answers, and one piece of the
prompts that are being read, in their order. Between two events (a prompt comes, has been read, or its answer ends) all
rounds are alike, so they are taken at once, as a flow: reading m tokens takes m / read_tokens_s and m / chunk steps.
A prefix is in a replica's pool of blocks or is not; the one that was used least recently goes first, those in use stay.
Which replica, the product's own serve/cluster/places.py says; every door knows what it sent and what was reported.
Not simulated: the time of the network and of Python, and rounds that are short for want of a whole piece.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np

from minioscar.serve.cluster.names import BLOCK, sizes
from minioscar.serve.cluster.places import Places, place

INSTANT = 1e-9  # seconds: what is so near has come
PERIOD = 5.0  # seconds between two reports of a replica, as serve/cluster/deploy.py has it


@dataclass(frozen=True)
class Card:
    """A replica. slots: answers at a time. blocks: of 128 tokens in its pool. step_s: of a decode step without any
    cache, and token_s what each token that a row holds adds; read_tokens_s: prompts; chunk: tokens of a piece."""

    slots: int
    blocks: int
    step_s: float
    token_s: float
    read_tokens_s: float
    chunk: int


@dataclass(frozen=True)
class Load:
    """Tokens, but for prefixes: how many there are, of which number k is asked for as often as 1 / k**zipf says. own:
    behind a prefix; new: of an answer, on average (exponential)."""

    prefixes: int
    zipf: float
    prefix: int
    own: int
    new: float


@dataclass
class Request:
    prefix: int
    new: float  # steps of its answer
    came: float
    cached: int = 0
    begun: float = 0.0
    ended: float = 0.0
    replica: int = 0


@dataclass
class Replica:
    """clock: when it was last brought up to date; steps: done by then. ends: (step, number, request) of running
    answers; reading: with the tokens that are left."""

    card: Card
    load: Load
    clock: float = 0.0
    steps: float = 0.0
    waiting: deque[Request] = field(default_factory=deque)
    reading: deque[tuple[Request, float]] = field(default_factory=deque)
    ends: list[tuple[float, int, Request]] = field(default_factory=list)
    pool: OrderedDict[int, int] = field(default_factory=OrderedDict)  # prefix -> requests that use it
    private: int = 0  # blocks of answers and what is before them
    count: int = 0

    def __post_init__(self) -> None:
        self.per_prefix = -(-self.load.prefix // BLOCK)
        self.holds = self.load.prefix + self.load.own + self.load.new / 2  # tokens of a running row, on average

    @property
    def running(self) -> int:
        """As a door counts: also those that wait."""
        return len(self.waiting) + len(self.reading) + len(self.ends)

    def _rates(self) -> tuple[float, float]:
        """Steps and read tokens in a second."""
        step = self.card.step_s + self.card.token_s * self.holds * len(self.ends) if self.ends else 0.0
        if not self.reading:
            return (1 / step if step else 0.0), 0.0
        read = 1 / (1 / self.card.read_tokens_s + step / self.card.chunk)
        return (read / self.card.chunk if step else 0.0), read

    def next(self) -> float:
        """When something ends."""
        steps, read = self._rates()
        times = [(self.ends[0][0] - self.steps) / steps] if self.ends else []
        times += [self.reading[0][1] / read] if self.reading else []
        return self.clock + max(min(times), 0.0) if times else float("inf")

    def advance(self, now: float) -> None:
        steps, read = self._rates()
        passed, self.clock = now - self.clock, now
        self.steps += steps * passed
        if self.reading:
            request, left = self.reading[0]
            self.reading[0] = request, left - read * passed

    def finish(self, now: float) -> list[Request]:
        """At the time of `next`: what has been read begins; what has ended is returned."""
        self.advance(now)
        steps, read = self._rates()
        reached = self.steps + steps * INSTANT
        if self.reading and self.reading[0][1] <= read * INSTANT:
            request, _ = self.reading.popleft()
            request.begun = now
            self.count += 1
            heapq.heappush(self.ends, (self.steps + request.new, self.count, request))
        done = []
        while self.ends and self.ends[0][0] <= reached:
            done.append(heapq.heappop(self.ends)[2])
            done[-1].ended = now
            self.pool[done[-1].prefix] -= 1
            self.private -= self._blocks(done[-1])
        self._admit()
        return done

    def take(self, request: Request, now: float) -> None:
        self.advance(now)
        self.waiting.append(request)
        self._admit()

    def _blocks(self, request: Request) -> int:
        return -(-int(self.load.own + request.new) // BLOCK)

    def _admit(self) -> None:
        while self.waiting and len(self.reading) + len(self.ends) < self.card.slots:
            request = self.waiting[0]
            is_held = request.prefix in self.pool
            if not self._room(self._blocks(request) + (0 if is_held else self.per_prefix), request.prefix):
                return
            self.waiting.popleft()
            self.private += self._blocks(request)
            self.pool[request.prefix] = self.pool.get(request.prefix, 0) + 1
            self.pool.move_to_end(request.prefix)
            request.cached = self.load.prefix if is_held else 0
            self.reading.append((request, float(self.load.own + self.load.prefix - request.cached)))

    def _room(self, blocks: int, wanted: int) -> bool:
        """Frees prefixes until there are so many blocks, but not the one that is wanted."""
        free = self.card.blocks - self.private - len(self.pool) * self.per_prefix
        idle = iter([prefix for prefix, users in self.pool.items() if not users and prefix != wanted])
        while free < blocks and (oldest := next(idle, None)) is not None:
            del self.pool[oldest]
            free += self.per_prefix
        return free >= blocks


class Fleet:
    """route: "known" (where the prefix is), "hash" (the ring alone) or "load" (the least of three at random)."""

    def __init__(self, card: Card, load: Load, count: int, route: str, seed: int, doors: int = 4):
        self.load, self.route = load, route
        self.rng = np.random.default_rng(seed)
        self.replicas = [Replica(card, load) for _ in range(count)]
        self.total, self.now, self.number, self.next_report = 0, 0.0, 0, 0.0
        self.events: list[tuple[float, int, int, int]] = []  # time, number, replica (-1: a request comes), its version
        self.versions = [0] * count
        self.doors = [Places(card.slots, lambda name: self.replicas[int(name)].running) for _ in range(doors)]
        for door in self.doors:
            door.set([str(i) for i in range(count)])
        shares = np.arange(1, load.prefixes + 1) ** -load.zipf
        self.shares = np.cumsum(shares / shares.sum())
        self.last = len(sizes(-(-load.prefix // BLOCK))) - 1
        self.done: list[Request] = []

    def names(self, prefix: int) -> list[int]:
        return [place(f"{prefix}/{i}") for i in range(self.last + 1)]

    def _push(self, time: float, replica: int, version: int = 0) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, replica, version))

    def _changed(self, i: int) -> None:
        self.versions[i] += 1
        if (time := self.replicas[i].next()) < float("inf"):
            self._push(time, i, self.versions[i])

    def _come(self) -> None:
        prefix = int(min(np.searchsorted(self.shares, self.rng.random()), self.load.prefixes - 1))
        request = Request(prefix, max(self.rng.exponential(self.load.new), 1.0), self.now)
        door = self.doors[int(self.rng.integers(len(self.doors)))]
        names = self.names(prefix) if self.route != "load" else []
        chosen = door.choose(names, self.total / len(self.replicas))[0]
        if self.route == "known":  # the longest name is enough: a prefix is there or is not
            door.send(chosen, names[-1:], self.now)
        request.replica = int(chosen)
        self.total += 1
        self.replicas[request.replica].take(request, self.now)
        self._changed(request.replica)

    def _report(self) -> None:
        for i, replica in enumerate(self.replicas):
            held = [place(f"{prefix}/{self.last}") for prefix in replica.pool]
            for door in self.doors:
                door.report(str(i), held, self.now - 2 * PERIOD)
        self.next_report = self.now + PERIOD

    def run(self, requests: int, rate: float | None = None, clients: int = 0) -> list[Request]:
        """So many answers, in the order of their ends; a second call goes on. rate: requests a second that come at
        random times; or clients (more of them), each of which asks again as soon as it has its answer."""

        def wait() -> float:
            return float(self.rng.exponential(1 / rate)) if rate else 0.0

        come_already = any(event[2] < 0 for event in self.events)
        for _ in range(int(not come_already) if rate else clients):
            self._push(self.now + wait(), -1)
        until = len(self.done) + requests
        while len(self.done) < until:
            self.now, _, i, version = heapq.heappop(self.events)
            if self.route == "known" and self.now >= self.next_report:
                self._report()
            if i < 0:
                self._come()
                if rate:
                    self._push(self.now + wait(), -1)
            elif version == self.versions[i]:
                ended = self.replicas[i].finish(self.now)
                self.total -= len(ended)
                self.done += ended
                self._changed(i)
                for _ in ended if not rate else ():
                    self._push(self.now, -1)
        return self.done[-requests:]
