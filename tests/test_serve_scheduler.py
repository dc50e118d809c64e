"""The scheduler with tiny models: answers under load, joins and cancellations are those that the engine gives alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from minioscar.cache import blocks_of
from minioscar.engine import Engine, load
from minioscar.errors import Failure
from minioscar.evaluation.fidelity import default_text
from minioscar.options import Options
from minioscar.oscar import SCHEMES
from minioscar.sampling import Sampling
from minioscar.serve.jobs import Busy, Event, Job
from minioscar.serve.pooled import PooledCache
from minioscar.serve.scheduler import Scheduler
from minioscar.storage.hub import resolve

from .patience import PATIENCE
from .test_cuda_backend import on_each_backend
from .test_decode_step import of_backend
from .test_gpu import fed
from .tiny import talker, write_talker

GREEDY = Sampling()


class Asked:
    """A job, and what came of it."""

    def __init__(self, ids: list[int], options: Options, **more):
        self.events: list[Event] = []
        self.left, self.done = options.n, threading.Event()
        self.job = Job(ids, options, self._tell, continued=True, **more)

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        self.left -= event.finish_reason is not None
        if event.error or not self.left:
            self.done.set()

    def wait(self) -> Asked:
        assert self.done.wait(PATIENCE), "no answer"
        return self

    @property
    def error(self) -> Exception | None:
        return next((event.error for event in self.events if event.error), None)

    def answers(self) -> list[tuple]:
        """(token ids, text, finish reason, log-probabilities) of each."""
        self.wait()
        assert self.error is None, self.error
        found = []
        for index in range(self.job.options.n):
            events = [event for event in self.events if event.index == index]
            assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
            tokens = [event.token for event in events if event.token is not None]
            said = [event.logprob for event in events if event.logprob is not None]
            found.append((tokens, "".join(e.text for e in events), events[-1].finish_reason, said))
        return found


@contextmanager
def running(
    engine: Engine, slots: int = 3, context: int = 512, chunk: int = 256, queue: int = 1000, blocks: int | None = None,
    on_host: int = 0,
) -> Iterator:
    blocks = slots * blocks_of(context) if blocks is None else blocks
    cache = PooledCache(engine.config, engine.scheme, slots, context, engine.ops, blocks, on_host)

    def post(news) -> None:
        for job, event in news:
            job.tell(event)

    scheduler = Scheduler(engine, cache, chunk, queue, post)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.close()
        assert not scheduler.thread.is_alive()


def submit(scheduler: Scheduler, *asked: Asked) -> list[Asked]:
    scheduler.submit([one.job for one in asked])
    return list(asked)


def alone(engine: Engine, one: Asked, ctx: int = 512) -> list[tuple]:
    job = one.job
    numbers = list(range(job.sequence, job.sequence + job.rows))
    run = engine.start([job.ids], ctx=ctx, options=job.options, sequences=numbers)
    for _ in run:
        pass
    return [(r.token_ids, r.text, r.finish_reason, r.logprobs or []) for r in run.results]


KEEPS = replace(SCHEMES["int2"], name="keeps", flush=32, keep=64)


@pytest.fixture(scope="module", params=["int2", "keeps", "bf16"])
def engine(request, tmp_path_factory) -> Engine:
    folder = write_talker(tmp_path_factory.mktemp("m") / "m", 3, num_hidden_layers=1, max_position_embeddings=2048)
    if request.param != "keeps":
        return talker(folder, request.param)
    made = talker(folder, "int2")
    return Engine(made.config, made.model.weights, made.tokenizer, KEEPS, made.ops)


def prompt(rng: np.random.Generator, size: int) -> list[int]:
    return rng.integers(4, 320, size).tolist()


def options(rng: np.random.Generator) -> Options:
    sampling = Sampling(
        float(rng.choice([0, 0.7, 1.2])), int(rng.choice([0, 20])), float(rng.choice([1, 0.9])),
        seed=int(rng.integers(2**60)), repetition_penalty=float(rng.choice([1, 1.2])),
        presence_penalty=float(rng.choice([0, 0.5])),
    )
    stop = [(), ("a",), (" the", "zz")][rng.integers(3)]
    n, least = int(rng.choice([1, 1, 1, 2, 3])), int(rng.choice([0, 0, 3]))
    return Options(
        int(rng.integers(4, 20)), sampling, stop, [None, None, None, 2][rng.integers(4)], n, min_tokens=least,
        ignore_eos=bool(rng.integers(2)),
    )


def test_answers_under_random_load_joins_and_cancellations_are_those_of_generate(engine, seed):
    """Prompts of up to one chunk, which nothing that is cached begins."""
    rng = np.random.default_rng(seed)
    asked = [
        Asked(prompt(rng, int(rng.integers(1, 250))), options(rng), sequence=int(rng.integers(9)), cache_prompt=False)
        for _ in range(25)
    ]
    cancelled = set(rng.choice(25, 8, replace=False).tolist())
    with running(engine) as scheduler:
        for i, one in enumerate(asked):
            submit(scheduler, one)
            time.sleep(float(rng.choice([0, 0, 0.01])))
            if i in cancelled:
                threading.Timer(float(rng.uniform(0, 0.1)), scheduler.cancel, [[one.job]]).start()
        for i, one in enumerate(asked):
            if i not in cancelled:
                assert close(one.answers(), alone(engine, one)), i
        idle(scheduler)
        assert scheduler.metrics.failed == 0


def close(got: list[tuple], want: list[tuple]) -> bool:
    """Equal, but for the roundings of log-probabilities."""
    values = [[x.logprob for *_, said in of for one in said for x in (one, *one.top)] for of in (got, want)]
    return [one[:3] for one in got] == [one[:3] for one in want] and np.allclose(*values, atol=1e-3)


def idle(scheduler: Scheduler, seconds: float = PATIENCE) -> None:
    """Waits until every row is free."""
    end = time.monotonic() + seconds
    while any(row.state != "free" for row in scheduler.rows) or scheduler.waiting or scheduler.steps:
        assert time.monotonic() < end, [row.state for row in scheduler.rows]
        time.sleep(0.005)


@on_each_backend
def test_steps_ahead_leave_and_join_without_mixing_answers_up(make, tmp_path, seed):
    """Two rows for four answers, on kernels: a step that runs on when its answer has ended belongs to nobody."""
    folder = write_talker(tmp_path / "m", seed, num_hidden_layers=1)
    _, engine, ops = of_backend(make, folder, "int2")
    engine.ops, rng = ops, np.random.default_rng(seed)
    sampled = Sampling(1.0, top_p=0.9, seed=seed)
    asked = [
        Asked(prompt(rng, 20), Options(5, GREEDY, ignore_eos=True)),
        Asked(prompt(rng, 126), Options(4, sampled, ignore_eos=True), sequence=2),
        Asked(prompt(rng, 3), Options(3, Sampling(repetition_penalty=1.3), ignore_eos=True)),
        Asked(prompt(rng, 9), Options(3, sampled, logprobs=1, ignore_eos=True), sequence=4),
    ]
    with running(engine, slots=2, context=256) as scheduler:
        submit(scheduler, *asked)
        got = [one.answers() for one in asked]
    for one, answers in zip(asked, got, strict=True):
        assert close(answers, alone(engine, one, 256))


@on_each_backend
def test_who_is_alone_pays_for_one_row_and_finds_older_conversations_again(make, tmp_path, seed, monkeypatch):
    """What is cached makes room in front, and moves there when its conversation goes on."""
    folder = write_talker(tmp_path / "m", seed, num_hidden_layers=1)
    _, engine, ops = of_backend(make, folder, "int2")
    engine.ops, rng, launched = ops, np.random.default_rng(seed), []
    prompts, how = [prompt(rng, 33) for _ in range(2)], Options(2, ignore_eos=True)
    with running(engine, slots=2, context=256, chunk=128) as scheduler:
        go = scheduler.decoder.queue.go
        monkeypatch.setattr(scheduler.decoder.queue, "go", lambda rows: (launched.append(rows), go(rows)))
        answers = [submit(scheduler, Asked(ids, how))[0].answers() for ids in prompts]
        held = [row.held[:33] for row in scheduler.rows]
        again = [submit(scheduler, Asked(ids, how))[0].wait() for ids in prompts]
        assert sorted(held) == sorted(prompts) and [one.job.cached for one in again] == [32] * 2
        assert set(launched) == {1}
        submit(scheduler, *(both := [Asked(ids, how) for ids in prompts]))
        answers += [one.answers() for one in [*again, *both]]
    assert launched[-1] == 2
    for ids, got in zip(prompts * 3, answers, strict=True):
        assert close(got, alone(engine, Asked(ids, how), 128))


def test_a_prompt_longer_than_a_chunk_gives_one_answer_whoever_is_there(engine, seed):
    rng = np.random.default_rng(seed)
    long, short = prompt(rng, 700), [prompt(rng, int(rng.integers(3, 90))) for _ in range(6)]
    how = Options(12, Sampling(0.8, seed=5), ignore_eos=True)
    found = []
    for others in ([], short):
        with running(engine, context=1024) as scheduler:
            submit(scheduler, *(Asked(one, Options(30, ignore_eos=True)) for one in others[:3]))
            one = submit(scheduler, Asked(long, how))[0]
            submit(scheduler, *(Asked(one, Options(8, ignore_eos=True)) for one in others[3:]))
            found.append([answer[:3] for answer in one.answers()])
    assert found[0] == found[1]


def test_a_prefix_comes_from_the_cache_of_a_row_that_is_idle_or_busy(engine, seed):
    rng = np.random.default_rng(seed)
    start, how = prompt(rng, 300), Options(6, ignore_eos=True)
    with running(engine, chunk=512) as scheduler:
        first = submit(scheduler, Asked(start, how))[0].wait()
        held = len(start) + how.max_tokens - 1
        cache = PooledCache(engine.config, engine.scheme, 1, held, engine.ops, 3)
        cache.lengths[0] = held
        shared = cache.left_to_share(0, len(start) - 1)
        assert first.job.cached == 0
        again = submit(scheduler, Asked(start, how))[0].wait()
        assert again.job.cached == shared > 0
        busy = submit(scheduler, Asked(prompt(rng, 400), Options(100, ignore_eos=True)))[0]
        while not busy.events:
            time.sleep(0.001)
        fork = submit(scheduler, Asked([*busy.job.ids[:300], *prompt(rng, 30)], how))[0].wait()
        assert fork.job.cached == (256 if engine.scheme.quantized else 300)  # whole blocks
        if engine.scheme.name == "bf16":  # nothing is rounded twice, so what is cached cannot be told from what is read
            assert [a[:3] for a in again.answers()] == [a[:3] for a in alone(engine, again)]
            assert [a[:3] for a in fork.answers()] == [a[:3] for a in alone(engine, fork)]
        assert [a[:3] for a in busy.answers()] == [a[:3] for a in alone(engine, busy)]


def test_prompts_that_come_together_read_their_common_beginning_once(engine, seed):
    rng = np.random.default_rng(seed)
    start = prompt(rng, 256)
    asked = [Asked([*start, *prompt(rng, 5)], Options(3, ignore_eos=True)) for _ in range(3)]
    with running(engine) as scheduler:
        submit(scheduler, *asked)
        [one.wait() for one in asked]
        assert [one.job.cached for one in asked] == [0, 256, 256]
        assert scheduler.metrics.read_tokens == 256 + 3 * 5 and scheduler.metrics.hit_tokens == 512


def test_cache_prompt_false_ignores_what_is_cached(engine, seed):
    rng = np.random.default_rng(seed)
    ids, how = prompt(rng, 200), Options(8, logprobs=2, ignore_eos=True)
    with running(engine) as scheduler:
        fresh = submit(scheduler, Asked(ids, how))[0].answers()
        without = submit(scheduler, Asked(ids, how, cache_prompt=False))[0].wait()
        assert without.job.cached == 0 and without.answers() == fresh


def test_the_same_requests_in_the_same_order_give_the_same_bits_on_a_fresh_server(engine, seed):
    def answers() -> list:
        rng = np.random.default_rng(seed)
        start = prompt(rng, 150)
        with running(engine) as scheduler:
            found = []
            for size in (5, 140, 90, 150, 20):
                ids = [*start[:size], *prompt(rng, 40)]
                one = submit(scheduler, Asked(ids, Options(9, Sampling(0.9, seed=1), logprobs=3, ignore_eos=True)))[0]
                found.append((one.answers(), one.job.cached))
        return found

    assert answers() == answers()


def test_a_cancelled_answer_frees_its_row_within_two_steps(engine, seed):
    rng = np.random.default_rng(seed)
    with running(engine, slots=1, chunk=128) as scheduler:
        endless = Options(400, ignore_eos=True)
        for size in (3, 450):  # while it is stepped, and while it is read
            one = submit(scheduler, Asked(prompt(rng, size), endless))[0]
            waiting = submit(scheduler, Asked(prompt(rng, 5), endless))[0]
            while not (one.events if size == 3 else scheduler.rows[0].job is one.job):
                time.sleep(0.001)
            scheduler.cancel([waiting.job, one.job])
            at = scheduler.metrics.steps
            idle(scheduler)
            assert scheduler.metrics.steps - at <= 2
            seen = len(one.events)
            assert submit(scheduler, Asked([5, 6], Options(2, ignore_eos=True)))[0].answers()
            assert len(one.events) == seen and not waiting.events


def test_neither_steps_nor_prompts_wait_for_more_than_one_of_the_other(engine, seed, monkeypatch):
    """Ten pieces of a long prompt are read beside an answer: one step comes between any two of them."""
    rng, steps = np.random.default_rng(seed), []
    with running(engine, context=1408, chunk=128) as scheduler:
        read = scheduler._pass
        monkeypatch.setattr(scheduler, "_pass", lambda pieces: (steps.append(scheduler.metrics.steps), read(pieces)))
        talking = Asked(prompt(rng, 4), Options(1000, ignore_eos=True))
        talks, reads = submit(scheduler, talking, Asked(prompt(rng, 1280), Options(1, ignore_eos=True)))
        reads.wait()
        scheduler.cancel([talks.job])
    own, *steps = steps  # the pass that reads the answer's own prompt
    assert own == 0 and len(steps) == 10 and set(np.diff(steps)) == {1}


def test_jobs_begin_in_the_order_in_which_they_came(engine, seed):
    rng = np.random.default_rng(seed)
    begun: list[int] = []
    asked = [Asked(prompt(rng, 20), Options(4, n=2 if i % 3 == 1 else 1, ignore_eos=True)) for i in range(12)]
    with running(engine, slots=2) as scheduler:
        submit(scheduler, *asked)
        for i, one in enumerate(asked):
            one.wait()
            begun.append(i)
    times = [one.job.begun for one in asked]
    assert times == sorted(times)


def test_a_full_queue_is_refused_and_more_answers_than_rows_too(engine):
    with running(engine, slots=1, queue=2) as scheduler:
        asked = [Asked([5, 6, 7], Options(300, ignore_eos=True)) for _ in range(3)]
        submit(scheduler, asked[0])
        while not asked[0].events:
            time.sleep(0.001)
        submit(scheduler, *asked[1:])
        with pytest.raises(Busy, match="wait already"):
            submit(scheduler, Asked([5], Options(1)))
        with pytest.raises(ValueError, match="more than 1 answers"):
            submit(scheduler, Asked([5], Options(1, n=2)))
        scheduler.cancel([one.job for one in asked])
        idle(scheduler)
        assert submit(scheduler, Asked([5], Options(2, ignore_eos=True)))[0].answers()


def test_a_step_that_fails_ends_its_answers_and_no_others(engine, monkeypatch):
    with running(engine) as scheduler:
        read, left = scheduler.decoder.read, [3]

        def failing():
            found = read()
            left[0] -= 1
            if left[0] == 0:
                raise Failure("as if")
            return found

        monkeypatch.setattr(scheduler.decoder, "read", failing)
        one = submit(scheduler, Asked([5, 6, 7], Options(50, ignore_eos=True)))[0].wait()
        assert str(one.error) == "as if"
        two = submit(scheduler, Asked([5, 6, 7], Options(9, ignore_eos=True)))[0]
        assert [a[:3] for a in two.answers()] == [a[:3] for a in alone(engine, two)]


def test_an_engine_that_fails_says_so_to_everybody(engine, monkeypatch):
    with running(engine, slots=1) as scheduler:
        monkeypatch.setattr(scheduler.decoder, "launch", lambda slots: 1 / 0)
        asked = [Asked([5, 6, 7], Options(5, ignore_eos=True)) for _ in range(2)]
        scheduler.submit([one.job for one in asked])
        assert all("division by zero" in str(one.wait().error) for one in asked)
        assert "restart the server" in scheduler.dead
        with pytest.raises(Busy, match="engine has failed"):
            submit(scheduler, Asked([5], Options(1)))


def test_a_cancelled_answer_leaves_its_cache_to_the_next_turn(engine, seed):
    rng = np.random.default_rng(seed)
    ids = prompt(rng, 260)
    with running(engine) as scheduler:
        one = submit(scheduler, Asked(ids, Options(200, ignore_eos=True)))[0]
        while len(one.events) < 3:
            time.sleep(0.001)
        scheduler.cancel([one.job])
        idle(scheduler)
        said = [event.token for event in one.events]
        turn = submit(scheduler, Asked([*ids, *said, *prompt(rng, 9)], Options(2, ignore_eos=True)))[0].wait()
        assert turn.job.cached >= 256


def test_log_probabilities_of_a_prompt_are_those_of_the_model(engine, seed):
    ids = prompt(np.random.default_rng(seed), 100)
    with running(engine) as scheduler:
        one = submit(scheduler, Asked(ids, Options(1), prompt_logprobs=2, reads_only=True))[0].wait()
    logits = engine.logits(ids).astype(np.float64)
    values = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert one.job.scored[0] is None and len(one.job.scored) == len(ids)
    np.testing.assert_allclose([x.logprob for x in one.job.scored[1:]], values[np.arange(99), ids[1:]], atol=1e-4)
    np.testing.assert_allclose([x.top[0].logprob for x in one.job.scored[1:]], values[:-1].max(axis=1), atol=1e-4)


# --- on a card


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["int2", "bf16"])
def test_on_a_card_answers_under_load_differ_from_those_alone_by_near_ties_only(kv, seed):
    """SmolLM2, 24 greedy answers in 6 slots, some cancelled: each token is the likeliest alone, too, or nearly; in
    units of what other kernels round otherwise, as in test_gpu.py."""
    rng, ours = np.random.default_rng(seed), load(resolve("smollm2-135m"), kv, "cuda")
    text, count = ours.encode(default_text()[:20000], chat=False), 32
    prompts = [text[120 * i : 120 * i + int(rng.integers(3, 110))] for i in range(24)]
    asked = [Asked(ids, Options(count, ignore_eos=True), cache_prompt=False) for ids in prompts]
    noise = [Asked(ids[:9], Options(400, ignore_eos=True)) for ids in prompts[:8]]
    with running(ours, slots=6, context=1024, chunk=1024) as scheduler:
        for i, one in enumerate(asked):
            submit(scheduler, one, *noise[i : i + 1])
            threading.Timer(float(rng.uniform(0, 0.2)), scheduler.cancel, [[other.job for other in noise]]).start()
        tokens = [one.answers()[0][0] for one in asked]
        idle(scheduler)
    alone = np.concatenate([fed(ours, [p], [t]) for p, t in zip(prompts, tokens, strict=True)])
    spread = (fed(ours, prompts, tokens) - alone).std(axis=2)
    gap = alone.max(axis=2) - np.take_along_axis(alone, np.array(tokens)[:, :, None], 2)[:, :, 0]
    print("SERVED", kv, f"{(gap > 0).sum()} of {gap.size} differ, largest {(gap / spread).max():.1f} of the noise")
    assert (gap <= 6 * spread).all() and (gap > 0).mean() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["int2", "bf16"])
def test_on_a_card_the_same_requests_in_the_same_order_give_the_same_bits(kv, tmp_path, seed):
    """Prefixes taken over, penalties, biases and answers of several rows among them."""
    ours = load(write_talker(tmp_path / "m", seed % 1000, max_position_embeddings=2048), kv, "cuda")

    def answers() -> list:
        rng, found = np.random.default_rng(seed), []
        start = prompt(rng, 400)
        with running(ours, slots=4, context=1024) as scheduler:
            for size in (5, 140, 90, 400, 20, 300):
                one = Asked([*start[:size], *prompt(rng, 40)], options(rng), bias=((7, 2.0), (9, -100.0)))
                submit(scheduler, one)
                found.append((one.answers(), one.job.cached))
        return found

    assert answers() == answers()


@pytest.mark.gpu
def test_on_a_card_a_cancelled_answer_frees_its_row_within_two_steps(tmp_path, seed):
    ours = load(write_talker(tmp_path / "m", 1, max_position_embeddings=2048), "int2", "cuda")
    rng = np.random.default_rng(seed)
    with running(ours, slots=2, context=2048, chunk=128) as scheduler:
        for _ in range(50):
            one = submit(scheduler, Asked(prompt(rng, int(rng.integers(1, 600))), Options(1000, ignore_eos=True)))[0]
            time.sleep(float(rng.uniform(0, 0.02)))
            scheduler.cancel([one.job])
            at = scheduler.metrics.steps
            idle(scheduler)
            assert scheduler.metrics.steps - at <= 3  # one may have been read while it was cancelled
        two = submit(scheduler, Asked(prompt(rng, 60), Options(20, ignore_eos=True), cache_prompt=False))[0]
        assert len(two.answers()[0][0]) == 20
