"""Quantized weights over several cards: every card's share is a slice of what one card has, bit for bit."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks.presets import arrays as arrays_of
from minioscar import engine
from minioscar.app import cli
from minioscar.arguments import with_weights
from minioscar.config import Config
from minioscar.errors import Failure, UserError
from minioscar.evaluation import fidelity
from minioscar.formats.plain import BITS
from minioscar.ops import cuda as one_card
from minioscar.oscar import SCHEMES
from minioscar.parallel import cuda, loading, shares
from minioscar.parallel.backend import SplitReference
from minioscar.parallel.collectives import Links
from minioscar.parallel.ranks import Ranks
from minioscar.parallel.shares import Slices
from minioscar.prompt_cache import PromptCache
from minioscar.quantized import Quantized, from_plain, has_form
from minioscar.weights import load, matrices
from minioscar.work_bytes import of_weights

from .quantized_files import KINDS, HostOps, write_quantized
from .test_parallel import over
from .test_parallel_kernels import (
    SIMULATED,
    TWO,
    _cards,
    _on_one_card,
    _simulated,
    check_answers,
    noise_of,
    split_engine,
)
from .test_quantized import random_plain
from .tiny import MOE, relative, write_model, write_talker

EIGHT = {"num_attention_heads": 8, "intermediate_size": 512}  # a share is 64 columns of o, and of down
THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 384}
EXPERTS = MOE | {"moe_intermediate_size": 128, "num_hidden_layers": 1}  # of two cards half a block of FP8
ALL = slice(None)
# As `near` of test_parallel.py. Matrices of these writers are twice as large and attention as much sharper: numbers of
# a cache in BF16 that were rounded the other way move log-probabilities by up to 1e-3, a wrong share by a third.
NEAR = 0.03


def layer_names(i: int, config: Config) -> dict[str, list[str]]:
    """The tensors that the matrices of a layer have, in their order."""
    names, experts = matrices(config), range(config.experts.count) if config.experts else [None]
    mlps = [f"model.layers.{i}.mlp.{'' if e is None else f'experts.{e}.'}" for e in experts]
    found = {
        "qkv": [f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "qkv"],
        "o": [f"model.layers.{i}.self_attn.o_proj.weight"],
        "gate_up": [f"{mlp}{n}_proj.weight" for mlp in mlps for n in ("gate", "up")],
        "down": [f"{mlp}down_proj.weight" for mlp in mlps],
    }
    assert all(name in names for of in found.values() for name in of)
    return found


def numbers(x) -> np.ndarray:
    """Of a matrix as a back end keeps it, of experts all their rows: float32."""
    x = x.dequantize() if isinstance(x, Quantized) else x.astype(np.float32)
    return x.reshape(-1, x.shape[-1])


def host(config: Config, cards: int, kind: type = HostOps) -> SplitReference:
    return SplitReference([kind() for _ in range(cards)], config)


def assert_slices(parts: list, config: Config, exact: dict[str, np.ndarray]) -> None:
    """exact: float32 by the names of 16-bit files."""
    for rank, part in enumerate(parts):
        share = Slices(config, len(parts), rank)
        for i, layer in enumerate(part.layers):
            for field, names in layer_names(i, config).items():
                want = np.concatenate([exact[name][share.within(name)] for name in names])
                got = getattr(layer, field)
                if not isinstance(got, Quantized):
                    want = want.astype(got.dtype).astype(np.float32)
                np.testing.assert_array_equal(numbers(got), want, err_msg=f"{field} of card {rank}")


@pytest.mark.parametrize(
    ("name", "cards", "changes"),
    [
        *((name, 2, {}) for name in KINDS),  # shares of 160 columns: groups of 64, 96 and 128 lie in both
        *((name, 8, EIGHT) for name in ("awq-gemm", "gptq-8", "ct-fp8-rows", "fp8")),
        *((name, 3, THREE) for name in ("gptq-v1", "ct-int4-zeros", "fp8-matrix")),
        *((name, 2, EXPERTS) for name in ("awq-gemm", "gptq-v1", "ct-int8", "fp8", "ct-w8a8")),
    ],
)
def test_shares_of_quantized_files_are_slices_of_what_they_stand_for(name, cards, changes, tmp_path, seed):
    """Codes stay codes: in the form that kernels read, and in the same one on all cards."""
    exact = write_quantized(tmp_path, name, seed, **changes)
    config = Config.from_folder(tmp_path)
    parts = loading.load_parts(tmp_path, config, host(config, cards))
    assert_slices(parts, config, exact)
    whole = load(tmp_path, config, HostOps())
    for field in ("qkv", "o", "gate_up", "down"):
        forms = {(x.kind, x.shape, x.group) if isinstance(x, Quantized) else x.shape
                 for x in (getattr(part.layers[0], field) for part in parts)}  # fmt: skip
        assert len(forms) == 1
        if isinstance(getattr(whole.layers[0], field), Quantized):
            assert isinstance(getattr(parts[0].layers[0], field), Quantized), field
    assert shares.joined(parts).layers[0].o.split == shares.SUMMED


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize(("cards", "changes"), [(2, {"intermediate_size": 192}), (4, EIGHT), (2, EXPERTS)])
def test_weights_are_quantized_as_on_one_card_and_then_cut(cards, changes, mode, fold, tmp_path, seed):
    """Groups of 64 that two cards share among them: 96 columns of down each."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 64, "vocab_size": 161}
    folder = write_model(tmp_path, seed, **shape | changes)
    config = with_weights(Config.from_folder(folder), mode)
    whole, ops = load(folder, config, HostOps(), fold=fold), host(config, cards)
    parts = loading.load_parts(folder, config, ops, fold)
    exact, experts = {}, config.experts.count if config.experts else 1
    for i, layer in enumerate(whole.layers):
        for field, names in layer_names(i, config).items():
            sizes = [config.q_size, config.kv_size, config.kv_size] if field == "qkv" else [None] * len(names)
            rows = numbers(getattr(layer, field))
            ends = np.cumsum(sizes)[:-1] if field == "qkv" else len(names)
            exact |= dict(zip(names, np.split(rows, ends), strict=True))
    assert len(exact) == config.num_layers * (4 + 3 * experts)
    if not fold:
        assert_slices(parts, config, exact)
    else:  # NumPy's products of unequally many heads may be rounded otherwise: a code is another one at near-ties
        for rank, part in enumerate(parts):
            share = Slices(config, cards, rank)
            for i, layer in enumerate(part.layers):
                for field, names in layer_names(i, config).items():
                    want = np.concatenate([exact[name][share.within(name)] for name in names])
                    same = np.mean(numbers(getattr(layer, field)) == want)
                    assert same == 1 if field != "qkv" else same > 0.99, (field, same)
    heads = zip(parts, ops.first_tokens, strict=True)
    for part, first in heads:
        np.testing.assert_array_equal(numbers(part.head), numbers(whole.head)[first : first + ops.share])
    assert {part.rotation for part in parts} == {whole.rotation} == {"folded" if fold else "none"}


@pytest.mark.parametrize("kv", ["bf16", "int2"])
@pytest.mark.parametrize(
    ("name", "cards", "changes"),
    [
        ("awq-gemm", 2, {}),
        ("gptq-v1", 4, EIGHT | {"tie_word_embeddings": True}),
        ("fp8", 8, EIGHT | {"model_type": "qwen3", "vocab_size": 161}),
        ("ct-int4-zeros", 3, THREE),
        ("ct-fp8-rows", 2, EXPERTS),
        ("awq-gemm", 2, EXPERTS | {"num_experts_per_tok": 6}),
    ],
)
def test_several_cards_compute_what_one_does_with_quantized_files(name, cards, changes, kv, tmp_path, seed):
    """Values are rotated by the model: those of two kv heads on eight cards, too."""
    write_quantized(tmp_path, name, seed, **changes)
    one, several = (over(tmp_path, kv, n) for n in (1, cards))
    assert several.model.weights.rotation == ("online" if kv == "int2" else "none")
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 160, n).tolist() for n in (125, 7)]
    assert relative(several.logits(prompts[0]), one.logits(prompts[0])) < 2e-5
    several.prefill(prompts[0]).save(tmp_path / "p.kv")
    cache = PromptCache.load(tmp_path / "p.kv", one)
    mine, theirs = (e.generate([5, 6], cache=c, max_tokens=1, logprobs=0).logprobs[0].logprob
                    for e, c in ((one, cache), (several, several.prefill(prompts[0]))))  # fmt: skip
    assert abs(mine - theirs) < NEAR
    for a, b in zip(*(e.generate(prompts, max_tokens=8, logprobs=1) for e in (one, several)), strict=True):
        for n, (mine, theirs) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            assert abs(mine.logprob - theirs.logprob) < NEAR
            if a.token_ids[n] != b.token_ids[n]:  # only where one card has them all but equal
                break


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_command_line_quantizes_over_several_cards(mode, tmp_path, capsys):
    folder = write_talker(tmp_path / "m", 1, intermediate_size=128)
    asked = "the cat", "--raw", "--device", "cpu", "--max-tokens", "4", "--json", "--weights", mode
    found = []
    for gpus in ((), ("--gpus", "2")):
        assert cli.main(["generate", str(folder), *asked, *gpus]) == 0
        found.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert found[0] == found[1]
    assert cli.main(["info", str(folder), "--device", "cpu", "--json", "--weights", mode, "--gpus", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == mode


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize(("name", "changes"), [("awq-gemm", {}), ("fp8", EIGHT), ("awq-gemm", EXPERTS), (None, {})])
@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_that_are_announced_are_those_that_cards_keep(name, changes, mode, tied, tmp_path, seed):
    """At most a few less: forms that a format might have count as the largest of them."""
    changes = changes | {"tie_word_embeddings": tied}
    if name is None:
        write_model(tmp_path, seed, hidden_size=64, head_dim=64, intermediate_size=192, **changes)
    else:
        write_quantized(tmp_path, name, seed, **changes)
    config = with_weights(Config.from_folder(tmp_path), mode)
    ops = host(config, 2)
    weights = shares.joined(loading.load_parts(tmp_path, config, ops))
    kept = sum(array.nbytes for array in arrays_of(weights)) - tied * weights.head.nbytes
    padding = 4 * 16 * ops.cards  # the row scales of a last tile that is not full
    assert kept - padding <= ops.weight_bytes(config) <= 1.08 * kept
    assert ops.weight_bytes(config) < 2 * of_weights(config, 2)


@pytest.mark.parametrize(
    ("name", "changes", "cards", "why"),
    [
        ("awq-gemm", EIGHT | {"head_dim": 32, "num_key_value_heads": 8}, 16, "fit 1, 2, 4 or 8$"),
        ("awq-gemm", {}, 4, "4 q heads, 2 kv heads and an MLP of 320 with groups of 64 columns fit 1 or 2$"),
        ("fp8", EIGHT | {"intermediate_size": 352}, 4, "an MLP of 352 with groups of 128 columns fit only 1$"),
        ("fp8-matrix", EIGHT | {"intermediate_size": 352}, 4, "an MLP of 352 fit 1 or 2$"),  # tiles of 16 rows
        ("ct-int4-16", {"num_attention_heads": 8, "head_dim": 16}, 8, "fit 1, 2 or 4$"),
    ],
)
def test_cards_that_do_not_fit_the_groups_are_refused_in_one_line(name, changes, cards, why, tmp_path):
    write_quantized(tmp_path, name, 1, **changes)
    with pytest.raises(UserError, match=why) as refused:
        over(tmp_path, "bf16", cards)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"--gpus {cards}: ")


def test_what_eight_cards_do_not_share_is_asked_of_config_json_alone():
    """Published shapes: what the message says fits is what was wanted."""
    def fits(kind: dict, **shape: int) -> list[int]:
        raw = {"model_type": "qwen2", "vocab_size": 1000, "max_position_embeddings": 4096, "head_dim": 128, **shape}
        return shares.fitting(Config.from_dict(raw | {"quantization_config": kind}))

    awq = KINDS["awq-gemm"].config | {"group_size": 128}
    qwen = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8}
    assert fits(awq, intermediate_size=29568, **qwen) == [1, 2, 4]  # Qwen2.5-72B: 231 groups, shares of 115.5 and 57.75
    assert fits(awq, intermediate_size=28672, **qwen) == [1, 2, 4, 8, 16, 32, 64]  # Llama-3.1-70B
    assert fits(KINDS["fp8"].config, intermediate_size=768, **qwen)[:4] == [1, 2, 4, 8]  # an expert of Qwen3-30B-A3B


@pytest.mark.parametrize("kind", BITS)
def test_columns_of_a_plain_form_are_cut_exactly(kind, seed):
    rng = np.random.default_rng(seed)
    for columns, group, width in ((320, 64, 160), (768, 128, 192), (320, 128, 64), (256, 256, 40), (320, 96, 32)):
        plain = random_plain(rng, kind, 48, columns, group)
        for first in range(0, columns, width):
            of = slice(first, min(first + width, columns))
            part = plain.cut_columns(of, np)
            np.testing.assert_array_equal(part.dequantize(np), plain.dequantize(np)[:, of])
            assert part.codes.flags.c_contiguous and part.shape == (48, of.stop - of.start)
            if part.scale.shape[1] == 1 or has_form(part.group):
                np.testing.assert_array_equal(from_plain(part).dequantize(), part.dequantize(np))
    assert plain.cut_columns(ALL, np) is plain.rows(ALL) is plain
    np.testing.assert_array_equal(plain.rows(slice(5, 21)).dequantize(np), plain.dequantize(np)[5:21])


def test_shares_of_another_form_than_others_are_refused(tmp_path):
    write_quantized(tmp_path, "fp8", 1)
    config = Config.from_folder(tmp_path)
    parts = loading.load_parts(tmp_path, config, host(config, 2))
    other = loading.load_parts(tmp_path, config, SplitReference([HostOps()] * 2, config))[1]
    vars(other.layers[0])["o"] = numbers(other.layers[0].o)
    with pytest.raises(UserError, match="--gpus 2: cards' shares of o have unequal forms"):
        shares.joined([parts[0], other])


def test_what_is_kept_as_numbers_is_said_once(tmp_path, seed, capsys):
    exact = write_quantized(tmp_path, "ct-int4-16", seed)
    config = Config.from_folder(tmp_path)
    parts = loading.load_parts(tmp_path, config, host(config, 2))
    assert_slices(parts, config, exact)
    why = "groups of 16 columns are neither a power of two from 32 on nor whole rows"
    assert capsys.readouterr().err.splitlines() == [f"[8 matrices are kept as bfloat16 numbers: {why}]"]


def test_where_weights_do_not_fit_the_cards_a_mode_that_does_is_named(tmp_path, monkeypatch):
    write_model(tmp_path, 1, hidden_size=64, intermediate_size=128)
    config = Config.from_folder(tmp_path)
    ops = host(config, 2)
    monkeypatch.setattr(HostOps, "free_bytes", lambda self: ops.weight_bytes(with_weights(config, "int8")))
    monkeypatch.setattr(SplitReference, "free_bytes", HostOps.free_bytes)
    with pytest.raises(UserError, match=r"GB on each of 2 cards, but only .* are free; --weights int8 fits"):
        loading.load_parts(tmp_path, config, ops)


def test_debug_names_damaged_codes_of_any_card(tmp_path):
    write_quantized(tmp_path, "awq-gemm", 1)
    config = Config.from_folder(tmp_path)
    ops = host(config, 2)
    weights = loading.load(tmp_path, config, ops, SCHEMES["int2"])
    weights.layers[1].down.row_scale.values[1][3] = np.nan
    e = engine.Engine(config, weights, None, SCHEMES["int2"], engine.Watch(ops, weights))
    with pytest.raises(Failure, match="layer 1: down projection: .* its weight is not finite"):
        e.generate([1, 2, 3], max_tokens=2)


def test_what_modes_cost_is_what_it_costs_on_one_card(tmp_path):
    folder = write_talker(tmp_path / "m", 1, intermediate_size=128)
    text = "the cat sat on the mat, and the dog saw that " * 40
    how = {"prefill": 130, "decode": 20, "device": "cpu", "weights": ["int8", "int4"], "text": text}
    one, two = (fidelity.evaluate(str(folder), ["int2"], gpus=n, **how)["results"] for n in (None, 2))
    assert [(row["kv"], row["weights"]) for row in one] == [(row["kv"], row["weights"]) for row in two]
    for a, b in zip(one, two, strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=0.1, abs=1e-5), a["weights"]


# --- by kernels


on_two = pytest.mark.parametrize(
    "make", [pytest.param(_simulated, id="simt", marks=SIMULATED),
             pytest.param(_on_one_card, id="on-one-card", marks=pytest.mark.gpu),
             pytest.param(_cards, id="cuda", marks=TWO)],
)


def one_at_a_time(make, monkeypatch) -> None:
    """The simulator runs one kernel at a time: its cards load one after the other, and sum what is large at once."""

    def added(links: Links, arrays: Ranks) -> None:
        total = sum(x.astype(np.float32) for x in arrays.values)
        for x in arrays.values:
            x[...] = total.astype(x.dtype)

    if make is _simulated:
        monkeypatch.setattr(loading, "ThreadPoolExecutor", lambda count: ThreadPoolExecutor(1))
        monkeypatch.setattr(Links, "sum_beside", added)
        monkeypatch.setattr(Links, "join", lambda links: None)


@pytest.mark.long
@on_two
def test_a_long_prompt_is_multiplied_with_what_codes_stand_for(make, tmp_path, seed, monkeypatch):
    """Each card dequantizes its share for cuBLAS, here of prompts that are longer than eight tokens."""
    one_at_a_time(make, monkeypatch)
    for module in (one_card, cuda):
        monkeypatch.setattr(module, "BATCH_TOKENS", 8)
    write_quantized(tmp_path, "awq-gemm", seed, num_hidden_layers=1, intermediate_size=192)
    reference, e = over(tmp_path, "int2", 1), split_engine(make, 2, tmp_path, "int2")
    ids = np.random.default_rng(seed).integers(0, 160, 20).tolist()
    assert relative(np.array(e.logits(ids)), reference.logits(ids)) < 0.03


@pytest.mark.long
@on_two
@pytest.mark.parametrize(("name", "changes"), [("awq-gemm", {}), ("fp8", {}), ("ct-int4", EXPERTS)])
def test_two_cards_by_kernels_are_the_quantized_model(make, name, changes, tmp_path, seed, monkeypatch):
    """A prompt and steps; every token takes all experts, so that BF16 does not choose among them."""
    one_at_a_time(make, monkeypatch)
    shape = {"num_hidden_layers": 1, "intermediate_size": 192}
    write_quantized(tmp_path, name, seed, **shape | {"model_type": "qwen3"} | changes | {"num_experts_per_tok": 6})
    reference, e = over(tmp_path, "int2", 1), split_engine(make, 2, tmp_path, "int2")
    assert isinstance(e.model.weights.layers[0].o, Quantized) and e.model.rotates_values
    ids = np.random.default_rng(seed).integers(0, 160, 12).tolist()
    noise = noise_of(reference, e, ids)
    check_answers(noise, *(of.generate([ids, ids[:5]], max_tokens=3, logprobs=3) for of in (reference, e)))
