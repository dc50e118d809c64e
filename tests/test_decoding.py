"""Decoders: steps that are queued ahead, rows that end on the way, a step that is thrown away."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest

from minioscar.cache import Cache
from minioscar.errors import Failure
from minioscar.generation import Options
from minioscar.ops.decode import StepDecoder
from minioscar.sampling import RowSampling, Sampling, next_token

from .test_cuda_backend import on_each_backend
from .test_decode_step import of_backend
from .tiny import load, write_model

GREEDY = Sampling()


def started(engine, ops, prompts: list[np.ndarray], room: int = 8, sampling: Sampling = GREEDY, **options):
    """A decoder behind the prefill of these prompts, fed with their first tokens."""
    cache = Cache(engine.config, engine.scheme, len(prompts), max(map(len, prompts)) + room, ops)
    slots = list(range(len(prompts)))
    rows = [RowSampling(sampling, i, prompt.tolist()) for i, prompt in enumerate(prompts)]
    logits = engine.model.forward(np.concatenate(prompts), cache, cache.batch_for(slots, list(map(len, prompts))))
    decoder = ops.decoder(engine.model, cache, rows, **options)
    decoder.feed(slots, [next_token(of_row, row, 0) for of_row, row in zip(logits, rows, strict=True)])
    return decoder, cache


def steps(decoder, rows: list[list[int]]) -> list[list[int]]:
    """A step of each of these sets of rows, as many ahead as the decoder takes."""
    found, launched = [], 0
    for done in range(len(rows)):
        while launched < len(rows) and launched - done <= decoder.ahead:
            decoder.launch(rows[launched])
            launched += 1
        found.append(decoder.read()[0].tolist())
    decoder.drain()
    return found


@on_each_backend
@pytest.mark.parametrize("kv", ["int2", "bf16", "plain-64-64"])
def test_a_step_that_was_thrown_away_is_taken_again(make, kv, tmp_path, seed, windows):
    """It had filled the window of row 0, and packed it; in row 1 it stood first in a window that was packed a step
    before."""
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), kv)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 160, n) for n in (126, 127)]
    sampling = Sampling(repetition_penalty=1.2, frequency_penalty=0.5)  # a token that is fed again counts once
    (straight, _), (broken, cache) = (started(engine, ops, prompts, sampling=sampling) for _ in range(2))
    assert isinstance(straight, StepDecoder) and straight.ahead == 1
    want = steps(straight, [[0, 1]] * 4)
    broken.launch([0, 1])
    broken.launch([0, 1])
    first = broken.read()[0]
    broken.drain()
    assert cache.lengths.tolist() == [127, 128]
    broken.feed([0, 1], first, step=2)
    assert [first.tolist(), *steps(broken, [[0, 1]] * 3)] == want
    assert cache.lengths.tolist() == [130, 131]


@on_each_backend
@pytest.mark.parametrize("kv", ["int2", "bf16", "plain-64-64", "plain-128-128"])
def test_two_steps_that_were_thrown_away_leave_a_row_that_goes_on(make, kv, tmp_path, seed, windows):
    """An interrupt while the host waits for the first of them. In row 0 they do not come round the ring; in row 1 the
    first fills the window, the second then overwrites its oldest slot, and the row is left with what is packed."""
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), kv)
    rng, scheme = np.random.default_rng(seed), engine.scheme
    prompts = [rng.integers(0, 160, n) for n in (270, 255 + (scheme.keep == 128) * 128)]
    (straight, _), (broken, cache) = (started(engine, ops, prompts, room=200) for _ in range(2))
    want = steps(straight, [[0, 1]] * 3)
    first = [broken.drawn[slot][-1] for slot in (0, 1)]
    broken.launch([0, 1])
    broken.launch([0, 1])
    broken.drain()
    length = len(prompts[1])
    left = length if kv == "bf16" else scheme.packed_tokens(length)
    assert cache.lengths.tolist() == [270, left]
    if left < length:
        with pytest.raises(ValueError, match=f"row 1 was cut to {left}") if scheme.keep else nullcontext():
            broken.launch([1])
        broken.drain()
        assert cache.truncate(1, length) == left
        engine.model.forward(prompts[1][left:], cache, cache.batch_for([1], [length - left]))
    broken.feed([0, 1], first, step=1)
    assert steps(broken, [[0, 1]] * 3) == want


@on_each_backend
def test_a_row_that_ends_leaves_the_others_alone_and_can_come_back(make, tmp_path, seed):
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), "int2")
    prompts = [np.random.default_rng(seed + n).integers(0, 160, n) for n in (3, 40)]
    (together, _), (apart, cache) = (started(engine, ops, prompts, sampling=Sampling(1.0, seed=3)) for _ in range(2))
    want = steps(together, [[0, 1]] * 3)
    assert steps(apart, [[0, 1], [1], [1]]) == [want[0], want[1][1:], want[2][1:]]
    assert cache.lengths.tolist() == [4, 43]
    apart.feed([0], want[0][:1], step=2)
    assert steps(apart, [[0], [0]]) == [want[1][:1], want[2][:1]]


@on_each_backend
def test_logits_come_with_the_tokens_that_were_drawn_from_them(make, tmp_path, seed):
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), "int2")
    prompts = [np.random.default_rng(seed).integers(0, 160, 5)]
    without, _ = started(engine, ops, prompts)
    decoder, _ = started(engine, ops, prompts, logits=True)
    assert decoder.ahead == 0
    for want in steps(without, [[0]] * 3):
        decoder.launch([0])
        tokens, logits = decoder.read()
        assert tokens.tolist() == want == logits.argmax(axis=1).tolist()


@on_each_backend
def test_logits_that_are_not_finite_are_an_error(make, tmp_path, seed):
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), "int2")
    decoder, _ = started(engine, ops, [np.array([1, 2, 3])])
    engine.model.weights.layers[0].down[0, 0] = np.nan
    decoder.launch([0])
    with pytest.raises(Failure, match="not finite"):
        decoder.read()


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["int2", "bf16", "quarot"])
def test_a_graph_and_its_launches_one_by_one_give_the_same_tokens(kv, tmp_path, seed):
    """2,000 tokens of three rows, twice; quarot has no kernels of its own and goes through array code, for fewer."""
    engine = load(write_model(tmp_path / "m", seed, head_dim=64, max_position_embeddings=4096), kv, "cuda")
    prompts = [np.random.default_rng(seed + n).integers(0, 160, n).tolist() for n in (3, 128, 200)]
    options = {"max_tokens": 50 if kv == "quarot" else 2000, "sampling": Sampling(0.8, top_k=40, top_p=0.9, seed=seed)}
    runs = []
    for graph in (True, True, False):
        run = engine.start(prompts, options=Options(options["max_tokens"], options["sampling"], graph=graph))
        for _ in run:
            pass
        runs.append([result.token_ids for result in run.results])
    assert runs[0] == runs[1] == runs[2]


@on_each_backend
@pytest.mark.parametrize("replay", ["graph", "launches", "eager"])
def test_a_decoder_and_its_cache_are_freed_without_the_garbage_collector(make, replay, tmp_path, seed):
    """A card's memory does not wait for a circle of references to be found."""
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), "int2")
    decoder, cache = started(engine, ops, [np.array([1, 2, 3])], replay=replay)
    steps(decoder, [[0]] * 2)
    gone = weakref.ref(decoder), weakref.ref(decoder.work), weakref.ref(cache), weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del decoder, cache
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()


KINDS = [
    RowSampling(Sampling(1.0, top_p=0.9, seed=5), 3),
    RowSampling(Sampling(0.8, top_k=20, repetition_penalty=1.3, presence_penalty=0.5, seed=6), 1, prompt=(1, 2, 3)),
    RowSampling(Sampling(), bias=((7, 4.5), (9, -3.0))),
    RowSampling(Sampling(1.2, min_p=0.05, seed=7), 2, ends=(5, 6), min_tokens=3, bias=((5, 50.0),)),
]


@on_each_backend
@pytest.mark.parametrize("kv", ["int2", "bf16"])
def test_rows_that_join_between_two_steps_draw_what_they_draw_from_the_beginning(make, kv, tmp_path, seed):
    """Each row joins while a step of the others runs, in the slot of one that has left; nothing is recorded again."""
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), kv)
    prompts = [np.random.default_rng(seed + n).integers(0, 160, n) for n in (126, 3, 40, 9)]
    cache = Cache(engine.config, engine.scheme, 2, 140, ops)

    def forward(cache: Cache, slot: int, ids: np.ndarray):
        batch = cache.batch_for([slot], [len(ids)])
        return engine.model.step(ids, cache, batch, lambda logits: logits)[1][0]

    decoder = ops.decoder(engine.model, cache, None)
    recorded = getattr(decoder, "work", None) and decoder.work.recorded
    drawn: dict[int, list[int]] = {}
    waiting, at, launched = list(range(len(KINDS))), {}, []
    for _ in range(30):
        going = [slot for slot, i in sorted(at.items()) if len(drawn[i]) + sum(slot in one for one, _ in launched) < 4]
        if going:
            decoder.launch(going)
            launched.append((going, {slot: at[slot] for slot in going}))
        free = [slot for slot in (0, 1) if slot not in at and not any(slot in one for one, _ in launched)]
        if free and waiting:
            slot, i = free[0], waiting.pop(0)
            cache.reset(slot)
            with decoder.ordered():
                drawn[i], at[slot] = [decoder.join(slot, KINDS[i], forward(cache, slot, prompts[i]))], i
        if len(launched) > decoder.ahead or launched and not going:
            slots, owners = launched.pop(0)
            for slot, token in zip(slots, decoder.read()[0].tolist(), strict=True):
                drawn[owners[slot]].append(token)
                if len(drawn[owners[slot]]) == 4:
                    del at[slot]
    assert (getattr(decoder, "work", None) and decoder.work.recorded) is recorded
    for i, row in enumerate(KINDS):
        alone = Cache(engine.config, engine.scheme, 1, 140, ops)
        want = [next_token(np.array(ops.numpy(forward(alone, 0, prompts[i]))), row, 0)]
        step = ops.decoder(engine.model, alone, [RowSampling()], logits=True)
        while len(want) < 4:
            step.feed([0], want[-1:])
            step.launch([0])
            want.append(next_token(step.read()[1][0], row, len(want), want))
        assert drawn[i] == want, i


@on_each_backend
def test_a_row_draws_only_what_its_mask_allows(make, tmp_path, seed):
    _, engine, ops = of_backend(make, write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), "int2")
    cache = Cache(engine.config, engine.scheme, 2, 40, ops)
    batch = cache.batch_for([0, 1], [4, 4])
    logits = engine.model.step(np.arange(8), cache, batch, lambda logits: logits)[1]
    decoder = ops.decoder(engine.model, cache, None)

    def only(token: int) -> np.ndarray:
        allowed = np.zeros(5, np.uint32)
        allowed[token // 32] = 1 << token % 32
        return allowed.view(np.int32)

    assert decoder.join(0, RowSampling(Sampling(1.0, seed=seed)), logits[0], only(77)) == 77
    assert decoder.join(1, RowSampling(), logits[1]) == ops.numpy(logits)[1].argmax()
    for token in (31, 32, 159):
        decoder.allow(0, only(token))
        decoder.launch([0, 1])
        got = decoder.read()[0]
        assert got[0] == token and got[1] == decoder.logits_of(1).argmax()
