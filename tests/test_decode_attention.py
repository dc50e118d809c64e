"""Decode attention against float64 over the dequantized cache, simulated and on a GPU; pack.cu fills the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from minioscar import oscar
from minioscar.cache import BF16
from minioscar.hadamard import hadamard
from minioscar.ops import attention
from minioscar.ops.launch import Card
from minioscar.oscar import SCHEMES, Scheme
from minioscar.pages import HEAD_DIMS, page_bytes, unsupported
from minioscar.plans import DecodePlan, decode_plan

from .kernel_device import in_blocks, on_each_device, on_each_device_of, on_the_card, some_table
from .tiny import WINDOWS, key_feedback

KV_HEADS = 2
LIMIT = 2e-3  # ||error|| / ||reference|| of float32 outputs
STEEP = 0.1  # of the scheme's own error: what q * step in float16 may add to it over heavy tails
RAGGED = (300, 1, 128, 513)
ALL = SCHEMES | WINDOWS


def softmax_attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, off: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One query token in float64: q [q_heads, d], keys, values [kv_heads, n, d] -> out [q_heads, d], log-sum-exp
    [q_heads]. off: added to the first logits, [kv_heads, q_per_kv, at most n]."""
    heads, _, d = keys.shape
    x = q.reshape(heads, -1, d).astype(np.float64) @ keys.astype(np.float64).swapaxes(1, 2) / math.sqrt(d)
    if off is not None:
        x[..., : off.shape[-1]] += off
    top = x.max(axis=-1, keepdims=True)
    p = np.exp(x - top)
    total = p.sum(axis=-1, keepdims=True)
    return (p @ values / total).reshape(-1, d), (np.log(total) + top).reshape(-1)


def history(rng: np.random.Generator, n: int, d: int, kind: str, q: np.ndarray) -> np.ndarray:
    """Keys and values of n tokens, BF16 [2, KV_HEADS, n, d]."""
    x = rng.normal(size=(2, KV_HEADS, n, d))
    if kind == "zero":
        x[:] = 0
    elif kind == "equal":
        x[0] = x[0, :, :1]
    elif kind == "ramp":  # each page has larger logits than all before
        x[0] *= np.linspace(0.1, 8, n)[:, None]
    elif kind == "cliff":  # largest logits of about 3, 70, 220 and 14, and again
        x[0] *= np.array([1, 25, 80, 5])[np.arange(n) // 130 % 4, None]
    elif (
        kind == "tail"
    ):  # infinite kurtosis; of 2 degrees of freedom logits reach hundreds, and q * step in fp16 costs up to 3e-3
        x = rng.standard_t(3, size=x.shape)
    elif kind == "sink" and n:  # a token of large norm
        x[0, :, 0] *= 20
    elif kind == "nan" and n > 1000:  # in the window of one kv head
        x[0, 0, n - 1, 0] = np.nan
    elif kind == "peak" and n:  # a token in the middle whose logit stands 30 above the largest other, about 4
        x[0, :, n // 2] = q * (34 * math.sqrt(d) / (q @ q))
    return x.astype(BF16)


def dequantized(x: np.ndarray, packed: int, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """What attention takes the keys and values of a sequence to be, its first `packed` tokens packed."""
    keys, values = x.astype(np.float32)
    if packed:
        norms = oscar.token_norms(x[0, :, :packed].transpose(1, 0, 2)) if scheme.scale else np.ones(packed, np.float32)
        old = slice(scheme.sinks, packed)
        feedback = key_feedback(scheme, *x.shape[1::2])
        codes = oscar.quantize_keys(keys[:, :packed], norms, scheme, feedback=feedback)
        keys[:, old] = oscar.dequantize_keys(*codes, norms, scheme)[:, old]
        values[:, old] = oscar.dequantize_values(*oscar.quantize_values(values[:, :packed], scheme), scheme)[:, old]
    return keys, values


def key_roundings(q: np.ndarray, x: np.ndarray, packed: int, scheme: Scheme) -> np.ndarray:
    """By how much the kernel's logits of packed tokens are off because `q * step` is rounded to float16: 2^-12 of each
    product, multiplied by codes of up to 2^bits - 1, grows with the logit. [kv_heads, q_per_kv, packed], of
    q [q_heads, d] and keys x[0] [kv_heads, n, d]."""
    keys, d = x[0, :, :packed].astype(np.float32), x.shape[-1]
    norms = oscar.token_norms(keys.transpose(1, 0, 2)) if scheme.scale else np.ones(packed, np.float32)
    codes, step, _ = oscar.quantize_keys(keys, norms, scheme, feedback=key_feedback(scheme, len(keys), d))
    q, codes = q.reshape(len(keys), -1, 1, d), codes.reshape(*step.shape[:2], -1, d)
    lift = 32 if scheme.scale else 0.125  # decode_attention.cu: LIFT
    with_step = (q * np.float32(lift)).astype(np.float16) * step[:, None].astype(np.float16)
    off = with_step.astype(np.float64) / lift - q.astype(np.float64) * step[:, None]
    logits = np.einsum("hqgd,hgtd->hqgt", off, codes, optimize=True).reshape(*q.shape[:2], packed)
    logits *= norms.astype(np.float64) / math.sqrt(d)
    logits[..., : scheme.sinks] = 0
    return logits


def packed_tokens(scheme: Scheme, n: int) -> int:
    """Of a sequence whose last token, the n-th, is new."""
    return max(max(n - 1, 0) // scheme.flush * scheme.flush - scheme.keep, 0)


def table_of(batch: int, capacity: int) -> np.ndarray:
    """Always the same for a shape: schedules are made before caches here."""
    return some_table(np.random.default_rng(batch), batch, -(-capacity // 128))


def filled(device, sequences: Sequence[np.ndarray], scheme: Scheme, heads: attention.Heads) -> dict:
    """The cache of one layer as a step finds it that has put its token into the window: no token is packed yet that
    this one completed."""
    d, rows, batch = heads.head_dim, [x.shape[2] for x in sequences], len(sequences)
    capacity = max(max(rows), 1) + 64
    if not scheme.quantized:
        plain = np.full((2, batch, KV_HEADS, capacity, d), np.nan, BF16)
        for b, x in enumerate(sequences):
            plain[:, b, :, : x.shape[2]] = x
        return {n: device.array(x) for n, x in zip(("keys", "values"), plain, strict=True)}
    packed = [packed_tokens(scheme, n) for n in rows]
    window, norms = (
        np.full((2, batch, KV_HEADS, scheme.ring, d), np.nan, BF16),
        np.ones((batch, -(-capacity // 128) * 128), np.float32),
    )
    for b, (x, old) in enumerate(zip(sequences, packed, strict=True)):
        window[:, b][:, :, np.arange(old, x.shape[2]) % scheme.ring] = x[:, :, old:]
        norms[b, : x.shape[2]] = oscar.token_norms(x[0].transpose(1, 0, 2))
    table = table_of(batch, capacity)
    pages = device.empty((table.size, KV_HEADS, 2, page_bytes(scheme, d)), np.uint8)
    cache = {"pages": pages, "norms": device.array(in_blocks(norms, table)), "table": device.array(table)}
    cache |= {f"window_{n}": device.array(w) for n, w in zip(("keys", "values"), window, strict=True)}
    if scheme.sinks:
        cache |= {f"sink_{n}": device.empty((batch, KV_HEADS, scheme.sinks, d), BF16) for n in ("keys", "values")}
    keys, values = (device.array(x) for x in np.concatenate(sequences, axis=2).transpose(0, 2, 1, 3))
    first, starts, counts = (
        device.array(np.array(x, np.int32))
        for x in (np.cumsum([0, *rows[:-1]]), [0] * batch, [old + scheme.keep if old else 0 for old in packed])
    )
    new = attention.PrefillTokens(keys, values, KV_HEADS * d, KV_HEADS * d, first, None, starts, counts, max(rows))
    feedback = key_feedback(scheme, KV_HEADS, d)
    device.run(attention.pack_bulk(heads, scheme, new, cache, None if feedback is None else device.array(feedback)))
    return cache


def run(
    device,
    scheme: Scheme,
    d: int,
    plan: DecodePlan,
    lengths: Sequence[int],
    seed: int,
    *,
    kind: str = "",
    arch: int = 80,
    order: int = 0,
    reference: bool = True,
    rotated: bool = False,
):
    """Output and log-sum-exp, the kernel's and the reference's, each [batch, q_heads, ...]; lengths count the new
    token."""
    q, sequences = drawn(d, plan, lengths, seed, kind)
    got = attended(device, scheme, plan, q, sequences, arch, order, rotated)
    expected = np.zeros(q.shape), np.zeros(q.shape[:2])
    for b, x in enumerate(sequences):
        if x.shape[2] and reference:
            expected[0][b], expected[1][b] = softmax_attention(q[b], *dequantized(x, cached_packed(scheme, x), scheme))
    return got, (expected[0] @ hadamard(d).astype(np.float64), expected[1]) if rotated else expected


def drawn(
    d: int, plan: DecodePlan, lengths: Sequence[int], seed: int, kind: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Queries, BF16 [batch, q_heads, d], and the `history` of each sequence."""
    rng, q_heads = np.random.default_rng(seed), KV_HEADS * plan.q_groups * plan.q_per_kv
    q = rng.normal(size=(len(lengths), q_heads, d))
    if kind == "peak":
        q = q[0, 0] + 0.05 * q
    q = q.astype(BF16)
    return q, [history(rng, n, d, kind, q[0, 0].astype(np.float64)) for n in lengths]


def attended(
    device,
    scheme: Scheme,
    plan: DecodePlan,
    q: np.ndarray,
    sequences: Sequence[np.ndarray],
    arch: int = 80,
    order: int = 0,
    rotated: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's output and log-sum-exp."""
    heads = attention.Heads(q.shape[1], KV_HEADS, q.shape[2])
    cache = filled(device, sequences, scheme, heads)
    out, lse = device.empty(q.shape, np.float32), device.empty(q.shape[:2], np.float32)
    state = replace(state_of(device, heads, scheme, plan, [x.shape[2] for x in sequences]), rotated=rotated)
    attend = attention.decode_attention(state, device.array(q), cache, out, lse=lse, parity=0)
    schedule = attention.schedule(state)
    device.run(replace(schedule, defines=attend.defines), arch, order)  # one compilation, as in the engine
    device.run(attend, arch, order)
    assert not device.numpy(state.split_counter).any()
    return device.numpy(out), device.numpy(lse, allow_unwritten=True)


def state_of(
    device, heads: attention.Heads, scheme: Scheme, plan: DecodePlan, lengths: Sequence[int]
) -> attention.DecodeState:
    """lengths count the new token."""
    before, d = device.array(np.array(lengths, np.int32) - 1), heads.head_dim
    tasks, workspace = device.empty(plan.task_shape, np.int32), device.empty(plan.workspace_floats(d), np.float32)
    split_counter = device.array(np.zeros(plan.counters(d), np.int32))
    table = device.array(table_of(len(lengths), max(max(lengths), 1) + 64)) if scheme.quantized else None
    return attention.DecodeState(heads, scheme, plan, before, tasks, workspace, split_counter, table)


def cached_packed(scheme: Scheme, x: np.ndarray) -> int:
    """Tokens of a sequence that the cache holds packed."""
    return packed_tokens(scheme, x.shape[2]) if scheme.quantized else 0


def check(got, expected, lengths):
    alive = np.array(lengths) > 0
    assert np.all(np.isfinite(got[0])) and np.all(got[0][~alive] == 0)
    size = np.linalg.norm(expected[0])
    error = np.linalg.norm(got[0].astype(np.float64) - expected[0])
    print(f"error {error / size if size else error:.1e}")
    assert error <= LIMIT * size
    if alive.any():
        assert np.abs(got[1] - expected[1])[alive].max() <= LIMIT * max(1, np.abs(expected[1]).max())


CASES = [  # scheme, head_dim, q heads of a work item, groups of them that share a kv head, compute capability
    ("int2", 128, 4, 1, 80),
    ("int2", 128, 4, 1, 90),
    ("int2", 64, 3, 1, 80),
    ("int2", 64, 8, 1, 80),
    ("int2", 64, 2, 1, 90),
    ("int2", 256, 1, 1, 80),
    ("int2-compact", 128, 8, 2, 80),
    ("int2-compact", 128, 4, 1, 80),
    ("int2-compact", 64, 1, 1, 90),
    ("oscar", 128, 7, 1, 80),
    ("oscar", 64, 2, 1, 90),
    ("scaling", 256, 5, 1, 80),
    ("kivi", 128, 4, 1, 80),
    ("rotation", 128, 6, 1, 80),
    ("int4", 128, 4, 1, 80),
    ("int4", 64, 8, 1, 90),
    ("k4v2", 128, 4, 1, 80),
    ("k4v2", 128, 4, 1, 90),
    ("k4v2", 64, 3, 1, 80),
    ("k4v2", 64, 8, 2, 90),
    ("k4v2", 256, 2, 1, 80),
    ("k3v2", 128, 4, 1, 80),
    ("k3v3", 128, 4, 1, 90),
    ("k3v3", 64, 3, 1, 80),
    ("k4v4", 128, 5, 1, 80),
    ("k4v4", 64, 2, 1, 90),
    ("bf16", 128, 4, 1, 80),
    ("bf16", 64, 3, 1, 90),
    ("bf16", 256, 8, 1, 80),
    ("plain-64-64", 128, 4, 1, 80),
    ("plain-64-64", 64, 3, 1, 90),
    ("plain-128-128", 128, 2, 1, 90),
    ("plain-g64-64-64", 128, 8, 2, 80),
    ("oscar-64-0", 256, 1, 1, 80),
]
BITS = [  # of keys and of values, groups of tokens and of channels, of scheme ..., head_dim, q heads of a work item
    (4, 2, 32, 32, "oscar", 128, 4),
    (4, 2, 64, 32, "int2", 64, 7),
    (4, 2, 32, 64, "int2", 128, 6),
    (4, 2, 128, 64, "oscar", 64, 4),
    (3, 2, 32, 32, "oscar", 128, 3),
    (3, 4, 64, 32, "int2", 64, 8),
    (2, 3, 32, 32, "oscar", 64, 2),
    (3, 3, 32, 64, "kivi", 256, 5),
    (2, 4, 32, 32, "int2", 128, 3),
    (2, 4, 64, 64, "oscar", 128, 8),
    (2, 4, 128, 32, "kivi", 64, 2),
    (2, 2, 128, 64, "int2-long", 128, 4),
    (4, 4, 128, 32, "oscar", 256, 1),
]


@on_each_device
@pytest.mark.parametrize(("name", "d", "q_per_kv", "q_groups", "arch"), CASES)
def test_decode_attention_over_unequal_lengths_and_any_number_of_blocks(
    device, seed, name, d, q_per_kv, q_groups, arch
):
    for blocks, lengths in ((1, RAGGED), (5, RAGGED), (23, (129, 0, 257, 64)), (9, (2, 385, 0, 0))):
        plan = DecodePlan(q_per_kv, q_groups, 4, 2, blocks)
        check(*run(device, ALL[name], d, plan, lengths, seed, arch=arch), lengths)


ROTATED = [case for case in CASES if case[1] in attention.ROTATED_DIMS and "64-" not in case[0]]


def rotation_traits(name: str, d: int, q_per_kv: int, q_groups: int, arch: int) -> list[tuple]:
    """What the rotation of a result may depend on: how heads are shared, and how their values come."""
    scheme = ALL[name]
    return [("heads", d, q_per_kv, q_groups), ("values", d, scheme.value_bits), (scheme.quantized, scheme.rotate, arch)]


@on_each_device_of(("name", "d", "q_per_kv", "q_groups", "arch"), ROTATED, rotation_traits)
def test_decode_attention_rotates_its_results(device, seed, name, d, q_per_kv, q_groups, arch):
    """Of heads that one warp has whole, of those that warps share, and blocks."""
    for blocks, lengths in ((1, RAGGED), (7, RAGGED), (23, (129, 0, 257, 64))):
        plan = DecodePlan(q_per_kv, q_groups, 4, 2, blocks)
        check(*run(device, ALL[name], d, plan, lengths, seed, arch=arch, rotated=True), lengths)


def test_kernels_are_for_pairs_of_2_3_and_4_bits():
    for key_bits in range(1, 9):
        for value_bits in range(1, 9):
            scheme = replace(SCHEMES["oscar"], key_bits=key_bits, value_bits=value_bits)
            reason = unsupported(scheme, 128)
            assert (reason is None) == (2 <= key_bits <= 4 and 2 <= value_bits <= 4)
            what = f"keys in {key_bits} bits and groups of 32, values in {value_bits} bits and groups of 32"
            assert reason is None or what in reason
    with pytest.raises(ValueError, match="16 is for both"):
        replace(SCHEMES["oscar"], key_bits=16)


@on_each_device
@pytest.mark.parametrize(("key_bits", "value_bits", "group", "value_group", "name", "d", "q_per_kv"), BITS)
def test_keys_and_values_may_have_different_bits_and_groups(
    device, seed, key_bits, value_bits, group, value_group, name, d, q_per_kv
):
    scheme = replace(
        SCHEMES[name], key_bits=key_bits, value_bits=value_bits, group=group, max_value_group=value_group
    )
    plan = DecodePlan(q_per_kv, 1, 4, 2, 5)
    check(*run(device, scheme, d, plan, RAGGED, seed, arch=90), RAGGED)


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
def test_decode_attention_over_fewer_units_than_blocks(device, seed, name):
    for lengths in ((2, 385, 0, 0), (0, 40, 0, 1), (0, 0, 0, 0)):
        check(*run(device, SCHEMES[name], 128, DecodePlan(4, 1, 4, 2, 132), lengths, seed), lengths)


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
def test_a_head_of_more_blocks_than_a_round_takes_is_merged_in_rounds(device, seed, name):
    tokens = 7000 if SCHEMES[name].quantized else 1800  # more than 16 blocks a head, of five items each
    plan = DecodePlan(3, 1, 2, 2, 61)
    assert len(blocks_with_items(device, SCHEMES[name], plan, 64, (tokens,))) > 2 * 16
    check(*run(device, SCHEMES[name], 64, plan, (tokens,), seed), (tokens,))


def blocks_with_items(device, scheme: Scheme, plan: DecodePlan, d: int, lengths: Sequence[int]) -> np.ndarray:
    """How many items each block has, of those that have some."""
    state = state_of(device, attention.Heads(plan.q_per_kv * KV_HEADS, KV_HEADS, d), scheme, plan, lengths)
    device.run(attention.schedule(state))
    items = np.array(device.numpy(state.tasks)).reshape(plan.blocks, -1, 4)[:, : 2 * plan.warps : 2, 3].sum(axis=1)
    return items[items > 0]


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
@pytest.mark.parametrize("tokens", [1, 65, 300, 513, 900])
def test_blocks_have_five_items_at_least_where_heads_would_be_split_over_many(device, seed, name, tokens):
    """Two heads over 132 blocks; over 32 a block may have one, as may one of many heads."""
    scheme, plan = SCHEMES[name], DecodePlan(4, 1, 4, 2, 132)
    items, few = (blocks_with_items(device, scheme, replace(plan, blocks=n), 128, (tokens,)) for n in (132, 32))
    total = items.sum()
    assert len(items) == min(2 * max(total // 10, 1), total) and items.sum() == few.sum()
    assert np.ptp(items) <= 1 and len(few) == min(total, 32)
    check(*run(device, scheme, 128, plan, (tokens,), seed), (tokens,))


@on_each_device
@pytest.mark.parametrize(("name", "d"), [("int2", 128), ("int2-compact", 64)])
def test_a_block_may_have_as_many_parts_as_a_warp_has_lanes(device, seed, name, d):
    for lengths in (RAGGED, (1400,)):
        check(*run(device, SCHEMES[name], d, DecodePlan(4, 1, 16, 2, 3), lengths, seed, arch=90), lengths)


@on_each_device
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 127, 128, 129, 130, 191, 192, 193, 256, 257])
@pytest.mark.parametrize("name", ["int2", "k4v2", "bf16"])
def test_decode_attention_around_every_boundary(device, seed, name, n):
    check(*run(device, SCHEMES[name], 64, DecodePlan(2, 1, 4, 2, 3), (n,), seed), (n,))


@on_each_device
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["plain-64-64", "plain-128-128", "oscar-64-0"])
def test_decode_attention_around_every_boundary_of_a_window_that_is_not_emptied(device, seed, name, arch):
    """A tile goes round the ring's end where the window begins in its middle; two sequences of one warp may differ."""
    plan = DecodePlan(2, 1, 4, 2, 5)
    lengths = tuple(n + i for n in (64, 128, 192, 256, 320, 384) for i in (0, 1))
    check(*run(device, ALL[name], 64, plan, lengths, seed, arch=arch), lengths)
    for first in range(193, 321, 32):
        lengths = tuple(range(first, first + 32, 3))
        check(*run(device, ALL[name], 64, plan, lengths, seed, arch=arch), lengths)


@on_each_device
@pytest.mark.parametrize("name", ["int2", "k4v2", "bf16"])
@pytest.mark.parametrize("kind", ["zero", "equal", "ramp", "tail", "sink", "peak"])
def test_decode_attention_over_difficult_caches(device, seed, kind, name):
    check(*run(device, SCHEMES[name], 128, DecodePlan(4, 1, 4, 2, 5), RAGGED, seed, kind=kind), RAGGED)


@on_each_device
@pytest.mark.parametrize("kind", ["tail", "sink"])
@pytest.mark.parametrize("name", ["int4", "oscar", "int2", "k4v2"])
def test_steep_logits_are_off_by_the_rounding_of_q_times_step(device, seed, name, kind):
    """With it in the reference the log-sum-exp agrees as closely as that of easy caches; without it is off by up to
    2e-2."""
    plan, n, scheme = DecodePlan(4, 1, 4, 2, 5), 513, SCHEMES[name]
    q, (x,) = drawn(128, plan, (n,), seed, kind)
    out, lse = (y[0] for y in attended(device, scheme, plan, q, (x,)))
    packed = cached_packed(scheme, x)
    off = key_roundings(q[0], x, packed, scheme)
    want = softmax_attention(q[0], *dequantized(x, packed, scheme), off)
    error = np.linalg.norm(out - want[0]) / np.linalg.norm(want[0])
    print(f"error {error:.1e}, log-sum-exp off by {np.abs(lse - want[1]).max():.1e}, of {np.abs(off).max():.1e}")
    assert error <= LIMIT and np.abs(lse - want[1]).max() <= LIMIT / 2


@on_each_device
@pytest.mark.parametrize("sinks", [0, 32, 64, 100, 128])
@pytest.mark.parametrize("name", ["plain", "k4v2"])  # sinks come with one flush
def test_decode_attention_with_any_number_of_sinks(device, seed, name, sinks):
    scheme = replace(ALL[name], sinks=sinks)
    check(*run(device, scheme, 64, DecodePlan(3, 1, 4, 2, 5), RAGGED, seed), RAGGED)


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
def test_decode_attention_gives_equal_bits_in_every_order_of_blocks_and_threads(device, seed, name):
    plan, kept = DecodePlan(4, 1, 4, 2, 7), {"reference": False}
    first, *others = [run(device, SCHEMES[name], 128, plan, RAGGED, seed, order=order, **kept)[0] for order in range(4)]
    assert all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
def test_launches_that_alternate_halves_of_a_workspace_find_no_sums_of_each_other_in_it(device, seed, name):
    """Three launches after each of three schedules, so that parity 0 follows parity 0; caches, q and splits differ."""
    rng, scheme = np.random.default_rng(seed), SCHEMES[name]
    plan, heads = DecodePlan(4, 1, 4, 2, 7), attention.Heads(KV_HEADS * 4, KV_HEADS, 64)
    workspace = device.array(np.zeros(plan.workspace_floats(64), np.float32))  # nothing of it is empty
    for lengths in ((300, 1, 128, 513), (700, 40, 0, 0), (129, 400, 400, 2)):
        state = replace(state_of(device, heads, scheme, plan, lengths), workspace=workspace)
        device.run(attention.schedule(state))
        for parity in (0, 1, 0):
            q = rng.normal(size=(len(lengths), heads.q_heads, 64)).astype(BF16)
            sequences = [history(rng, n, 64, "", q[0, 0].astype(np.float64)) for n in lengths]
            out, lse = device.empty(q.shape, np.float32), device.empty(q.shape[:2], np.float32)
            cache = filled(device, sequences, scheme, heads)
            device.run(attention.decode_attention(state, device.array(q), cache, out, lse=lse, parity=parity))
            expected = np.zeros(q.shape), np.zeros(q.shape[:2])
            for b, x in enumerate(sequences):
                if x.shape[2]:
                    old = cached_packed(scheme, x)
                    expected[0][b], expected[1][b] = softmax_attention(q[b], *dequantized(x, old, scheme))
            check((device.numpy(out), device.numpy(lse, allow_unwritten=True)), expected, lengths)


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
def test_a_number_that_is_none_ends_in_its_own_heads(device, seed, name):
    """Parts that are NaN are taken for parts that are not there yet, and asked for again: once."""
    plan, lengths = DecodePlan(4, 1, 4, 2, 7), (1400, 300)
    good, bad = (
        run(device, SCHEMES[name], 64, plan, lengths, seed, kind=kind, reference=False)[0] for kind in ("", "nan")
    )
    assert np.isnan(bad[0][0, :4]).all() and np.isnan(bad[1][0, :4]).all()  # the first kv head of the first sequence
    assert (
        np.array_equal(good[0][0, 4:], bad[0][0, 4:])
        and np.array_equal(good[0][1], bad[0][1])
        and np.isfinite(good[0]).all()
    )


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_warps_with_many_units_ask_for_two_of_them_early(device, seed, warps, name):
    lengths = (1400, 0, 900)
    check(*run(device, SCHEMES[name], 128, DecodePlan(4, 1, warps, 2, 2), lengths, seed, arch=90), lengths)


# --- the whole grid, with the plans that the engine makes: on the card only


def planned(scheme: Scheme, d: int, q_per_kv: int, batch: int) -> DecodePlan:
    return decode_plan(attention.Heads(KV_HEADS * q_per_kv, KV_HEADS, d), scheme, batch, Card.current())


OTHERS = [
    name
    for name, scheme in SCHEMES.items()
    if name != "int2" and not (scheme.quantized and unsupported(scheme, 128))
]
GRID = [("int2", d, q_per_kv) for d in HEAD_DIMS for q_per_kv in (*range(1, 9), 16)]
GRID += [(name, d, (2 * i + 3 * j) % 8 + 1) for i, name in enumerate(OTHERS) for j, d in enumerate(HEAD_DIMS)]


@on_the_card
@pytest.mark.parametrize(("name", "d", "q_per_kv"), GRID)
def test_decode_attention_over_the_grid_of_shapes(device, seed, name, d, q_per_kv):
    lengths = (1, 31, 128, 129, 0, 640, 1500, 257)
    check(*run(device, SCHEMES[name], d, planned(SCHEMES[name], d, q_per_kv, len(lengths)), lengths, seed), lengths)


@on_the_card
@pytest.mark.parametrize("name", ["int2", "bf16"])
@pytest.mark.parametrize("batch", [1, 16, 64, 256])
def test_decode_attention_over_batches(device, seed, batch, name):
    lengths = tuple(np.random.default_rng(seed + 1).integers(0, 700, batch).tolist()) if batch > 1 else (20000,)
    plan = planned(SCHEMES[name], 128, 4, batch)
    got, expected = run(device, SCHEMES[name], 128, plan, lengths, seed)
    check(got, expected, lengths)
    again = run(device, SCHEMES[name], 128, plan, lengths, seed, reference=False)[0]
    # No log-sum-exp of no tokens
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, again, strict=True))


# --- contexts that no short test reaches: an index, a sum or a round of merging that grows with the length


@on_the_card
@pytest.mark.parametrize("n", [131_073, 262_145])
@pytest.mark.parametrize("kind", ["", "equal", "tail", "sink", "peak"])
@pytest.mark.parametrize("name", ["int2", "oscar", "int4", "k4v2", "bf16"])
def test_decode_attention_over_the_longest_contexts(device, seed, name, kind, n):
    scheme, plan = SCHEMES[name], planned(SCHEMES[name], 128, 4, 1)
    q, (x,) = drawn(128, plan, (n,), seed, kind)
    got = attended(device, scheme, plan, q, (x,))
    packed = cached_packed(scheme, x)
    kv = dequantized(x, packed, scheme)
    bounds = [(softmax_attention(q[0], *kv), LIMIT)]
    # Heavy tails, and a packed token of 20 times the norm: steep logits, of which q * step in float16 is not exact.
    if packed and (kind == "tail" or kind == "sink" and not scheme.sinks):
        rounded = softmax_attention(q[0], *kv, key_roundings(q[0], x, packed, scheme))
        exact, _ = bounds.pop()
        bounds = [(rounded, LIMIT)]
        if kind == "tail":  # where the largest logit is a matter of chance, and so is by how much it is off
            plain, _ = softmax_attention(q[0], *x.astype(np.float32))
            bounds.append((exact, STEEP * np.linalg.norm(exact[0] - plain) / np.linalg.norm(plain)))
    for want, bound in bounds:
        error = np.linalg.norm(got[0][0] - want[0]) / np.linalg.norm(want[0])
        print(f"error {error:.1e}, log-sum-exp off by {np.abs(got[1][0] - want[1]).max():.1e}, bound {bound:.1e}")
        assert error <= bound and np.abs(got[1][0] - want[1]).max() <= bound * max(1, np.abs(want[1]).max())
