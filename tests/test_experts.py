"""Experts: the router against its definition, and the kernels against float64, simulated and on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.config import Config, Experts
from minioscar.experts import plans as experts
from minioscar.experts.plans import Product, Routes
from minioscar.experts.reference import route
from minioscar.formats.plain import BITS, Plain
from minioscar.ops import linear
from minioscar.ops.launch import Card
from minioscar.ops.reference import Reference
from minioscar.quantized import Quantized, from_plain, mapped
from minioscar.quantized import plans as quantized

from .kernel_device import on_each_device, on_each_device_over, on_the_card
from .tiny import CONFIG, MOE

EPS, CARD = 1e-5, Card(3, 80)


def test_a_router_takes_the_largest_logits_and_of_equal_ones_the_first():
    logits = np.array([[1, 3, 2, 3, 0], [0, 0, -0.0, 0, 0], [-1, -np.inf, 5, 5, 5]], np.float32)
    chosen, weights = route(logits, Experts(5, 3, True))
    assert chosen.tolist() == [[1, 3, 2], [0, 1, 2], [2, 3, 4]]
    assert weights.dtype == np.float32 and np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights[0], np.exp([0, 0, -1]) / (2 + np.exp(-1)))
    _, of_all = route(logits, Experts(5, 3, False))
    assert np.allclose(of_all[1], 1 / 5) and np.allclose(of_all[0], np.exp([3, 3, 2]) / np.exp(logits[0]).sum())


@pytest.mark.parametrize("normalized", [False, True])
def test_the_reference_adds_what_each_expert_makes_of_a_token_by_its_weight(normalized, seed):
    rng, config = np.random.default_rng(seed), Config.from_dict({**CONFIG, **MOE, "norm_topk_prob": normalized})
    shapes = {"post_norm": (64,), "router": (6, 64), "gate_up": (6, 48, 64), "down": (6, 64, 24)}
    layer = SimpleNamespace(**{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    x = rng.normal(size=(9, 64)).astype(np.float32)
    want = x.astype(np.float64)
    for token, h in enumerate(Reference().rms_norm(x, layer.post_norm, config.rms_norm_eps).astype(np.float64)):
        p = np.exp(layer.router @ h) / np.exp(layer.router @ h).sum()
        for expert in np.argsort(-p)[:2]:
            gate, up = np.split(layer.gate_up[expert] @ h, 2)
            weight = p[expert] / (np.sort(p)[-2:].sum() if normalized else 1)
            want[token] += weight * (layer.down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    got = Reference().experts(x, layer, config, None)
    assert got.dtype == np.float32 and np.abs(got - want).max() < 1e-5 * np.abs(want).max()


# --- kernels


@dataclass
class Case:
    """Random numbers of a layer. load: which logits: "random", "one" (all tokens take the same experts), "skewed" (a
    few experts have most pairs, some have none) or "ties" (of few values)."""

    e: Experts
    tokens: int
    hidden: int
    inter: int
    seed: int
    load: str = "random"
    form: tuple[str, int] | None = None  # kind and group of quantized matrices

    def __post_init__(self) -> None:
        rng, e = np.random.default_rng(self.seed), self.e
        self.x = rng.normal(size=(self.tokens, self.hidden)).astype(BF16)
        self.norm = rng.uniform(0.5, 1.5, self.hidden).astype(BF16)
        self.gate_up = self._matrix(rng, e.count, 2 * self.inter, self.hidden)
        self.down = self._matrix(rng, e.count, self.hidden, self.inter)
        self.coded: dict[str, Quantized] = {}
        for name in ("gate_up", "down") if self.form else ():
            matrix = getattr(self, name)
            self.coded[name] = random_codes(rng, *self.form, math.prod(matrix.shape[:2]), matrix.shape[2])
            setattr(self, name, self.coded[name].dequantize().reshape(matrix.shape))
        self.logits = rng.normal(size=(self.tokens, e.count)).astype(np.float32)
        if self.load == "one":
            self.logits[:] = self.logits[0]
        elif self.load == "skewed":
            self.logits += 3 * np.log1p(np.arange(e.count, dtype=np.float32))
        elif self.load == "ties":
            self.logits = np.round(self.logits)

    @staticmethod
    def _matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(BF16)

    def rows(self, chosen: slice) -> Case:
        """The case of some of the tokens."""
        other = Case(self.e, 1, self.hidden, self.inter, self.seed, self.load)
        for name in ("norm", "gate_up", "down", "coded"):
            setattr(other, name, getattr(self, name))
        other.x, other.logits = self.x[chosen], self.logits[chosen]
        other.tokens = len(other.x)
        return other

    def normed(self) -> np.ndarray:
        """The norm in float64, not rounded."""
        x = self.x.astype(np.float64)
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPS) * self.norm.astype(np.float64)

    def routes(self) -> tuple[np.ndarray, np.ndarray]:
        """Chosen experts, [tokens, per_token], and their weights in float64."""
        chosen, _ = route(self.logits, self.e)
        p = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        own = np.take_along_axis(p, chosen, axis=1)
        return chosen, own / (own if self.e.normalized else p).sum(axis=1, keepdims=True)


def random_codes(rng: np.random.Generator, kind: str, group: int, rows: int, columns: int) -> Quantized:
    """A matrix of numbers of about the size of `Case._matrix`'s, with zeros and scales of both signs."""
    groups, bits = -(-columns // group), BITS[kind]
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scale = rng.uniform(0.5, 1.5, (rows, groups)) * rng.choice([-1, 1, 1], (rows, groups)) / np.sqrt(columns)
    if kind == "e4m3":
        codes[codes & 127 == 127] -= 1
        scale = (scale / 100)[np.arange(rows) // 16 * 16] if groups > 1 else scale / 100
        return from_plain(Plain(kind, codes, scale.astype(np.float32), None, group, np.dtype(np.float32)))
    scale = (scale / 2 ** (bits - 2)).astype(np.float16)
    zero = rng.integers(0, 1 << bits, (rows, groups)).astype(np.float32)
    return from_plain(Plain(kind, codes, scale.astype(np.float32), zero, group, scale.dtype))


def run(
    device: Any, case: Case, card: Card = CARD, order: int = 0, few: bool | None = None, lengths: Any = None
) -> dict[str, np.ndarray]:
    """What the kernels compute: h, y, and of many tokens the routes. few: None: as many tokens as there are decide."""
    e, tokens = case.e, case.tokens
    there = {name: device.array(getattr(case, name)) for name in ("x", "norm", "logits")}
    there |= {name: mapped(case.coded.get(name, getattr(case, name)), device.array) for name in ("gate_up", "down")}
    h, found = device.empty((tokens * e.per_token, case.inter), BF16), {}
    if tokens <= experts.FEW if few is None else few:
        norm, logits = (there["norm"], EPS), there["logits"]
        up = Product(there["x"], there["gate_up"], h, True, norm=norm)
        down = Product(h, there["down"], there["x"], False, residual=there["x"])
        launches = [product.launch(logits, e, card, lengths) for product in (up, down)]
    else:
        normed, routes = device.empty(case.x.shape, BF16), routes_of(device, tokens, e, card, bool(case.coded))
        parts = device.empty((tokens * e.per_token, case.hidden), np.float32)
        launches = [linear.rms_norm(there["x"], there["norm"], EPS, normed)]
        launches += routes.launches(there["logits"], e, lengths)
        if routes.of_warpgroups:
            normed, given = device.empty((len(parts), case.hidden), BF16), normed
            launches += [experts.gather(given, routes, e, normed, h)]
        for name in ("gate_up", "down") if case.coded and routes.of_warpgroups else ():
            weight, dense = there[name], device.empty(there[name].shape, BF16)
            launches += [quantized.dequantize(weight, dense)]
            there[name] = dense.reshape(getattr(case, name).shape)
        launches += [Product(normed, there["gate_up"], h, True).launch(routes, e, card)]
        launches += [Product(h, there["down"], parts, False).launch(routes, e, card)]
        launches += [experts.combine(parts, there["x"], e, lengths)]

    def values(x: Any) -> np.ndarray:
        return np.array(device.numpy(x, allow_unwritten=lengths is not None))  # of rows that are not in use

    for launch in launches:
        device.run(launch, arch=90 if launch.source.startswith("sm90") else 80, seed=order)
    if len(launches) > 2:
        found = {name: values(getattr(routes, name)) for name in ("chosen", "weights", "sorted")}
        count = int(device.numpy(routes.entries[:1])[0, 0])
        found["columns"] = np.array(routes.columns)
        found["entries"] = np.array(device.numpy(routes.entries[1 : 1 + count]))
        if routes.of_warpgroups:  # h is in the order of `sorted`
            found["h"] = np.empty_like(values(h))
            found["h"][found["sorted"]] = values(h)
    return {"h": values(h)} | found | {"y": np.array(device.numpy(there["x"]))}


def routes_of(device: Any, tokens: int, e: Experts, card: Card = CARD, coded: bool = False) -> Routes:
    return Routes.allocate(SimpleNamespace(empty=device.empty), tokens, e, card, coded)


def check(case: Case, got: dict[str, np.ndarray]) -> None:
    e, (chosen, weights) = case.e, case.routes()
    if "chosen" in got:
        check_routes(case, got)
    x, weight = np.repeat(case.normed(), e.per_token, axis=0), weights.reshape(-1, 1)
    y, size = products(x, case.gate_up, chosen)
    error = size * (2.0**-8 + 2.0**-19)  # the norm is rounded to BF16 and may be to the other side; sums are float32
    (gate, up), (gate_error, up_error) = np.split(y, 2, axis=1), np.split(error, 2, axis=1)
    h = weight * gate / (1 + np.exp(-gate)) * up
    error = weight * (1.1 * gate_error * abs(up) + abs(gate) * up_error + 1.1 * gate_error * up_error)
    assert np.all(abs(got["h"].astype(np.float64) - h) <= error + (2.0**-8 + 2.0**-18) * abs(h))

    h = got["h"].astype(np.float64)  # as it is
    parts, size = (a.reshape(case.tokens, e.per_token, -1).sum(axis=1) for a in products(h, case.down, chosen))
    y = case.x.astype(np.float64) + parts
    error = 2.0**-20 * (size + abs(case.x.astype(np.float64))) + 2.0**-8 * abs(y)
    assert np.all(abs(got["y"].astype(np.float64) - y) <= error)


def products(x: np.ndarray, matrices: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every pair's x with the matrix of its expert, and of their sizes; in float64."""
    y, size = (np.zeros((len(x), matrices.shape[1])) for _ in range(2))
    for expert in np.unique(chosen):
        pairs, matrix = np.flatnonzero(chosen.reshape(-1) == expert), matrices[expert].astype(np.float64).T
        y[pairs], size[pairs] = x[pairs] @ matrix, abs(x[pairs]) @ abs(matrix)
    return y, size


def check_routes(case: Case, got: dict[str, np.ndarray]) -> None:
    chosen, weights = case.routes()
    assert np.array_equal(got["chosen"], chosen.reshape(-1))
    assert np.allclose(got["weights"], weights.reshape(-1), rtol=2e-6, atol=0)
    seen = []
    for expert, first, count, _ in got["entries"].tolist():
        own = got["sorted"][first : first + count].tolist()
        assert 0 < count <= got["columns"] and all(got["chosen"][pair] == expert for pair in own)
        seen += own
    assert sorted(seen) == list(range(len(got["chosen"])))
    assert np.all(np.diff(got["entries"][:, 0]) >= 0)


SHAPES = [  # experts, per token, normalized; hidden, intermediate
    (Experts(6, 2, True), 64, 24),
    (Experts(9, 3, False), 136, 40),
    (Experts(40, 5, True), 64, 200),
]


@on_each_device
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 33])
@pytest.mark.parametrize("load", ["random", "one", "skewed", "ties"])
@pytest.mark.parametrize(("e", "hidden", "inter"), SHAPES)
def test_experts_of_every_load_are_those_of_float64(device, seed, e, hidden, inter, load, tokens):
    case = Case(e, tokens, hidden, inter, seed, load)
    check(case, run(device, case))


@on_each_device
@pytest.mark.parametrize("tokens", [1, 8])
def test_few_tokens_may_take_the_way_of_many(device, seed, tokens):
    """As on a card whose shared memory does not hold their rows."""
    case = Case(Experts(9, 3, True), tokens, 64, 40, seed)
    check(case, run(device, case, few=False))


@on_each_device
@pytest.mark.parametrize("tokens", [8, 21])
@pytest.mark.parametrize("load", ["random", "one", "skewed"])
def test_a_token_s_neighbours_do_not_change_its_bits(device, seed, tokens, load):
    """Nor their number, within the kernels of few tokens and of many."""
    case = Case(Experts(12, 3, True), tokens, 72, 104, seed, load)
    together, least = run(device, case), 1 if tokens <= experts.FEW else 9
    for first in (0, 5, tokens - least):
        alone = run(device, case.rows(slice(first, first + least)))
        assert np.array_equal(together["y"][first : first + least], alone["y"])
        assert np.array_equal(together["h"][3 * first : 3 * (first + least)], alone["h"])


@on_each_device
@pytest.mark.parametrize("tokens", [6, 30])
def test_equal_inputs_give_equal_bits_on_every_grid_and_in_every_order(device, seed, tokens):
    case = Case(Experts(10, 2, False), tokens, 80, 48, seed)
    first = run(device, case)
    for order, multiprocessors in ((1, 1), (2, 2), (3, 40)):
        other = run(device, case, Card(multiprocessors, 80), order)
        assert np.array_equal(first["h"], other["h"]) and np.array_equal(first["y"], other["y"])


@on_each_device
@pytest.mark.parametrize(("tokens", "columns"), [(40, 16), (70, 16), (13, 8)])
def test_experts_with_more_pairs_than_a_tile_has_columns(device, seed, tokens, columns):
    """All tokens take the same two experts, and the others none."""
    case = Case(Experts(8, 2, True), tokens, 64, 24, seed, "one")
    assert routes_of(device, tokens, case.e).columns == columns
    check(case, run(device, case))


@on_each_device
@pytest.mark.parametrize(("tokens", "arch"), [(5, 80), (20, 80), (30, 90)])
def test_rows_that_are_not_in_use_take_no_experts(device, seed, tokens, arch):
    case, used, card = Case(Experts(10, 3, True), tokens, 64, 40, seed), np.array([1, 4]), Card(3, arch)
    lengths = np.full(tokens, -1, np.int32)
    lengths[used] = 0, 7
    got, all_used = run(device, case, card, lengths=device.array(lengths)), run(device, case, card)
    assert np.array_equal(got["y"][used], all_used["y"][used])
    others = np.setdiff1d(np.arange(tokens), used)
    assert np.array_equal(got["y"][others], case.x[others]) and not np.array_equal(got["y"], all_used["y"])
    if tokens > experts.FEW:
        taken = case.routes()[0][used]
        assert got["entries"][:, 2].sum() == 6 and set(got["entries"][:, 0]) == set(taken.reshape(-1))
    lengths[:] = -1
    assert np.array_equal(run(device, case, card, lengths=device.array(lengths))["y"], case.x)


@on_each_device
def test_logits_that_are_no_numbers_make_their_token_s_result_none_and_no_other_s(device, seed):
    case = Case(Experts(6, 2, True), 7, 64, 24, seed)
    fine = run(device, case)
    case.logits[2], case.logits[4, :] = np.nan, -np.inf
    for few in (True, False):
        got = run(device, case, few=few)["y"].astype(np.float32)
        assert np.isnan(got[[2, 4]]).all()
        others = [0, 1, 3, 5, 6]
        assert np.allclose(got[others], fine["y"].astype(np.float32)[others], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("size", "silu", "warps", "runs"),
    [(2048, True, 16, 4), (4096, True, 16, 4), (768, False, 4, 6), (1536, False, 2, 8)],
)
def test_every_register_of_a_round_is_loaded_with_weights_of_published_models(size, silu, warps, runs):
    plan = experts.team_plan(size, silu)
    assert (plan.warps, plan.runs) == (warps, runs) and size % (32 * runs * warps) == 0


@pytest.mark.parametrize(
    ("size", "silu", "kind", "warps", "runs"),
    [(2048, True, "int4", 16, 2), (2048, True, "e4m3", 16, 2), (4096, True, "int4", 16, 4), (4096, True, "int8", 16, 2),
     (768, False, "int4", 4, 3), (768, False, "int8", 4, 3), (1536, False, "int4", 2, 4)],
)  # fmt: skip
def test_rounds_of_codes_are_full_in_published_models(size, silu, kind, warps, runs):
    plan = experts.codes_plan(size, silu, kind)
    assert (plan.warps, plan.runs) == (warps, runs) and size % (64 * runs * warps) == 0


def test_what_has_no_kernels_says_why():
    config = Config.from_dict({**CONFIG, **MOE})
    assert experts.unsupported(config) is None and experts.unsupported(Config.from_dict(CONFIG)) is None
    for changes, why in (
        ({"num_experts": 64, "num_experts_per_tok": 33}, "33 experts a token are more than 32"),
        ({"moe_intermediate_size": 20}, "sizes 64, 20 of experts"),
    ):
        assert why in experts.unsupported(Config.from_dict({**CONFIG, **MOE, **changes}))
    e = config.experts
    assert experts.are_few(8, config, CARD) and not experts.are_few(9, config, CARD)
    wide = Config.from_dict({**CONFIG, **MOE, "hidden_size": 8192})
    assert not experts.are_few(8, wide, Card(132, 89)) and experts.are_few(8, wide, Card(132, 90)) and e.count == 6


CODES = [  # experts, per token, normalized; hidden, intermediate; kind and group of the matrices
    (Experts(6, 2, True), 64, 32, ("int4", 32)),
    (Experts(9, 3, False), 144, 48, ("int4", 64)),
    (Experts(5, 2, True), 400, 208, ("int4", 128)),
    (Experts(40, 5, True), 80, 208, ("int8", 208)),
    (Experts(6, 2, True), 272, 32, ("int8", 32)),
    (Experts(6, 2, True), 128, 160, ("e4m3", 128)),
    (Experts(5, 2, False), 144, 336, ("e4m3", 336)),
]


def kind_of(codes: tuple) -> list[str]:
    *_, (kind, _) = codes
    return [kind]


@on_each_device_over(codes=CODES, load=["random", "skewed"], tokens=[1, 8, 9, 33], traits={"codes": kind_of})
def test_quantized_experts_are_those_of_their_numbers_in_float64(device, seed, codes, load, tokens):
    e, hidden, inter, form = codes
    case = Case(e, tokens, hidden, inter, seed, load, form)
    check(case, run(device, case))


HOPPER = Card(3, 90)


@on_each_device
@pytest.mark.parametrize("load", ["random", "one", "skewed"])
@pytest.mark.parametrize(("e", "hidden", "inter"), [(Experts(6, 2, True), 136, 40), (Experts(5, 1, False), 72, 200)])
def test_experts_of_a_prompt_on_warpgroups_are_those_of_float64(device, seed, e, hidden, inter, load):
    """Entries of few pairs, of more than 64 and of 128; tiles that are full and not."""
    case = Case(e, 260, hidden, inter, seed, load)
    got = run(device, case, HOPPER)
    assert got["columns"] == experts.WGMMA_PAIRS
    check(case, got)
    alone = run(device, case.rows(slice(100, 150)), HOPPER)  # with other neighbours
    assert alone["columns"] == experts.WGMMA_PAIRS
    assert np.array_equal(got["y"][100:150], alone["y"])


@on_each_device
@pytest.mark.parametrize("form", [("int4", 64), ("e4m3", 128)])
def test_quantized_experts_of_a_prompt_are_dequantized_for_warpgroups(device, seed, form):
    case = Case(Experts(4, 2, True), 150, 128, 48, seed, "skewed", form)
    got = run(device, case, HOPPER)
    assert got["columns"] == experts.WGMMA_PAIRS and not experts.uses_wgmma(300, Experts(5, 2, True), HOPPER, True)
    case.gate_up, case.down = case.gate_up.astype(BF16), case.down.astype(BF16)  # as they are multiplied
    check(case, got)


QWEN3_30B = Experts(128, 8, True)


@on_the_card
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 48, 150, 256, 600, 3000])
@pytest.mark.parametrize("load", ["random", "one", "skewed"])
def test_experts_of_a_published_shape(device, seed, load, tokens):
    case = Case(QWEN3_30B, tokens, 2048, 768, seed, load)
    check(case, run(device, case, Card(132, 90)))
