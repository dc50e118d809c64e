"""The back end of several cards as it runs on two, over the simulator (simt/cards.py): everything happens while its own
card is the current one, in an order that ends."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.ops import cuda as one_card
from minioscar.oscar import SCHEMES
from minioscar.parallel import cards as gpus
from minioscar.parallel import collectives, cuda, loading
from minioscar.parallel.collectives import Gather, Sum
from minioscar.parallel.ranks import Ranks
from minioscar.prompt_cache import PromptCache
from minioscar.sampling import RowSampling, Sampling

from . import simt
from . import test_pictures as pictures
from .test_parallel import FAMILIES
from .test_parallel_kernels import check_answers, noise_of
from .tiny import load, relative, write_model

_no_simt = simt.missing()
pytestmark = pytest.mark.skipif(_no_simt is not None, reason=str(_no_simt))


@pytest.fixture
def two(monkeypatch):
    """Loads a model on two cards."""
    from .simt.cards import Card, Cards, Memory, SplitCards

    def made(folder: Path, kv: str, reach: bool = True) -> Engine:
        cards = Cards(2, reach)
        played = SimpleNamespace(cuda=cards.cuda, ascontiguousarray=Memory(cards).ascontiguousarray)
        monkeypatch.setitem(sys.modules, "cupy", played)
        monkeypatch.setitem(sys.modules, "cupy.cuda", cards.cuda)
        monkeypatch.setattr(one_card, "Cuda", lambda: Card(cards))
        config = Config.from_folder(folder)
        ops = gpus.over(2, Card(cards), config, SCHEMES[kv])
        weights = loading.load(folder, config, ops, SCHEMES[kv])
        return Engine(config, weights, None, SCHEMES[kv], ops, folder=folder)

    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setattr(cuda, "SplitCuda", SplitCards)
    monkeypatch.setattr(collectives, "PUSHED", 1 << 14)
    monkeypatch.setattr(cuda, "kernel", lambda *_: None)
    monkeypatch.setattr(cuda, "pinned", np.empty)
    return made


@pytest.mark.parametrize(("family", "kv"), [("llama with biases", "bf16"), ("qwen3_moe", "int2")])
def test_prompts_steps_and_graphs_of_two_cards(family, kv, two, tmp_path, seed):
    experts = {"moe_intermediate_size": 48, "num_experts_per_tok": 6}
    folder = write_model(tmp_path / "m", seed, **FAMILIES[family] | {"head_dim": 64, "num_hidden_layers": 1} | experts)
    reference, e = load(folder, kv), two(folder, kv)
    ids = np.random.default_rng(seed).integers(0, 160, 300).tolist()
    prompts, how = [ids[:9], ids[:5]], {"max_tokens": 3, "logprobs": 2}
    noise = noise_of(reference, e, ids[:9])
    for graph in (True, False) if kv == "bf16" else (True,):
        check_answers(noise, reference.generate(prompts, **how), e.generate(prompts, graph=graph, **how))
    if kv == "bf16":  # by cuBLAS and NCCL
        assert relative(np.array(e.logits(ids)), reference.logits(ids)) < 0.04


def test_rows_that_join_and_a_cache_that_is_saved_on_two_cards(two, tmp_path, seed):
    folder = write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1)
    e, ids = two(folder, "int2"), np.random.default_rng(seed).integers(0, 160, 40)
    cache = e.new_cache(2, 256)
    decoder = e.ops.decoder(e.model, cache, None)
    for slot, end in ((1, 40), (0, 7)):
        with decoder.ordered():
            batch = cache.batch_for([slot], [end])
            first = e.model.step(ids[:end], cache, batch, lambda logits: logits)[1]
        decoder.join(slot, RowSampling(Sampling(0.7, seed=3, presence_penalty=0.5)), first[0])
    for slots in ([0, 1], [0], [0, 1]):
        decoder.launch(slots)
        decoder.read()
        assert all(np.isfinite(decoder.logits_of(slot)).all() for slot in slots)
    decoder.drain()
    cache.swap(0, 1)
    e.prefill(ids.tolist()).save(tmp_path / "a.kv")
    saved = PromptCache.load(tmp_path / "a.kv", e)
    a, b = (e.generate([5], cache=of, max_tokens=2, logprobs=0) for of in (saved, e.prefill(ids.tolist())))
    assert a.logprobs == b.logprobs


@pytest.mark.parametrize("reach", [True, False])
def test_a_picture_is_read_on_the_first_card_and_goes_to_the_second(reach, two):
    """Card to card, or through the host; its rows and DeepStack stand in the embeddings of both."""
    model = two(pictures.FOLDER, "bf16", reach)
    found = pictures.logits(model, *pictures.prompt("row"), every=False)[0]
    assert relative(np.array(found), pictures.reference()["row_logits"][-1]) < 0.03
    for features in model.model.encoder.kept.values():
        for made in (features.embeddings, *features.deep):
            assert [x.card for x in made.values] == [0, 1]
            np.testing.assert_array_equal(*(x.view(np.ndarray) for x in made.values))


def test_what_is_used_on_another_card_is_found(two, tmp_path, seed):
    e = two(write_model(tmp_path / "m", seed, head_dim=64, num_hidden_layers=1), "bf16")
    embed = e.model.weights.embed.values[1]
    with pytest.raises(AssertionError, match="of card 1, while card 0 is the current one"):
        embed + embed
    part = e.ops.xp.zeros((1, 64), embed.dtype)
    launch = cuda.launch_of(e.ops.links.all_reduce(part, None, part), 0)
    with e.ops.on(0):
        e.ops.ranks[0].run(launch)
        with pytest.raises(AssertionError, match="card 0, which waits for a launch on another one"):
            e.ops.ranks[0].numpy(part.values[0])
    e.ops.first.cards.queues[0].clear()


# --- cards that do not reach each other's memory


def test_cards_that_do_not_reach_each_other_sum_and_gather_by_nccl(two, tmp_path, seed, capsys):
    """Prompts, recorded steps and their graphs. The vocabulary is odd: the cards' shares of it overlap."""
    changes = {"head_dim": 64, "num_hidden_layers": 1, "vocab_size": 161}
    folder = write_model(tmp_path / "m", seed, **FAMILIES["llama with biases"] | changes)
    reference, e = load(folder, "bf16"), two(folder, "bf16", reach=False)
    line = "[GPUs 0 and 1 do not reach each other's memory: sums go through NCCL and the host, slower]\n"
    assert capsys.readouterr().err == line
    played, launched = e.ops.first.cards, []
    assert played.enabled == [] and played.cuda.nccl.is_connected and e.ops.links.inbox.size == 0
    ids = np.random.default_rng(seed).integers(0, 161, 300).tolist()
    prompts, how = [ids[:9], ids[:5]], {"max_tokens": 3, "logprobs": 2}
    noise, want, run = noise_of(reference, e, prompts[0]), reference.generate(prompts, **how), e.ops.run
    e.ops.run = lambda launch: (launched.append(launch), run(launch))
    answers = [e.generate(prompts, graph=graph, **how) for graph in (True, False)]
    check_answers(noise, want, answers[0])
    for graph, launches in zip(*answers, strict=True):
        assert graph.token_ids == launches.token_ids and graph.logprobs == launches.logprobs
    kinds = {type(launch) for launch in launched}
    assert {Sum, Gather} < kinds and not [x for x in launched if getattr(x, "source", "").startswith("parallel/")]
    assert relative(np.array(e.logits(ids)), reference.logits(ids)) < 0.04  # by cuBLAS, in chunks


@pytest.mark.parametrize("vocab", [160, 161])
def test_every_card_has_the_logits_of_all_shares(vocab, two, tmp_path, seed):
    """Gathered by NCCL they are those that are pushed, bit for bit; where they lie until then is counted."""
    folder, rng = write_model(tmp_path / "m", seed, head_dim=64, vocab_size=vocab), np.random.default_rng(seed)
    whole, counted = rng.standard_normal((3, vocab)).astype(np.float32), []
    for reach in (True, False):
        ops = two(folder, "bf16", reach).ops
        parts = [np.ascontiguousarray(whole[:, first : first + ops.share]) for first in ops.first_tokens]
        part = Ranks(ops.each(lambda one, x: one.xp.asarray(x), Ranks(parts)))
        out = ops.xp.zeros((3, vocab), np.float32)
        ops.run(gather := ops.links.gather(part, out, ops.first_tokens))
        for found in ops.each(lambda one, x: one.numpy(x), out):
            np.testing.assert_array_equal(found, whole)
        counted.append(ops.work_bytes(ops.config, 3, 64, rows=3))
    assert counted[1] - counted[0] == gather.shares.nbytes
