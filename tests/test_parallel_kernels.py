"""Sums and gathers over cards, and whole models of several: on the simulator, and on two cards where there are two."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cards import Looped
from minioscar.answers import Generation
from minioscar.cache import BF16
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.ops import cuda_missing
from minioscar.options import Options
from minioscar.oscar import SCHEMES
from minioscar.parallel import cards, cuda, loading
from minioscar.parallel.collectives import NOTHING_PUSHED, PUSHED, Links, Sum
from minioscar.parallel.cuda import SplitCuda
from minioscar.parallel.ranks import Ranks
from minioscar.prompt_cache import PromptCache
from minioscar.sampling import RowSampling, Sampling

from . import simt
from .test_parallel import FAMILIES
from .tiny import CONFIG, load, relative, write_model

_no_simt = simt.missing()


def _simulated(count: int, config: Config, pushed: int = 1 << 16):
    from .simt.backend import Simt, SplitSimt

    return SplitSimt([Simt() for _ in range(count)], config, pushed)


def _cards(count: int, config: Config):
    from minioscar.ops import backend

    return cards.over(count, backend("cuda"), config, SCHEMES["bf16"])


def _apart(count: int, config: Config):
    """As cards that do not reach each other's memory."""
    ops = _cards(count, config)
    ops.links = Links(ops.xp, count, ops.on, NOTHING_PUSHED)
    return ops


def _on_one_card(count: int, config: Config):
    """Ranks that share a card, each on a stream of its own. Only for models so small that the kernels of both have room
    on it at a time: a rank that waits in a sum holds what its next kernel takes. NCCL wants cards of their own."""
    from minioscar.ops.cuda import Cuda

    ops = SplitCuda([Cuda() for _ in range(count)], config, 1 << 16, devices=[0] * count)
    ops.links.sum, ops.links.sum_beside, ops.links.join = added, added, lambda: None
    ops.first.xp.cuda.Device().synchronize()  # counters are 0 before another rank writes beside them
    return ops


def added(arrays: Ranks, streams=None) -> None:
    """`Links.sum` without NCCL."""
    import cupy

    cupy.cuda.Device().synchronize()
    total = sum(x.astype(np.float32) for x in arrays.values)
    for x in arrays.values:
        x[...] = total.astype(x.dtype)
    cupy.cuda.Device().synchronize()


def few_cards() -> str | None:
    """Why there are no two cards, or None."""
    if reason := cuda_missing():
        return reason
    import cupy

    there = cupy.cuda.runtime.getDeviceCount()
    return None if there > 1 else f"needs two GPUs, this machine has {there}"


SIMULATED = pytest.mark.skipif(_no_simt is not None, reason=str(_no_simt))
TWO = [pytest.mark.gpu, pytest.mark.skipif(few_cards() is not None, reason=str(few_cards()))]
WAYS = [
    *(pytest.param(_simulated, n, id=f"{n}-simt", marks=SIMULATED) for n in (2, 3, 8)),
    *(pytest.param(_on_one_card, n, id=f"{n}-on-one-card", marks=pytest.mark.gpu) for n in (2, 3)),
    pytest.param(_cards, 2, id="2-cuda", marks=TWO),
]
on_some = pytest.mark.parametrize(("make", "count"), WAYS)
on_some_or_apart = pytest.mark.parametrize(("make", "count"), [*WAYS, pytest.param(_apart, 2, id="2-apart", marks=TWO)])
on_cards = pytest.mark.parametrize(
    "make",
    [pytest.param(_on_one_card, id="on-one-card", marks=pytest.mark.gpu), pytest.param(_cards, id="cuda", marks=TWO),
     pytest.param(_apart, id="apart", marks=TWO)],
)  # fmt: skip


def wide(count: int) -> Config:
    return Config.from_dict({**CONFIG, "num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 64,
                             "intermediate_size": 24 * 8})  # fmt: skip


def put(ops, values: list[np.ndarray]) -> Ranks:
    """Another array on each card."""
    return Ranks(ops.each(lambda one, x: one.xp.asarray(x), Ranks(values)))


def got(ops, x: Ranks) -> list[np.ndarray]:
    return [np.array(a) for a in ops.each(lambda one, x: one.numpy(x), x)]


@on_some
def test_a_sum_over_cards_is_that_of_their_order_on_every_card(make, count, seed):
    """Calls of unequal sizes one after the other, with a residual and without, into an array of its own or in place."""
    ops, rng = make(count, wide(count)), np.random.default_rng(seed)
    for call, shape in enumerate([(1, 4096), (3, 96), (1, 4), (7, 1028), (48, 512), (1, 4096), (2, 260)]):
        parts = [rng.standard_normal(shape).astype(BF16) for _ in range(count)]
        old = rng.standard_normal(shape).astype(BF16)
        want = old.astype(np.float32) if call % 3 else np.zeros(shape, np.float32)
        for part in parts:
            want = want + part.astype(np.float32)
        there, residual = put(ops, parts), put(ops, [old] * count)
        out = residual if call % 2 else ops.xp.empty(shape, BF16)
        ops.run(ops.links.all_reduce(there, residual if call % 3 else None, out))
        for found in got(ops, out):
            np.testing.assert_array_equal(found.view(np.uint16), want.astype(BF16).view(np.uint16))


def test_what_is_too_large_to_be_pushed_is_refused():
    ops = Links(np_namespace(), 2, lambda rank: nullcontext())
    for shape in ((1, 6), (PUSHED // 4 + 1, 4)):
        part = Ranks([np.broadcast_to(np.zeros((), BF16), shape)] * 2)
        with pytest.raises(ValueError, match="do not fit all_reduce.cu"):
            ops.all_reduce(part, None, part)


def np_namespace():
    from minioscar.parallel.ranks import Namespace

    return Namespace([np, np], lambda rank: nullcontext())


@on_some_or_apart
def test_every_card_gathers_the_whole_vocabulary(make, count, seed):
    """Shares that overlap, and shares that are multiples of four."""
    ops, rng = make(count, wide(count)), np.random.default_rng(seed)
    for tokens, share, vocab in ((1, 40, 40 * count), (3, 37, 37 * count - 1), (5, 513, 513 * count - count + 1)):
        whole = rng.standard_normal((tokens, vocab)).astype(np.float32)
        firsts = [min(rank * share, vocab - share) for rank in range(count)]
        parts = put(ops, [np.ascontiguousarray(whole[:, first : first + share]) for first in firsts])
        out = ops.xp.empty((tokens, vocab), np.float32)
        ops.run(ops.links.gather(parts, out, firsts))
        for found in got(ops, out):
            np.testing.assert_array_equal(found, whole)


@on_some_or_apart
@pytest.mark.parametrize(("family", "kv"), [("qwen3", "int2"), ("llama with biases", "bf16"), ("qwen3_moe", "int2")])
def test_several_cards_by_kernels_are_the_model(make, count, family, kv, tmp_path, seed):
    """Logits of a prompt, then of decode steps, against NumPy with numbers in float32: BF16 alone is between them.

    Of experts every token takes all: which of them nearly tie is not what cards differ in, each has a part of all.
    """
    if count != 2:
        pytest.skip("whole models on two cards: on the simulator they take seconds a card")
    experts = {"moe_intermediate_size": 48, "num_experts_per_tok": 6}
    changes = FAMILIES[family] | {"head_dim": 64, "num_hidden_layers": 1} | experts
    folder = write_model(tmp_path / "m", seed, **changes)
    reference, e = load(folder, kv), split_engine(make, count, folder, kv)
    ids = np.random.default_rng(seed).integers(0, 160, 20).tolist()
    noise = noise_of(reference, e, ids)
    check_answers(noise, *(of.generate([ids, ids[:5]], max_tokens=4, logprobs=4) for of in (reference, e)))


def noise_of(reference: Engine, e: Engine, ids: list[int]) -> float:
    """The standard deviation of what the logits of a prompt differ by, which BF16 alone explains."""
    got, want = np.array(e.logits(ids)), reference.logits(ids)
    assert relative(got, want) < 0.03
    return float((got - want).std())


def check_answers(noise: float, *answers: list[Generation]) -> None:
    """Equal but for near-ties: log-probabilities differ by no more than six standard deviations of the logits."""
    for a, b in zip(*answers, strict=True):
        for n, (mine, theirs) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            assert abs(mine.logprob - theirs.logprob) < 6 * noise
            if a.token_ids[n] != b.token_ids[n]:
                break


@SIMULATED
@pytest.mark.parametrize("family", ["llama with biases", "qwen3_moe"])
def test_a_recorded_step_has_sums_that_are_too_large_to_be_pushed(family, tmp_path, seed):
    experts = {"moe_intermediate_size": 48, "num_experts_per_tok": 6}
    changes = FAMILIES[family] | {"head_dim": 64, "num_hidden_layers": 1} | experts
    folder = write_model(tmp_path / "m", seed, **changes)
    reference, e = load(folder, "bf16"), split_engine(partial(_simulated, pushed=32), 2, folder, "bf16")
    ids = np.random.default_rng(seed).integers(0, 160, 7).tolist()
    noise = noise_of(reference, e, ids)
    check_answers(noise, *(of.generate([ids], max_tokens=3, logprobs=4) for of in (reference, e)))


@on_some_or_apart
@pytest.mark.parametrize(("kv", "longest"), [("bf16", 126), ("int2", 100)])
def test_rows_join_and_leave_steps_of_several_cards(make, count, kv, longest, tmp_path, seed):
    """As the server has them: each begins from logits that lie on the cards, and steps are of as few rows as can be.

    Nothing is packed in these steps: numbers in BF16 get other codes than the reference's at near-ties.
    """
    if count != 2:
        pytest.skip("whole models on two cards: on the simulator they take seconds a card")
    folder = write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1)
    reference, e = load(folder, kv), split_engine(make, count, folder, kv)
    ids, found, drawn = np.random.default_rng(seed).integers(0, 160, longest), [], dict[int, int]()
    for of in (reference, e):
        cache = of.new_cache(3, 256)
        decoder, logits = of.ops.decoder(of.model, cache, None), {}
        for slot, end in ((1, longest), (0, 7)):
            batch = cache.batch_for([slot], [end])
            with decoder.ordered():
                first = of.model.step(ids[:end], cache, batch, lambda logits: logits)[1]
            token = decoder.join(slot, RowSampling(Sampling(0.7, seed=3, presence_penalty=0.5)), first[0])
            if token != drawn.setdefault(slot, token):  # a near-tie
                decoder.feed([slot], [drawn[slot]])
        for slots in ([0, 1], [0, 1], [0], [0, 1]):
            decoder.launch(slots)
            decoder.read()
            logits[len(logits)] = [decoder.logits_of(slot) for slot in slots]
            for slot in slots:  # both go on with the same tokens
                decoder.feed([slot], [40 + len(logits)], len(decoder.drawn[slot]))
        decoder.drain()
        found.append(logits)
    for mine, theirs in zip(*(logits.values() for logits in found), strict=True):
        assert all(relative(b, a) < 0.04 for a, b in zip(mine, theirs, strict=True))


def split_engine(make, count: int, folder: Path, kv: str) -> Engine:
    config = Config.from_folder(folder)
    ops = make(count, config)
    return Engine(config, loading.load(folder, config, ops, SCHEMES[kv]), None, SCHEMES[kv], ops, folder=folder)


@on_cards
@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_two_runs_and_a_graph_and_its_launches_give_equal_bits(make, kv, tmp_path, seed):
    """Over the flush of windows; 40 rows take the products of linear_batch.cu."""
    folder = write_model(tmp_path / "m", seed, head_dim=128, num_attention_heads=8, num_key_value_heads=2)
    rng = np.random.default_rng(seed)
    for rows in (2, 40):
        prompts = [rng.integers(0, 160, 1 + 40 * n % 130).tolist() for n in range(rows)]
        found = [
            split_engine(make, 2, folder, kv).generate(prompts, max_tokens=140, graph=graph, logprobs=0)
            for graph in (True, True, False)
        ]
        for answers in zip(*found, strict=True):
            assert len({tuple(answer.token_ids) for answer in answers}) == 1
            assert len({tuple(p.logprob for p in answer.logprobs) for answer in answers}) == 1


@on_cards
def test_graphs_of_many_kernels_are_launched_before_they_wait(make, tmp_path, seed):
    """100 layers are some 900 kernels a card, more than a model of 70B has; a launch that waited for room would wait
    for the other card, which gives up and fails the test."""
    folder = write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=100)
    e, ids = split_engine(make, 2, folder, "int2"), np.random.default_rng(seed).integers(0, 160, 20).tolist()
    answers = [e.generate(ids, max_tokens=20, graph=graph, logprobs=0) for graph in (True, False)]
    assert answers[0].token_ids == answers[1].token_ids and answers[0].logprobs == answers[1].logprobs


@on_cards
@pytest.mark.parametrize("tokens", [30, 400])
def test_another_prompt_is_read_while_an_answer_is_under_way(make, tokens, tmp_path, seed):
    """Its sums come after those of the step that was launched already."""
    folder, rng = write_model(tmp_path / "m", seed, head_dim=64), np.random.default_rng(seed)
    e, (ids, other) = split_engine(make, 2, folder, "int2"), (rng.integers(0, 160, n).tolist() for n in (20, tokens))
    want = [e.generate(prompt, max_tokens=40, ignore_eos=True, logprobs=0) for prompt in (ids, other)]
    for _ in range(20):
        run = e.start([ids], options=Options(40, ignore_eos=True, logprobs=0))
        between = [e.generate(other, max_tokens=40, ignore_eos=True, logprobs=0) for n, _ in enumerate(run) if n == 10]
        assert run.results[0].logprobs == want[0].logprobs and between[0].logprobs == want[1].logprobs


@on_cards
def test_cards_are_in_step_after_ctrl_c(make, tmp_path, seed):
    """Whenever it comes: while a prompt is read, a step recorded or captured, or graphs are launched."""
    folder, rng = write_model(tmp_path / "m", seed, head_dim=64), np.random.default_rng(seed)
    e, ids = split_engine(make, 2, folder, "int2"), rng.integers(0, 160, 300).tolist()
    start, how = time.perf_counter(), {"max_tokens": 40, "ignore_eos": True}
    want = e.generate(ids, **how).token_ids
    longest = time.perf_counter() - start
    for after in rng.uniform(0, min(longest, 0.3), 30):
        timer = threading.Timer(after, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            e.generate(ids, **how)
            timer.join()
            time.sleep(1e-3)  # it is heard of within the `try`
        except KeyboardInterrupt:
            pass
        assert e.generate(ids, **how).token_ids == want


@on_cards
def test_a_long_prompt_is_summed_in_chunks(make, tmp_path, seed, monkeypatch):
    monkeypatch.setattr(cuda, "CHUNK_TOKENS", 128)
    folder = write_model(tmp_path / "m", seed, head_dim=128, num_attention_heads=8, num_key_value_heads=2)
    ids = np.random.default_rng(seed).integers(0, 160, 700).tolist()
    one, two = load(folder, "int2", "cuda"), split_engine(make, 2, folder, "int2")
    assert relative(two.logits(ids), one.logits(ids)) < 0.03
    assert np.array_equal(two.logits(ids), two.logits(ids))


@on_cards
@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_a_prompt_cache_goes_from_one_card_to_two_and_back(make, kv, tmp_path, seed):
    folder = write_model(tmp_path / "m", seed, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
    engines = load(folder, kv, "cuda"), split_engine(make, 2, folder, kv)
    ids = np.random.default_rng(seed).integers(0, 160, 300).tolist()
    for number, (made_by, read_by) in enumerate((engines, engines[::-1])):
        made_by.prefill(ids).save(tmp_path / f"{number}.kv")
        cache = PromptCache.load(tmp_path / f"{number}.kv", read_by)
        a = read_by.generate([5, 6], cache=cache, max_tokens=1, logprobs=0).logprobs[0].logprob
        b = made_by.generate([5, 6], cache=made_by.prefill(ids), max_tokens=1, logprobs=0).logprobs[0].logprob
        assert abs(a - b) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(few_cards() is not None, reason=str(few_cards()))
def test_sums_by_nccl(seed):
    ops, rng = _cards(2, wide(2)), np.random.default_rng(seed)
    parts = [rng.standard_normal((64, 4096)).astype(BF16) for _ in range(2)]
    there = put(ops, parts)
    ops.run(Sum(there))
    want = (parts[0].astype(np.float32) + parts[1].astype(np.float32)).astype(BF16)
    for found in got(ops, there):
        np.testing.assert_array_equal(found.view(np.uint16), want.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.skipif(few_cards() is not None, reason=str(few_cards()))
def test_graphs_have_sums_by_nccl(tmp_path, seed):
    """As steps of 129 rows have them where the hidden size is 8,192. NVIDIA advises against graphs with NCCL's sums of
    several GPUs that one thread launches; each has a thread of its own."""

    def make(count: int, config: Config) -> SplitCuda:
        ops = _cards(count, config)
        ops.links = Links(ops.xp, count, ops.on, 64)
        return ops

    folder, rng = write_model(tmp_path / "m", seed, head_dim=64), np.random.default_rng(seed)
    prompts, answers = [rng.integers(0, 160, n).tolist() for n in (20, 300)], []
    for graph in (True, True, False):
        e = split_engine(make, 2, folder, "int2")
        answers.append(e.generate(prompts, max_tokens=20, ignore_eos=True, graph=graph, logprobs=0))
        assert e.ops.links.communicators
    for of_prompt in zip(*answers, strict=True):
        assert len({tuple(answer.token_ids) for answer in of_prompt}) == 1
        assert len({tuple(p.logprob for p in answer.logprobs) for answer in of_prompt}) == 1


@SIMULATED
def test_the_share_of_one_card_by_itself_takes_its_own_words_for_the_others(seed):
    """benchmarks/cards.py: every part is its own, every share of the logits, too."""
    from .simt.backend import Simt, SplitSimt

    ops, rng = SplitSimt([Simt()], wide(3), 1 << 12), np.random.default_rng(seed)
    ops.links = Looped(ops.xp, 3, ops.on, 1 << 12)
    for _ in range(3):
        part, old = (rng.standard_normal((2, 64)).astype(BF16) for _ in range(2))
        out = ops.xp.empty((2, 64), BF16)
        ops.run(ops.links.all_reduce(put(ops, [part]), put(ops, [old]), out))
        want = old.astype(np.float32)
        for _ in range(3):
            want = want + part.astype(np.float32)
        np.testing.assert_array_equal(got(ops, out)[0].view(np.uint16), want.astype(BF16).view(np.uint16))
        logits = rng.standard_normal((2, 40)).astype(np.float32)
        whole = ops.xp.zeros((2, 120), np.float32)
        ops.run(ops.links.gather(put(ops, [logits]), whole, [0]))
        np.testing.assert_array_equal(got(ops, whole)[0][:, :40], logits)
