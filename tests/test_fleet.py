"""The simulation of many servers against what is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tools.fleet import Card, Fleet, Load, Replica, Request

LOAD = Load(prefixes=50, zipf=1.0, prefix=1024, own=128, new=64.0)
CARD = Card(slots=8, blocks=200, step_s=5e-3, token_s=1e-8, read_tokens_s=4e4, chunk=1024)


def one_alike(slots: int) -> Fleet:
    """Answers that take 64 steps of 10 ms on average, whoever else runs, and prompts that take no time."""
    card = Card(slots, blocks=10**9, step_s=10e-3, token_s=0.0, read_tokens_s=1e15, chunk=10**12)
    return Fleet(card, LOAD, 1, "load", seed=1)


def erlang(servers: int, offered: float) -> float:
    """The probability that a customer of M/M/c waits (Erlang's second formula)."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(terms) + last)


@pytest.mark.parametrize(("slots", "use"), [(1, 0.5), (1, 0.8), (4, 0.7)])
def test_a_queue_of_exponential_answers_is_that_of_erlang(slots, use):
    service = 0.64  # seconds; the least answer of one step adds nothing that 3 % would show
    rate = use * slots / service
    one = one_alike(slots)
    one.run(1500, rate=rate)
    done = one.run(13_500, rate=rate)
    waits = np.mean([one.begun - one.came for one in done])
    want = erlang(slots, use * slots) * service / (slots * (1 - use))
    assert waits == pytest.approx(want, rel=0.15)
    assert np.mean([one.ended - one.begun for one in done]) == pytest.approx(service, rel=0.03)
    seconds = done[-1].ended - done[0].ended
    assert len(done) / seconds == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize("route", ["known", "hash", "load"])
def test_nothing_is_lost_or_invented(route):
    fleet = Fleet(CARD, LOAD, 5, route, seed=2)
    done = fleet.run(3000, clients=60)
    here = sum(one.running for one in fleet.replicas)
    assert here + len([event for event in fleet.events if event[2] < 0]) == 60 and fleet.total == here
    assert all(one.came <= one.begun <= one.ended for one in done) and len({id(one) for one in done}) == 3000
    for one in fleet.replicas:
        users = sum(one.pool.values())
        assert users == len(one.reading) + len(one.ends) and len(one.ends) + len(one.reading) <= 8
        assert one.private >= users and one.private + len(one.pool) * one.per_prefix <= CARD.blocks
        assert one.steps <= one.clock / CARD.step_s
    mean = np.mean([one.ended - one.came for one in done])  # Little: 60 are always inside
    assert 60 / mean == pytest.approx(len(done) / fleet.now, rel=0.05)


def test_hits_with_the_whole_load_in_the_cache_and_with_none_of_it():
    roomy = Card(8, 10**6, CARD.step_s, CARD.token_s, CARD.read_tokens_s, CARD.chunk)
    done = Fleet(roomy, LOAD, 1, "known", seed=3).run(2000, clients=8)
    assert sum(one.cached == 0 for one in done) <= LOAD.prefixes
    rare = Load(10**6, 0.0, 1024, 128, 64.0)
    assert sum(one.cached > 0 for one in Fleet(CARD, rare, 1, "known", seed=3).run(500, clients=8)) <= 2


def test_reading_a_prompt_alone_and_beside_answers_takes_the_time_of_its_pieces():
    one = Replica(CARD, LOAD)
    one.take(Request(0, 100.0, 0.0), 0.0)
    alone = one.next()
    assert alone == pytest.approx(1152 / 4e4)
    one.finish(alone)
    one.take(Request(1, 10.0, alone), alone)
    step = CARD.step_s + CARD.token_s * one.holds
    assert one.next() - alone == pytest.approx(1152 / 4e4 + step * 1152 / 1024)


def test_the_least_recently_used_prefix_goes_and_those_in_use_stay():
    card = Card(8, 8 * 3 + 8, CARD.step_s, CARD.token_s, CARD.read_tokens_s, CARD.chunk)  # three prefixes, and answers
    one, now = Replica(card, LOAD), 0.0
    for prefix in (0, 1, 2, 0, 3):
        one.take(Request(prefix, 10.0, now), now)
        while one.running:
            now = one.next()
            one.finish(now)
    assert set(one.pool) == {0, 2, 3}
    for prefix in (0, 2, 3, 4):  # all in use: the fourth waits
        one.take(Request(prefix, 10.0, now), now)
    assert set(one.pool) == {0, 2, 3} and len(one.waiting) == 1


def test_knowing_where_prefixes_are_hits_more_than_the_load_alone():
    many = Load(400, 1.0, 1024, 128, 64.0)
    hits = {
        route: np.mean([one.cached > 0 for one in Fleet(CARD, many, 8, route, seed=5).run(6000, clients=80)[3000:]])
        for route in ("known", "hash", "load")
    }
    assert hits["known"] > hits["load"] + 0.2 and hits["hash"] > hits["load"] + 0.1, hits
