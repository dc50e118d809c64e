"""The attention of a prefill against float64, and unpack.cu against oscar.py bit for bit; simulated and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.ops import attention, prefill
from minioscar.ops.launch import Card
from minioscar.pages import HEAD_DIMS, unsupported
from minioscar.plans import PREFILL_CONFIGS
from minioscar.sm90 import prefill_attention as sm90
from minioscar.towers import on_card as towers
from minioscar.towers.layers import Shape

from .kernel_device import on_each_device, on_each_device_over, on_the_card
from .pairwise import scheme_traits
from .test_decode_attention import ALL, KV_HEADS, dequantized, filled, history

BF16_ROUNDING = 2.0**-8  # at most, of a number


def causal(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q [n, q_heads, d], the newest of the tokens of keys, values [kv_heads, tokens, d] -> [n, q_heads, d], in float64.

    Then the same of the absolute values: what is lost where each p is rounded is at most so much of it.
    """
    n, heads, d = q.shape
    kv_heads, tokens, _ = keys.shape
    x = (
        q.reshape(n, kv_heads, -1, d).transpose(1, 2, 0, 3).astype(np.float64)
        @ keys.astype(np.float64).swapaxes(1, 2)[:, None]
    )
    x = np.where(np.arange(tokens) <= np.arange(tokens - n, tokens)[:, None], x / math.sqrt(d), -np.inf)
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    sizes = (v.astype(np.float64) for v in (values, abs(values)))
    return tuple((p @ v[:, None]).transpose(2, 0, 1, 3).reshape(n, heads, d) for v in sizes)


def check(
    device,
    d: int,
    group: int,
    starts: Sequence[int],
    counts: Sequence[int],
    seed: int,
    *,
    kind: str = "",
    arch: int = 80,
    order: int = 0,
    splits: tuple[int, int] = (1, 0),
    multiprocessors: int = 3,
) -> np.ndarray:
    """Sequences of starts[s] older and counts[s] new tokens, whose cache rows stand in reverse; returns what the
    kernel computed.

    splits: at most so many of the keys, of so many tiles each. multiprocessors: so few that a block has several items.
    """
    card = Card(multiprocessors, arch)
    rng, heads, batch = np.random.default_rng(seed), attention.Heads(KV_HEADS * group, KV_HEADS, d), len(starts)
    # Two tokens of nobody: first_rows leave a gap
    q = rng.normal(size=(sum(counts) + 2, heads.q_heads, d)).astype(BF16)
    sequences = [history(rng, n, d, kind, q[0, 0].astype(np.float64)) for n in np.add(starts, counts)]
    past = np.full((2, batch, KV_HEADS, max(starts) + 3, d), np.nan, BF16)
    qkv = np.full((2, len(q), KV_HEADS + 1, d), np.nan, BF16)  # rows a head longer than what is read of them
    firsts, slots = np.cumsum([2, *counts[:-1]]).astype(np.int32), np.arange(batch, dtype=np.int32)[::-1].copy()
    for x, slot, first, start, count in zip(sequences, slots, firsts, starts, counts, strict=True):
        past[:, slot, :, :start] = x[:, :, :start]
        qkv[:, first : first + count, :KV_HEADS] = x[:, :, start:].swapaxes(1, 2)
    stride = (KV_HEADS + 1) * d
    rows = (device.array(np.asarray(x, np.int32)) for x in (firsts, slots, starts, counts))
    new = attention.PrefillTokens(*map(device.array, qkv), stride, stride, *rows, max(counts))
    out = device.empty(q.shape, BF16)
    older = tuple(map(device.array, past)) if any(starts) else None
    if sm90.tiled(d, card):
        plain, older = older, tiles_for(device, d, np.add(starts, counts))
        device.run(sm90.fill_tiles(heads, new, plain, max(np.add(starts, counts)), older), arch, order)
    plan = sm90.SplitPlan(-(-max(counts) * group // sm90.WGMMA_ROWS) * KV_HEADS * batch, *splits)
    split_counter = device.array(np.zeros(plan.blocks, np.int32))
    scratch = sm90.KeySplits(plan, device.empty(plan.workspace_floats(d), np.float32), split_counter)
    scratch = scratch if plan.splits > 1 else None
    launch = prefill.prefill_attention(heads, device.array(q), new, older, out, card, splits=scratch)
    device.run(launch, arch, order)
    assert not np.any(device.numpy(split_counter))
    got = np.array(device.numpy(out, allow_unwritten=True)).astype(np.float64)
    assert np.all(np.isnan(got[:2])) and np.all(np.isfinite(got[2:]))
    for x, first, count in zip(sequences, firsts, counts, strict=True):
        expected, size = causal(q[first : first + count], *x)
        error = abs(got[first : first + count] - expected)
        # Of every p and of the result, and a little for float32 sums
        allowed = 1.05 * BF16_ROUNDING * (size + abs(expected))
        print(f"{(error / allowed.clip(1e-30)).max():.2f} of what is allowed")
        assert np.all(error <= allowed)
    return got


def tiles_for(device, d: int, tokens: Sequence[int]) -> sm90.Tiles:
    shape = int(sum(-(-np.asarray(tokens) // sm90.TILE_TOKENS))), KV_HEADS, sm90.TILE_TOKENS, d
    keys, values = (device.empty(shape, BF16) for _ in "kv")
    return sm90.Tiles(keys, values, device.array(tiles_before(tokens).astype(np.int32)))


CASES = [(128, 4, 80), (64, 3, 80), (96, 1, 80), (256, 2, 80), (256, 1, 90), (256, 2, 120), (64, 8, 80), (128, 7, 80)]
CASES += [(128, 4, 90), (64, 3, 90), (64, 8, 90), (128, 7, 90)]


@on_each_device
@pytest.mark.parametrize(("d", "group", "arch"), CASES)
def test_prefill_attention_of_unequal_sequences_with_and_without_a_past(device, seed, d, group, arch):
    check(device, d, group, (0, 70, 0), (1, 41, 67), seed, arch=arch)
    check(device, d, group, (0, 0), (3, 35), seed, arch=arch)


@on_each_device
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129])
def test_prefill_attention_around_every_boundary(device, seed, n):
    check(device, 64, 2, (0,), (n,), seed)
    check(device, 128, 1, (n,), (3,), seed)


@on_each_device
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_prefill_attention_with_warpgroups_around_every_boundary(device, seed, n):
    check(device, 64, 2, (0,), (n,), seed, arch=90)
    check(device, 128, 1, (n,), (3,), seed, arch=90)


@on_each_device
def test_prefill_attention_with_warpgroups_over_more_tiles_than_are_held(device, seed):
    check(device, 128, 1, (450,), (200,), seed, arch=90)
    check(device, 64, 5, (1000,), (30,), seed, arch=90)


@on_each_device
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["zero", "equal", "ramp", "tail", "sink", "peak"])
def test_prefill_attention_of_difficult_keys(device, seed, kind, arch):
    check(device, 128, 4, (70, 0), (20, 55), seed, kind=kind, arch=arch)


@on_each_device
@pytest.mark.parametrize("splits", [(1, 0), (3, 2)])
def test_prefill_attention_with_warpgroups_of_logits_beyond_the_exponents_of_float32(device, seed, splits):
    check(device, 128, 2, (600, 0), (30, 150), seed, kind="cliff", arch=90, splits=splits)
    check(device, 64, 3, (0,), (420,), seed, kind="cliff", arch=90, splits=(1, 0))


@on_each_device
@pytest.mark.parametrize("arch", [80, 90])
def test_prefill_attention_gives_equal_bits_in_every_order_of_blocks_and_threads(device, seed, arch):
    first, *others = (check(device, 64, 3, (40, 0), (50, 90), seed, arch=arch, order=order) for order in range(3))
    assert all(np.array_equal(first, other, equal_nan=True) for other in others)


@on_each_device
@pytest.mark.parametrize("splits", [(2, 4), (3, 2), (7, 1), (9, 1)])
def test_prefill_attention_with_the_keys_split(device, seed, splits):
    check(device, 128, 4, (700, 0, 120), (30, 45, 1), seed, arch=90, splits=splits)
    check(device, 64, 1, (300, 0), (200, 129), seed, arch=90, kind="sink", splits=splits)


@on_each_device
@pytest.mark.parametrize("splits", [(1, 0), (3, 1)])
def test_prefill_attention_one_head_after_the_other_gives_equal_bits(device, seed, monkeypatch, splits):
    """What L2 holds decides about the order of items, and nothing else."""

    def ordered(l2: int) -> np.ndarray:
        monkeypatch.setattr(sm90, "L2_BYTES", l2)
        return check(device, 64, 3, (300, 0), (50, 190), seed, arch=90, splits=splits)

    one, both = (ordered(l2) for l2 in (1, sm90.L2_BYTES))
    assert np.array_equal(one, both, equal_nan=True)


@on_each_device
def test_prefill_attention_in_splits_gives_equal_bits_in_every_order(device, seed):
    first, *others = (
        check(device, 64, 3, (400, 0), (50, 90), seed, arch=90, order=order, splits=(4, 1)) for order in range(3)
    )
    assert all(np.array_equal(first, other, equal_nan=True) for other in others)


def test_keys_are_split_only_where_multiprocessors_would_be_idle():
    heads = attention.Heads(32, 8, 128)
    assert sm90.split_plan(heads, 32768, 1, 0, Card(132, 90)) is None
    assert sm90.split_plan(heads, 4096, 1, 0, Card(132, 90)) is None
    assert sm90.split_plan(heads, 512, 1, 131072, Card(132, 90)) is None  # 128 blocks
    assert sm90.split_plan(heads, 64, 1, 131072, Card(132, 90)) == sm90.SplitPlan(16, 8, 129)
    assert sm90.split_plan(heads, 64, 1, 131072, Card(132, 80)) is None
    for count in (1, 100, 256, 700):
        plan = sm90.split_plan(heads, count, 1, 131072, Card(132, 90))
        assert plan.splits * plan.tiles * sm90.TILE_TOKENS >= 131072 + count


@on_the_card
@pytest.mark.parametrize("d", PREFILL_CONFIGS)
@pytest.mark.parametrize("group", [*range(1, 9), 16])
def test_prefill_attention_over_the_grid_of_shapes(device, seed, d, group):
    import cupy

    arch = int(cupy.cuda.Device().compute_capability)
    check(device, d, group, (0, 1000, 0, 257), (1500, 300, 1, 64), seed, arch=arch, multiprocessors=132)


UNPACKED = ["int2", "int2-compact", "oscar", "int4", "kivi", "scaling", "k3v2", "k3v3", "k4v2", "k4v4"]
UNPACKED += ["plain-64-64", "plain-128-128", "plain-g64-64-64"]


@on_each_device_over(
    lambda d, scheme: not unsupported(scheme, d), {"scheme": scheme_traits},
    d=HEAD_DIMS, scheme=[ALL[name] for name in UNPACKED],
)  # fmt: skip
def test_unpack_gives_oscar_s_numbers_rounded_to_bf16(device, seed, d, scheme):
    rng, lengths = np.random.default_rng(seed), (300, 129, 40, 1)
    heads = attention.Heads(KV_HEADS, KV_HEADS, d)
    sequences = [history(rng, n, d, "tail", np.ones(d)) for n in lengths]
    cache = filled(device, sequences, scheme, heads)  # as decode attention finds it, its last token in the window
    slots = np.array([3, 0, 1, 2], np.int32)
    starts = np.array(lengths, np.int32)[slots]
    keys, values = (device.empty((len(slots), KV_HEADS, 320, d), BF16) for _ in "kv")
    slots_and_starts = device.array(slots), device.array(starts)
    device.run(prefill.unpack(heads, scheme, *slots_and_starts, max(lengths), cache, (keys, values)), seed=seed % 5)
    for row, slot in enumerate(slots):
        n = lengths[slot]
        packed = scheme.packed_tokens(n)
        for got, expected in zip((keys, values), dequantized(sequences[slot], packed, scheme), strict=True):
            got = np.array(device.numpy(got, allow_unwritten=True))[row]
            assert np.array_equal(got[:, :n], expected.astype(BF16)) and np.all(got[:, n:].view(np.uint16) == 0xFFFF)
    if not sm90.tiled(d, Card(132, 90)):
        return
    tiles = tiles_for(device, d, starts)
    device.run(prefill.unpack(heads, scheme, *slots_and_starts, max(lengths), cache, tiles), seed=seed % 5)
    for row, n in enumerate(starts):
        for got, expected in zip((tiles.keys, tiles.values), (keys, values), strict=True):
            got = plain(np.array(device.numpy(got, allow_unwritten=True)), d)[:, 128 * tiles_before(starts)[row] :]
            assert np.array_equal(got[:, :n], np.array(device.numpy(expected, allow_unwritten=True))[row, :, :n])


@on_each_device
@pytest.mark.parametrize("name", ["plain-64-64", "plain-128-128"])
def test_unpack_of_rows_that_were_cut_takes_all_that_is_packed(device, seed, name):
    """Nothing is in the window of a row that was cut to its packed tokens; others of the batch have theirs."""
    scheme, rng, d, lengths = ALL[name], np.random.default_rng(seed), 64, (500, 129, 333)
    heads = attention.Heads(KV_HEADS, KV_HEADS, d)
    sequences = [history(rng, n, d, "", np.ones(d)) for n in lengths]
    cache = filled(device, sequences, scheme, heads)
    packed = [scheme.packed_tokens(n) for n in lengths]
    starts = [packed[0], lengths[1], packed[2]]
    keys, values = (device.empty((3, KV_HEADS, 512, d), BF16) for _ in "kv")
    counts = (device.array(np.array(x, np.int32)) for x in (starts, packed))
    launch = prefill.unpack(heads, scheme, None, next(counts), 512, cache, (keys, values), next(counts))
    device.run(launch, seed=seed % 5)
    for row, n in enumerate(starts):
        for got, expected in zip((keys, values), dequantized(sequences[row], packed[row], scheme), strict=True):
            got = np.array(device.numpy(got, allow_unwritten=True))[row]
            assert np.array_equal(got[:, :n], expected[:, :n].astype(BF16))
            assert np.all(got[:, n:].view(np.uint16) == 0xFFFF)


def tiles_before(tokens: Sequence[int]) -> np.ndarray:
    each = -(-np.asarray(tokens) // sm90.TILE_TOKENS)
    return np.cumsum(each) - each


def plain(tiles: np.ndarray, d: int) -> np.ndarray:
    """The numbers of sm90.Tiles in their order: [tiles, kv_heads, 128, d] -> [kv_heads, tokens, d]."""
    pieces = tiles.reshape(*tiles.shape[:2], d // 64, sm90.TILE_TOKENS, 8, 8)
    r = np.arange(sm90.TILE_TOKENS)[:, None]
    pieces = pieces[:, :, :, r, np.arange(8) ^ r % 8]
    return pieces.transpose(1, 0, 3, 2, 4, 5).reshape(tiles.shape[1], -1, d)


@on_each_device
@pytest.mark.parametrize(("d", "tokens", "segment"), [
    (64, 1, 1), (64, 300, 300), (72, 131, 131), (72, 400, 150), (8, 40, 17), (24, 70, 70), (96, 70, 70), (128, 64, 64),
    (80, 129, 129),
])  # fmt: skip
def test_full_attention_is_over_all_tokens_of_a_segment(device, seed, d, tokens, segment):
    """q, keys and values as slices of one product, whose biases and neighbours must not be read."""
    rng, heads = np.random.default_rng(seed), 3
    qkv = np.full((tokens, 4, heads, d), np.nan, BF16)
    qkv[:, :3] = rng.normal(size=(tokens, 3, heads, d)) * 2
    there, first = device.array(qkv), np.arange(0, tokens, segment)
    xp = SimpleNamespace(empty=device.empty, asarray=device.array)
    for arch in (80, 90):
        card, shape = Card(3, arch), Shape(heads * d, 8, heads, 0.0, "gelu", "", (), "", "", "", "")
        segments = towers.Segments.allocate(xp, shape, tokens, segment, card)
        out, parts = device.empty((tokens, heads * d), BF16), (there[:, 0], there[:, 1], there[:, 2])
        for launch in towers.full_attention(*parts, out, segments, card):
            device.run(launch, arch)
        found = device.numpy(out).astype(np.float64).reshape(tokens, heads, d)
        for at in first:
            q, k, v = qkv[at : at + segment, :3].astype(np.float64).transpose(1, 2, 0, 3)
            x = q @ k.swapaxes(1, 2) * d**-0.5
            p = np.exp(x - x.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            error = np.abs(found[at : at + segment].swapaxes(0, 1) - p @ v)
            assert np.all(error <= 1.05 * BF16_ROUNDING * (p @ np.abs(v) + np.abs(p @ v)) + 1e-5)
