"""The scheduler on a pool of blocks that is too small for all of its rows: what is shared, who waits, and that nothing
is lost."""

from __future__ import annotations

import time

import numpy as np
import pytest

from minioscar.engine import Engine
from minioscar.options import Options
from minioscar.sampling import Sampling
from minioscar.serve import server

from .test_blocks import check_pool
from .test_cuda_backend import on_each_backend
from .test_decode_step import of_backend
from .test_serve_scheduler import GREEDY, Asked, alone, close, idle, prompt, running, submit
from .tiny import talker, write_talker


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = write_talker(tmp_path_factory.mktemp("m") / "m", 3, num_hidden_layers=1, max_position_embeddings=4096)
    return talker(folder, "int2")


def check_flat(scheduler) -> None:
    """Nothing runs, and blocks are held by rows that are kept for another turn alone."""
    idle(scheduler)
    cache = scheduler.cache
    check_pool(cache.pool, cache.blocks)
    assert not cache.swapped
    for slot in range(len(cache.lengths)):
        cache.reset(slot)
    assert len(cache.pool.free) == cache.pool.size


def test_answers_that_wait_on_the_host_are_those_that_never_waited(engine, seed):
    """Three rows that grow to three blocks in a pool of four: all are answered, and some were swapped on the way."""
    rng, how = np.random.default_rng(seed), Options(170, Sampling(0.9, seed=8), ignore_eos=True)
    asked = [Asked(prompt(rng, size), how, sequence=i) for i, size in enumerate((100, 110, 120))]
    with running(engine, slots=3, blocks=4) as scheduler:
        submit(scheduler, *asked)
        got = [one.answers() for one in asked]
        check_flat(scheduler)
        assert scheduler.metrics.swapped_out >= scheduler.metrics.swapped_in > 0
    for one, answers in zip(asked, got, strict=True):
        assert close(answers, alone(engine, one))


def test_prompts_of_one_long_prefix_hold_it_once(engine, seed):
    """32 of 2,000 common tokens and 20 of their own, in a pool that has room for them only so."""
    rng = np.random.default_rng(seed)
    start = prompt(rng, 2000)
    asked = [Asked([*start, *prompt(rng, 20)], Options(3, ignore_eos=True)) for _ in range(32)]
    with running(engine, slots=32, context=2048, chunk=2048, blocks=16 + 3 * 32) as scheduler:
        first = submit(scheduler, asked[0])[0].wait()
        submit(scheduler, *asked[1:])
        held = []
        while not all(one.done.is_set() for one in asked):
            held.append(scheduler.cache.pool.num_shared)
            time.sleep(0.001)
        assert first.job.cached == 0 and all(one.job.cached >= 1920 for one in asked[1:])
        assert scheduler.metrics.read_tokens <= 2020 + 31 * 100 and not scheduler.metrics.swapped_out
        assert max(held) == 15  # the whole packed blocks of 2,000 tokens, and nothing else
        check_flat(scheduler)


def test_a_prompt_goes_on_from_blocks_whose_row_is_gone(engine, seed):
    """Generated tokens among them; sinks too. What is read again is the window, and what makes no whole block."""
    rng = np.random.default_rng(seed)
    ids, how = prompt(rng, 300), Options(150, ignore_eos=True)
    with running(engine, slots=1, context=1024, chunk=256, blocks=24) as scheduler:
        said = submit(scheduler, Asked(ids, how))[0].answers()[0][0]
        submit(scheduler, Asked(prompt(rng, 400), how))[0].wait()  # takes the only row
        turn = submit(scheduler, Asked([*ids, *said, *prompt(rng, 40)], how))[0].wait()
        assert turn.job.cached == engine.scheme.packed_tokens(449) // 128 * 128 == 384
        assert turn.answers()
        other = submit(scheduler, Asked([*ids[:127], 5, *ids[128:]], how))[0].wait()
        assert other.job.cached == 0
        fresh = submit(scheduler, Asked([*ids, *said], how, cache_prompt=False))[0].wait()
        assert fresh.job.cached == 0
        check_flat(scheduler)


@pytest.mark.parametrize("blocks, on_host, cached", [(24, 0, 384), (6, 24, 384), (6, 0, 0)])
def test_a_prompt_goes_on_from_blocks_that_the_host_alone_has(engine, blocks, on_host, cached):
    """The pool is too small for two conversations: what it gave away comes back, and the answer is the one that there
    would have been had it stayed. Without the host all of the prompt is read again."""
    rng, how = np.random.default_rng(5), Options(150, ignore_eos=True)
    ids, other, more = prompt(rng, 300), prompt(rng, 560), prompt(rng, 40)
    with running(engine, slots=1, context=768, chunk=768, blocks=blocks, on_host=on_host) as scheduler:
        said = submit(scheduler, Asked(ids, how))[0].answers()[0][0]
        submit(scheduler, Asked(other, how))[0].wait()
        turn = submit(scheduler, Asked([*ids, *said, *more], how))[0]
        got = turn.answers()
        assert turn.job.cached == cached and scheduler.cache.restored == (3 if on_host else 0)
        check_flat(scheduler)
    if cached:
        SEEN.append(got)
        assert SEEN[0] == got


@pytest.mark.parametrize("gb", [0.0, 2e-5, 1e-3, 2e-3])
def test_the_host_keeps_as_many_blocks_as_it_was_given_memory_for(engine, gb):
    """And the sinks of one beginning for every 16 of them; one block more would be too much."""
    plan = server.Plan(2, 512, 128, None, "tiny", host_cache=gb)
    plan.check()
    _, scheduler = server.assemble(engine, plan, Sampling())
    cache = scheduler.cache
    count, roots = len(cache.host.arrays), len(cache.host_sinks.arrays)
    assert roots == -(-count // 16) and (count > 0) == (gb > 1e-4)
    assert cache.host.nbytes + cache.host_sinks.nbytes <= gb * 1e9
    if count:
        block = cache.host.nbytes // count
        sinks = cache.host_sinks.nbytes // roots
        assert (count + 1) * block + -(-(count + 1) // 16) * sinks > gb * 1e9
    scheduler.start()  # warming up leaves nothing behind
    scheduler.close()
    assert not len(cache.host) and not cache.restored


SEEN: list[list] = []  # of the test above: an answer does not depend on where its blocks were


def test_several_answers_share_the_blocks_of_their_prompt(engine, seed):
    rng = np.random.default_rng(seed)
    asked = Asked(prompt(rng, 250), Options(60, Sampling(1.0, seed=7), n=4, ignore_eos=True), sequence=3)
    with running(engine, slots=4, blocks=6) as scheduler:
        submit(scheduler, asked)
        assert close(asked.answers(), alone(engine, asked))
        with pytest.raises(ValueError, match="more than the whole cache"):
            submit(scheduler, Asked(prompt(rng, 500), Options(9, n=4)))
        check_flat(scheduler)


@pytest.mark.parametrize("on_host", [0, 5])
def test_thousands_come_and_leave_and_the_pool_is_what_it_was(engine, on_host, seed):
    """2,000 prompts, most of them cancelled while they wait, are read, or are answered."""
    rng = np.random.default_rng(seed)
    starts = [prompt(rng, 140) for _ in range(3)]
    with running(engine, slots=4, context=384, chunk=128, blocks=6, queue=5000, on_host=on_host) as scheduler:
        for _ in range(100):
            asked = []
            for _ in range(20):
                ids = [*starts[rng.integers(3)][: int(rng.integers(1, 140))], *prompt(rng, int(rng.integers(1, 60)))]
                asked.append(Asked(ids, Options(int(rng.integers(1, 12)), ignore_eos=True)))
            submit(scheduler, *asked)
            gone = set(rng.choice(20, 18, replace=False).tolist())
            if rng.random() < 0.5:
                time.sleep(float(rng.uniform(0, 0.01)))
            scheduler.cancel([asked[i].job for i in gone])
            for i, one in enumerate(asked):
                if i not in gone:
                    assert len(one.answers()[0][0]) == one.job.options.max_tokens
        check_flat(scheduler)
        assert scheduler.metrics.failed == 0


@on_each_backend
def test_rows_on_a_card_wait_on_the_host_and_go_on_as_if_nothing_was(make, tmp_path, seed):
    """By kernels, in two layers: penalties count what the row has drawn, not what steps draw for it while it waits, and
    sinks that a step packs go to their layer."""
    folder = write_talker(tmp_path / "m", seed, num_hidden_layers=2)
    _, engine, ops = of_backend(make, folder, "int2")
    engine.ops, rng = ops, np.random.default_rng(seed)
    sampled = Sampling(1.0, seed=4, repetition_penalty=1.3)
    asked = [
        Asked(prompt(rng, 122), Options(9, GREEDY, ignore_eos=True)),
        Asked(prompt(rng, 126), Options(11, sampled, ignore_eos=True), sequence=1),
    ]
    with running(engine, slots=2, context=256, blocks=3) as scheduler:
        submit(scheduler, *asked)
        got = [one.answers() for one in asked]
        assert scheduler.metrics.swapped_in > 0
        check_flat(scheduler)
    for one, answers in zip(asked, got, strict=True):
        assert close(answers, alone(engine, one, 256))
