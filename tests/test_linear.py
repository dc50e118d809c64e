"""The kernels of linear layers against float64, simulated and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.ops import linear, linear_batch
from minioscar.ops.launch import Card
from minioscar.ops.linear_batch import Scratch
from minioscar.plans import LINEAR_TOKENS, LinearPlan, batch_plan, fits, mma_configs
from minioscar.sm90 import linear_batch as sm90
from minioscar.sm90.linear_batch import WgmmaPlan

from .kernel_device import on_each_device, on_each_device_over, on_the_card
from .pairwise import switches

EPS = 1e-5


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16).astype(np.float64)


SMALL = Card(2, 80)


def scratch_for(device, plan: LinearPlan) -> Scratch:
    return Scratch(device.empty(plan.workspace_floats, np.float32), device.array(np.zeros(plan.counters, np.int32)))


def check(
    device, seed: int, tokens: int, size: int, rows: int, *, order: int = 0, card: Card = SMALL,
    plan: LinearPlan | None = None, **parts: bool,
) -> np.ndarray:
    """parts: norm, bias, residual, silu, float32. plan: of a batch (None: the one that it gets). Returns what the
    kernel computed."""
    rng, width = np.random.default_rng(seed), rows // 2 if parts.get("silu") else rows
    x, weight = (
        rng.normal(size=(tokens, size)).astype(BF16),
        (rng.normal(size=(rows, size)) / np.sqrt(size)).astype(BF16),
    )
    norm = rng.uniform(0.5, 1.5, size).astype(BF16) if parts.get("norm") else None
    bias = rng.normal(size=rows).astype(BF16) if parts.get("bias") else None
    residual = rng.normal(size=(tokens, width)).astype(BF16) if parts.get("residual") else None
    out = device.empty((tokens, width), np.float32 if parts.get("float32") else BF16)
    given = {name: device.array(a) for name, a in (("bias", bias), ("residual", residual)) if a is not None}
    given |= {"silu": parts.get("silu", False)}
    x_there, weight_there = device.array(x), device.array(weight)
    if tokens <= LINEAR_TOKENS:
        given |= {"norm": (device.array(norm), EPS)} if norm is not None else {}
        device.run(linear.linear(x_there, weight_there, out, card, **given), seed=order)
    else:
        if norm is not None:
            normed = device.empty(x.shape, BF16)
            device.run(linear.rms_norm(x_there, device.array(norm), EPS, normed), seed=order)
            x_there = normed
        plan = plan or batch_plan(tokens, size, rows, given["silu"], card)
        scratch = scratch_for(device, plan)
        launch = linear_batch.linear_batch(x_there, weight_there, out, plan, scratch, **given)
        device.run(launch, arch=90 if isinstance(plan, WgmmaPlan) else 80, seed=order)
        assert not device.numpy(scratch.split_counter).any()
    got = np.array(device.numpy(out))

    x, w = x.astype(np.float64), weight.astype(np.float64)
    if norm is not None:
        x = rounded(x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPS) * norm.astype(np.float64))
    y, size_of = x @ w.T, abs(x) @ abs(w).T
    # Float32 sums; and two numbers of the norm may be rounded to the other side than in float64, by 2^-8 of them at
    # most.
    error = 2.0**-20 * size_of + (
        2 * 2.0**-8 * (abs(x).max(axis=1)[:, None] * abs(w).max(axis=1)) if norm is not None else 0
    )
    if bias is not None:
        y = y + bias.astype(np.float64)
    if parts.get("silu"):
        (gate, up), (gate_error, up_error) = np.split(y, 2, axis=1), np.split(error, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
        error = 1.1 * gate_error * abs(up) + abs(gate) * up_error + 2.0**-20 * abs(y)  # the slope of silu is below 1.1
    if residual is not None:
        y = y + residual.astype(np.float64)
    error = error + (0 if parts.get("float32") else 2.0**-8 * abs(y))
    assert np.all(abs(got.astype(np.float64) - y) <= error)
    return got


SMALL = [(1, 576, 96), (3, 40, 34), (8, 1032, 16), (5, 8, 2), (2, 256, 250), (7, 2600, 70)]  # tokens, in, out
BATCHES = [(9, 200, 34), (48, 840, 130), (64, 8, 2), (65, 640, 200), (128, 72, 256), (20, 1304, 520), (131, 264, 40)]
PARTS = [
    {},
    {"float32": True},
    {"norm": True, "bias": True},
    {"residual": True},
    {"silu": True, "norm": True, "bias": True},
    {"silu": True, "bias": True, "residual": True},
    {"norm": True, "float32": True},
]


@on_each_device_over(shape=[*SMALL, *BATCHES], parts=PARTS, traits={"parts": switches})
def test_linear_with_what_stands_before_and_behind_it(device, seed, shape, parts):
    check(device, seed, *shape, **parts)


GROUPS = [
    (33, 200, 34),
    (48, 840, 130),
    (64, 8, 2),
    (65, 640, 200),
    (128, 72, 256),
    (131, 264, 40),
    (256, 136, 48),
    (100, 392, 33),
]


def has_both(shape: tuple[int, int, int], parts: dict[str, bool]) -> bool:
    """Gate and up have the same number of rows."""
    return not parts.get("silu") or shape[2] % 2 == 0


@on_each_device_over(has_both, shape=GROUPS, parts=PARTS, traits={"parts": switches})
def test_linear_of_warpgroups(device, seed, shape, parts):
    tokens, size, rows = shape
    assert sm90.uses_wgmma(tokens, rows, Card(2, 90))
    check(device, seed, tokens, size, rows, card=Card(2, 90), **parts)


WGMMA_CONFIGS = [  # rows of a tile, runs, splits of k; multiprocessors
    (16, 1, 1, 2),  # several tiles a block
    (32, 2, 1, 9),  # the last slab has one run, the last tile few rows
    (32, 1, 3, 99),
    (32, 2, 2, 99),
    (96, 1, 5, 99),
]


EPILOGUES = [{}, {"silu": True, "bias": True}, {"residual": True, "bias": True, "float32": True}]


@on_each_device_over(tokens=[40, 96, 190], config=WGMMA_CONFIGS, parts=EPILOGUES)
def test_every_tile_config_and_split_of_warpgroups(device, seed, tokens, config, parts):
    tile, runs, splits, multiprocessors = config
    configs = sm90.wgmma_configs(tokens, 712, 200, parts.get("silu", False), Card(multiprocessors, 90))
    plan = next(p for p in configs if (p.rows, p.runs, p.splits) == (tile, runs, splits))
    check(device, seed, tokens, 712, 200, plan=plan, **parts)


@on_each_device
@pytest.mark.parametrize(("tokens", "size", "rows"), [(2, 4096, 80), (70, 400, 150)])
def test_linear_with_the_least_shared_memory(device, seed, tokens, size, rows):
    """That of 8.6 and 8.9: slabs two by two, two blocks of columns."""
    plan = batch_plan(70, 400, 150, True, Card(2, 89))
    assert (plan.stages, plan.column_blocks) == (2, 2)
    check(device, seed, tokens, size, rows, card=Card(2, 89), norm=True, silu=True)


@on_each_device
def test_linear_gives_equal_bits_on_every_grid_and_in_every_order(device, seed):
    parts = {"norm": True, "residual": True}
    first = check(device, seed, 4, 288, 130, card=Card(1, 80), **parts)
    for order, multiprocessors in ((1, 1), (2, 2), (3, 40)):
        other = check(device, seed, 4, 288, 130, order=order, card=Card(multiprocessors, 80), **parts)
        assert np.array_equal(first, other)
    plan = mma_configs(20, 640, 130, False, Card(3, 80))[0]
    # Of five slabs each: the second block ends one tile and begins the other
    assert (plan.tiles, plan.blocks) == (2, 3)
    configs = sm90.wgmma_configs(20, 640, 130, False, Card(99, 90))
    for shared in (plan, next(p for p in configs if (p.rows, p.runs, p.splits) == (32, 1, 4))):
        first, *others = (check(device, seed, 20, 640, 130, order=order, plan=shared, **parts) for order in range(6))
        assert all(np.array_equal(first, other) for other in others)


CONFIGS = [
    # tokens, in, out, multiprocessors: tiles, blocks, granularity and partial tiles of every config
    (20, 640, 396, 2, [(2, 2, 1, 2), (2, 2, 10, 0), (4, 2, 5, 0), (3, 2, 5, 0)]),
    (20, 640, 396, 7, [(4, 7, 1, 2), (2, 6, 1, 1), (4, 4, 1, 0), (3, 6, 1, 1)]),
    (64, 136, 396, 3, [(2, 3, 1, 2), (2, 2, 1, 0), (4, 3, 2, 0), (3, 3, 2, 0)]),
    (90, 640, 200, 5, [(2, 5, 1, 2)]),  # too many columns
    (40, 264, 398, 3, [(2, 3, 1, 2), (2, 2, 1, 0), (4, 3, 3, 0)]),  # not a multiple of 12
]


@on_each_device_over(case=CONFIGS, parts=EPILOGUES, traits={"parts": switches})
def test_every_way_to_share_the_slabs(device, seed, case, parts):
    tokens, size, rows, multiprocessors, configs = case
    plans = mma_configs(tokens, size, rows, parts.get("silu", False), Card(multiprocessors, 90))
    if "silu" not in parts:
        assert [(p.tiles, p.blocks, p.granularity, p.partial_tiles) for p in plans] == configs
    for plan in plans:
        check(device, seed, tokens, size, rows, plan=plan, **parts)
        assert plan.partial_tiles or not (plan.workspace_floats or plan.counters)


@on_each_device
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", [320, 2600])
def test_a_token_of_a_batch_gets_the_bits_that_it_gets_alone(device, seed, size, norm):
    rng = np.random.default_rng(seed)
    x, weight, weights = (rng.normal(size=shape).astype(BF16) for shape in ((8, size), (48, size), size))
    rows = []
    for tokens in (8, 1):
        out = device.empty((tokens, 48), np.float32)
        before = (device.array(weights), EPS) if norm else None
        device.run(linear.linear(device.array(x[:tokens]), device.array(weight), out, Card(2, 80), norm=before))
        rows.append(np.array(device.numpy(out))[0])
    assert np.array_equal(*rows)


@on_each_device
def test_a_token_gets_the_same_bits_in_batches_that_share_the_slabs_alike(device, seed):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(60, 640)).astype(BF16), rng.normal(size=(132, 640)).astype(BF16)
    pairs = list(
        zip(*(mma_configs(tokens, 640, 132, False, Card(4, 90)) for tokens in (9, 60)), strict=True)
    )
    for small, large in pairs:
        for name in ("row_tiles", "k_groups", "blocks", "granularity"):
            assert getattr(small, name) == getattr(large, name)
    wgmma = tuple(sm90.wgmma_configs(tokens, 640, 132, False, Card(4, 90))[0] for tokens in (9, 60))
    for small, large in [*pairs, wgmma]:
        rows = []
        for tokens, plan in ((9, small), (60, large)):
            out = device.empty((tokens, 132), np.float32)
            there = device.array(x[:tokens]), device.array(weight)
            launch = linear_batch.linear_batch(*there, out, plan, scratch_for(device, plan))
            device.run(launch, arch=90 if isinstance(plan, WgmmaPlan) else 80)
            rows.append(np.array(device.numpy(out))[:9])
        assert np.array_equal(*rows)


@on_each_device
@pytest.mark.parametrize("size", [8, 2056, 8192, 8200, 18440])
def test_rms_norm_of_rows_that_its_registers_hold_and_of_longer_ones(device, size, seed):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(3, size)).astype(BF16), rng.uniform(0.5, 1.5, size).astype(BF16)
    out = device.empty(x.shape, BF16)
    device.run(linear.rms_norm(device.array(x), device.array(weight), EPS, out))
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact * exact).mean(axis=1, keepdims=True) + EPS) * weight.astype(np.float64)
    assert np.all(abs(np.array(device.numpy(out)).astype(np.float64) - exact) <= (2.0**-8 + 2.0**-18) * abs(exact))


def test_what_does_not_fit_is_refused():
    weight, norm = np.empty((16, 12288), np.uint16), (np.empty(12288, np.uint16), EPS)
    for tokens, capability, before in ((9, 90, None), (8, 89, norm), (0, 90, None)):
        with pytest.raises(ValueError, match="do not fit"):
            linear.linear(np.empty((tokens, 12288), np.uint16), weight, weight, Card(132, capability), norm=before)
        assert not fits(tokens, 12288, before is not None, False, Card(132, capability))
    for tokens, size, normed, silu, capability in (
        (8, 8192, True, False, 90),
        (2, 4096, True, True, 89),
        (8, 28672, False, False, 89),
    ):
        assert fits(tokens, size, normed, silu, Card(132, capability))
    with pytest.raises(ValueError, match="do not fit"):
        batch_plan(257, 12288, 16, False, Card(132, 90))


def test_the_weights_are_shared_equally():
    """Qwen3-8B on 132 multiprocessors: what one block has is at most 4 % above what all would have that share the
    weights equally."""
    for size, rows, silu in (
        (4096, 6144, False),
        (4096, 4096, False),
        (4096, 24576, True),
        (12288, 4096, False),
        (4096, 151936, False),
    ):
        for tokens in (9, 17, 32, 48, 64, 128, 192, 256):
            plan = batch_plan(tokens, size, rows, silu, Card(132, 90))
            of_block = (
                plan.max_runs * plan.rows * 64
                if isinstance(plan, WgmmaPlan)
                else plan.max_slabs * 128 * plan.row_tiles * 64
            )
            assert of_block < 1.04 * size * rows / 132, plan


@on_the_card
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts) or "plain")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 48, 128, 256])
@pytest.mark.parametrize(("size", "rows"), [(4096, 6144), (576, 49152), (1536, 576), (9728, 2560)])
def test_linear_of_models_shapes(device, seed, tokens, size, rows, capability, parts):
    if capability == 80 and not sm90.uses_wgmma(tokens, rows, Card(132, 90)):
        pytest.skip("the kernel of 9.0 is this one, too")
    check(device, seed, tokens, size, rows, card=Card(132, capability), **parts)
