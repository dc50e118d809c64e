"""minioscar/parallel on simulated cards: N reference back ends that split and sum, against one of the whole model."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bench
from benchmarks.models import step_bytes
from benchmarks.presets import arrays
from minioscar import engine
from minioscar.app import cli
from minioscar.cache import Cache
from minioscar.config import Config
from minioscar.errors import Failure, UserError
from minioscar.evaluation import fidelity
from minioscar.options import Options
from minioscar.oscar import SCHEMES
from minioscar.parallel import shares
from minioscar.parallel.cuda import SplitCuda
from minioscar.prompt_cache import PromptCache
from minioscar.sampling import Sampling
from minioscar.serve.blocks import chained_keys
from minioscar.serve.pooled import PooledCache
from minioscar.storage import hub
from minioscar.storage.checkpoint import Tensor
from minioscar.weights import expected

from .test_serve_scheduler import Asked, alone, close, prompt, running, submit
from .tiny import MOE, load, relative, write_model, write_talker

FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral, one head each": {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 3},
    # eight cards have the same kv head four and four; the shares of 161 tokens overlap
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 161,
              "tie_word_embeddings": True},
    "qwen3_moe": MOE | {"norm_topk_prob": True},
}  # fmt: skip
CARDS = {"llama": (1, 2, 4), "qwen2": (3, 6), "qwen3": (2, 8), "mistral, one head each": (4,)}
CACHES = ("bf16", "int2", "oscar", "quarot", "k3v2")


def cases() -> list[tuple[str, int, str]]:
    """Every number of cards with a plain and a packed cache; every kind of cache with one number."""
    found = [(family, cards, kv) for family in FAMILIES for cards in CARDS.get(family, (2,)) for kv in CACHES[:2]]
    return found + [("qwen3", 2, kv) for kv in CACHES[2:]]


def near(kv: str) -> float:
    """How far apart logits may be, relative, and log-probabilities, where a cache is read: sums in another order differ
    by 1e-6, and a cached number in BF16, or a code of few bits, at a near-tie is rounded the other way then. A
    block or a row that is read in a wrong place moves them by a third and more."""
    return 1e-3 if kv == "bf16" else 0.03


def over(folder: Path, kv: str, cards: int) -> engine.Engine:
    return engine.load(folder, kv, "cpu", tokenizer=False, gpus=cards)


@pytest.mark.parametrize(("family", "cards", "kv"), cases())
def test_several_cards_compute_what_one_does(family, cards, kv, tmp_path, seed):
    """Logits of a prompt, and greedy answers to two prompts of unequal lengths over the flush of a window."""
    folder = write_model(tmp_path / "m", seed, **FAMILIES[family])
    one, several = load(folder, kv), over(folder, kv, cards)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 160, n).tolist() for n in (125, 7)]
    assert relative(several.logits(prompts[0]), one.logits(prompts[0])) < 1e-5
    options = {"max_tokens": 8, "logprobs": 1}
    for a, b in zip(one.generate(prompts, **options), several.generate(prompts, **options), strict=True):
        for n, (mine, theirs) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            if a.token_ids[n] != b.token_ids[n]:  # only where one card has them all but equal
                assert abs(mine.logprob - theirs.logprob) < near(kv)
                break
            assert abs(mine.logprob - theirs.logprob) < near(kv)


@pytest.mark.parametrize("kv", ["bf16", "int2", "oscar"])
def test_a_prompt_cache_does_not_depend_on_the_number_of_cards(kv, tmp_path, seed):
    folder = write_model(tmp_path / "m", seed, num_attention_heads=8, num_key_value_heads=2)
    engines = {1: load(folder, kv), 2: over(folder, kv, 2), 4: over(folder, kv, 4)}
    ids = np.random.default_rng(seed).integers(0, 160, 300).tolist()
    want = engines[1].generate([5, 6], cache=engines[1].prefill(ids), max_tokens=6).token_ids
    for cards, made_by in engines.items():
        made_by.prefill(ids).save(tmp_path / f"{cards}.kv")
        for other, read_by in engines.items():
            cache = PromptCache.load(tmp_path / f"{cards}.kv", read_by)
            assert read_by.generate([5, 6], cache=cache, max_tokens=6).token_ids == want, (cards, other)
    rows = [PromptCache.load(tmp_path / f"{cards}.kv", engines[1]).rows for cards in engines]
    for layers in zip(*rows, strict=True):
        for name in layers[0]:
            whole, *split = (layer[name] for layer in layers)
            for other in split:
                same = np.mean(whole.view(np.uint8) == other.view(np.uint8))
                assert whole.shape == other.shape and same > 0.98, (name, same)


def test_each_card_has_the_norms_of_the_whole_model(tmp_path, seed):
    """A token's norm is over all kv heads: every card computes all keys, and keeps its own."""
    folder = write_model(tmp_path / "m", seed, num_attention_heads=8, num_key_value_heads=4, model_type="qwen3")
    one, several = load(folder, "oscar"), over(folder, "oscar", 4)
    ids, found = np.random.default_rng(seed).integers(0, 160, 200), []
    for e in (one, several):
        cache = e.new_cache(1, 256)
        e.model.forward(ids, cache, cache.batch_for([0], [200]))
        found.append(cache)
    for whole, split in zip(*(cache.layers for cache in found), strict=True):
        assert len({id(norms) for norms in split["norms"].values}) == 4
        for norms in split["norms"].values:
            # Of keys in BF16: one that is rounded the other way is up to 2^-7 of itself away, and four deviations have
            # 16 of some 128 squares. Few tokens have such a key. Norms of the card's own heads are half as large.
            off = abs(norms.ravel()[:200] / whole["norms"].ravel()[:200] - 1)
            print(f"{(off > 2**-20).mean():.3f} off, {(off > 2**-12).mean():.3f} beyond 2^-12, {off.max():.1e}")
            assert off.max() < 2**-10 and (off > 2**-12).mean() <= 0.01 and np.median(off) < 2**-20
        assert [keys.shape for keys in split["window_keys"].values] == [(1, 1, 128, 32)] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_cover_every_tensor_once(family, tmp_path):
    """All rows and columns of what is split, in order; what is not split is on every card."""
    config = Config.from_folder(write_model(tmp_path / "m", 0, **FAMILIES[family]))
    for name, shape in expected(config).items():
        for cards in shares.fitting(config):
            covered = np.zeros(shape, int)
            for rank in range(cards):
                slices = shares.Slices(config, cards, rank)
                axis, over_what = slices._split(name)
                covered[(slice(None),) * (axis or 0) + ((slices.of[over_what],) if over_what else ())] += 1
            same = 1 if "kv" not in over_what else max(cards // config.num_kv_heads, 1)
            if over_what == "vocab":
                assert covered.min() == 1 and covered.max() <= 2
            else:
                assert (covered == (same if over_what else cards)).all(), name


def test_rows_of_a_tensor_are_one_stretch_of_its_file(tmp_path):
    config = Config.from_folder(write_model(tmp_path / "m", 0))
    data = np.arange(160 * 64, dtype=np.float32)
    tensor = Tensor("F32", (128, 64), 64, 128 * 64 * 4, None, data.view(np.uint8))
    part = shares.Slices(config, 2, 1).rows("model.layers.0.self_attn.q_proj.weight", tensor)
    assert part.shape == (64, 64)
    np.testing.assert_array_equal(part.array, tensor.array[64:])


@pytest.mark.parametrize(("family", "cards"), [("llama", 2), ("qwen3", 8), ("qwen3_moe", 2)])
@pytest.mark.parametrize("kv", ["bf16", "int2", "oscar"])
def test_memory_of_all_cards_is_predicted(family, cards, kv, tmp_path):
    folder = write_model(tmp_path / "m", 0, **FAMILIES[family])
    e = over(folder, kv, cards)
    cache = e.new_cache(2, 300)
    assert cache.nbytes == e.ops.cache_bytes(e.config, e.scheme, 2, 300)
    weights = e.model.weights
    tied = weights.head.nbytes if e.config.tie_embeddings else 0  # slices of the embedding
    feedback = sum(layer.key_feedback.nbytes for layer in weights.layers) if e.scheme.shaped else 0
    assert sum(array.nbytes for array in arrays(weights)) - tied - feedback == e.ops.weight_bytes(e.config)


@pytest.mark.parametrize(
    ("changes", "cards", "why"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 64}, 3,
         "--gpus 3: 32 q heads, 8 kv heads and an MLP of 96 fit 1, 2, 4, 8, 16 or 32"),
        ({"intermediate_size": 98}, 4, "an MLP of 98 fit 1 or 2"),
        ({}, 0, "--gpus 0 is out of range"),
        ({}, 2.0, "--gpus 2.0 is not a whole number"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(changes, cards, why, tmp_path):
    folder = write_model(tmp_path / "m", 0, **changes)
    with pytest.raises(UserError, match=why) as refused:
        over(folder, "int2", cards)
    assert "\n" not in str(refused.value)


def test_calibrated_schemes_are_refused_by_name(tmp_path):
    folder = write_model(tmp_path / "m", 0)
    calibrated = next(name for name, scheme in SCHEMES.items() if scheme.calibrated)
    with pytest.raises(UserError, match=f"--kv {calibrated}"):
        over(folder, calibrated, 2)


def test_rows_are_copied_swapped_and_cut_on_all_cards(tmp_path, seed):
    folder = write_model(tmp_path / "m", seed)
    one, several = load(folder, "int2"), over(folder, "int2", 2)
    ids, found = np.random.default_rng(seed).integers(0, 160, 200), []
    for e in (one, several):
        cache = Cache(e.config, e.scheme, 3, 256, e.ops)
        e.model.forward(ids, cache, cache.batch_for([0], [200]))
        cache.copy(0, 2)
        cache.swap(2, 1)
        cache.truncate(1, 190)
        rest = ids[int(cache.lengths[1]) : 195]
        found.append(e.model.forward(rest, cache, cache.batch_for([1], [len(rest)])))
        assert math.isfinite(float(found[-1].sum()))
    assert relative(found[1], found[0]) < near("int2")


@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_rows_share_blocks_of_a_pool_and_wait_on_the_host(kv, tmp_path, seed):
    """As the server has them: a prefix taken over by another row, a row whose blocks go to the host and come back."""
    folder = write_model(tmp_path / "m", seed)
    ids, found = np.random.default_rng(seed).integers(0, 160, 300), []
    for e in (load(folder, kv), over(folder, kv, 2)):
        cache = e.new_cache(2, 512, partial(PooledCache, blocks=6))
        cache.reserve(0, 290)
        e.model.forward(ids[:290], cache, cache.batch_for([0], [290]))
        left = cache.take_over(0, 1, 280)
        if e.scheme.quantized:
            cache.swap_out(0)
        cache.reserve(1, 300)
        found.append([e.model.forward(ids[left:300], cache, cache.batch_for([1], [300 - left]))])
        cache.reset(1)
        cache.reserve(0, 292)
        found[-1].append(e.model.forward(ids[:2], cache, cache.batch_for([0], [2])))
    for one, several in zip(*found, strict=True):
        assert relative(several, one) < near(kv)


def test_a_card_that_fails_ends_the_run_with_a_line_that_names_it(monkeypatch):
    class Error(RuntimeError):
        pass

    here = SimpleNamespace(CUDARuntimeError=Error, CUDADriverError=Error)
    fake = SimpleNamespace(Device=lambda rank: nullcontext(), runtime=here, driver=here)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=fake))
    monkeypatch.setitem(sys.modules, "cupy.cuda", fake)
    ops = SplitCuda.__new__(SplitCuda)
    ops.devices, ops.streams = [0, 1], [None, None]
    with pytest.raises(Failure, match=r"GPU 1 of 2 has failed \(an illegal memory access\)"), ops.on(1):
        raise Error("an illegal memory access")


def test_blocks_come_back_from_the_host_to_all_cards(tmp_path, seed):
    """Bit for bit: a prompt goes on over them as over blocks that nobody else was given."""
    e = over(write_model(tmp_path / "m", seed), "int2", 2)
    ids, found = np.random.default_rng(seed).integers(0, 160, 460).tolist(), []
    for blocks in (4, 8):
        cache = e.new_cache(2, 512, partial(PooledCache, blocks=blocks, on_host=8))
        cache.reserve(0, 400)
        e.model.forward(np.array(ids[:400]), cache, cache.batch_for([0], [400]))
        cache.publish(0, ids[:400])
        cache.reset(0)
        cache.reserve(1, 512)  # 4 blocks, for another text
        e.model.forward(np.array(ids[:400][::-1]), cache, cache.batch_for([1], [400]))
        cache.reset(1)
        left = cache.begin_with(0, cache.match(list(chained_keys(ids)), 460))
        assert left and cache.restored == (left // 128 if blocks == 4 else 0)
        cache.reserve(0, 460)
        found.append(e.model.forward(np.array(ids[left:]), cache, cache.batch_for([0], [460 - left])))
    np.testing.assert_array_equal(*found)


def test_debug_names_damaged_weights_of_any_card(tmp_path):
    e = engine.load(write_model(tmp_path / "m", 1), "int2", "cpu", tokenizer=False, gpus=2, debug=True)
    e.model.weights.layers[1].down.values[1][3, 5] = np.nan
    with pytest.raises(Failure, match="layer 1: down projection: .* its weight is not finite"):
        e.generate([1, 2, 3], max_tokens=2)


def test_fidelity_is_that_of_one_card(tmp_path):
    folder = write_talker(tmp_path / "m", 1)
    text, how = "the cat sat on the mat, and the dog saw that " * 40, {"prefill": 130, "decode": 20, "device": "cpu"}
    one, two = (fidelity.evaluate(str(folder), ["oscar", "int2", "kivi"], text=text, gpus=n, **how) for n in (None, 2))
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["kv"] == b["kv"] and a["kl"] == pytest.approx(b["kl"], rel=0.1, abs=1e-6)
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-2)


@pytest.mark.long
def test_a_server_over_two_cards_answers_what_one_does(tmp_path, seed):
    """Three rows in a pool of four blocks: some wait on the host, on both cards' memory."""
    folder = write_talker(tmp_path / "m", 3, num_hidden_layers=1, max_position_embeddings=4096)
    one, two = (engine.load(folder, "int2", "cpu", gpus=gpus) for gpus in (1, 2))
    rng, how = np.random.default_rng(seed), Options(170, Sampling(0.9, seed=8), ignore_eos=True)
    asked = [Asked(prompt(rng, size), how, sequence=i) for i, size in enumerate((100, 110, 120))]
    with running(two, slots=3, blocks=4) as scheduler:
        submit(scheduler, *asked)
        answers = [each.answers() for each in asked]
        assert scheduler.metrics.swapped_out >= scheduler.metrics.swapped_in > 0
    assert all(close(got, alone(one, each)) for each, got in zip(asked, answers, strict=True))


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line_takes_gpus(tmp_path, capsys):
    folder = write_talker(tmp_path / "m", 1)
    asked = "the cat", "--raw", "--device", "cpu", "--max-tokens", "4", "--json"
    texts = [json.loads(run(capsys, "generate", folder, *asked, *gpus)[1]) for gpus in ((), ("--gpus", "2"))]
    assert texts[0]["token_ids"] == texts[1]["token_ids"] and texts[0]["kv_bytes"] < texts[1]["kv_bytes"]
    code, _, err = run(capsys, "generate", folder, *asked, "--gpus", "3")
    assert code == 2 and err == "minioscar: --gpus 3: 4 q heads, 2 kv heads and an MLP of 96 fit 1, 2 or 4\n"
    one, two = (json.loads(run(capsys, "info", folder, "--device", "cpu", "--json", *gpus)[1])
                for gpus in ((), ("--gpus", "2")))  # fmt: skip
    assert (one["gpus"], two["gpus"]) == (1, 2) and one["weight_bytes"] < two["weight_bytes"] < 2 * one["weight_bytes"]
    code, out, _ = run(capsys, "info", folder, "--device", "cpu", "--gpus", "2")
    assert code == 0 and f"on each of 2 cpu cards: weights {two['weight_bytes'] / 2e6:.1f} MB" in out


def test_the_bench_holds_several_cards_against_the_limit_of_all(tmp_path, capsys):
    folder = write_model(tmp_path / "m", 1)
    asked = "decode", "--model", folder, "--device", "cpu", "--quick", "--kv", "int2", "--gpus", "2"
    assert bench.main([*map(str, asked), "--json", str(tmp_path / "f.json")]) == 0
    report = json.loads((tmp_path / "f.json").read_text())
    (row,) = report["decode"]
    limit = row["bytes"] / (2 * report["ceilings"]["copy_tb_s"] * 1e12)
    assert row["gpus"] == 2 and row["fraction_of_limit"] == pytest.approx(limit / (row["ms"] * 1e-3))
    e, whole = over(folder, "int2", 2), load(folder, "int2")
    twice = [step_bytes(of, 1, 128) for of in (e, whole)]
    assert row["bytes"] == twice[0] and twice[1] < twice[0] < 2 * twice[1]
    assert bench.main(["memory", "--model", str(folder), "--device", "cpu", "--gpus", "2"]) == 2
    assert "--gpus 2 is for decode, prefill and throughput" in capsys.readouterr().err


@pytest.mark.long
def test_smollm2_over_three_cards_answers_as_on_one():
    """Its three kv heads, one on each."""
    model = hub.resolve("smollm2-135m")
    answers = [
        engine.load(model, "int2", "cpu", gpus=cards).generate("The capital of France is", max_tokens=12, chat=False)
        for cards in (None, 3)
    ]
    assert answers[0].token_ids == answers[1].token_ids and answers[1].text.startswith(" Paris")
