"""Decode attention against float64 over the dequantized cache, simulated and on a GPU; pack.cu fills the cache."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minioscar import oscar
from minioscar.cache import BF16
from minioscar.ops import raw

from .kernel_device import on_each_device

BATCH, KV_HEADS, CAPACITY = 4, 2, 640
WARPS, STAGES, ADDED = 4, 2, 1


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One query token in float64: q [q_heads, d], keys, values [kv_heads, n, d] -> out [q_heads, d], log-sum-exp [q_heads]."""
    heads, _, d = keys.shape
    x = q.reshape(heads, -1, d).astype(np.float64) @ keys.astype(np.float64).swapaxes(1, 2) / math.sqrt(d)
    top = x.max(axis=-1, keepdims=True)
    p = np.exp(x - top)
    total = p.sum(axis=-1, keepdims=True)
    return (p @ values / total).reshape(-1, d), (np.log(total) + top).reshape(-1)


def history(rng: np.random.Generator, n: int, d: int, kind: str) -> np.ndarray:
    """Keys and values of n tokens [2, KV_HEADS, n, d]."""
    x = rng.normal(size=(2, KV_HEADS, n, d))
    if kind == "zero":
        x[0] = 0
    if kind == "ramp":  # each page has larger logits than all before
        x[0] *= np.linspace(0.1, 8, n)[:, None]
    if kind == "sink" and n:
        x[0, :, 0] *= 20
    return x.astype(BF16)


def dequantized(x: np.ndarray, packed: int, scheme: oscar.Scheme) -> tuple[np.ndarray, np.ndarray]:
    """What attention takes the keys and values of a sequence to be, its first `packed` tokens packed."""
    keys, values = x.astype(np.float32)
    if packed:
        norms = oscar.token_norms(x[0, :, :packed].transpose(1, 0, 2)) if scheme.scale else np.ones(packed, np.float32)
        old = slice(scheme.sinks, packed)
        keys[:, old] = oscar.dequantize_keys(*oscar.quantize_keys(keys[:, :packed], norms, scheme), norms, scheme)[:, old]
        values[:, old] = oscar.dequantize_values(*oscar.quantize_values(values[:, :packed], scheme), scheme)[:, old]
    return keys, values


def packed_cache(device, sequences, scheme, heads) -> dict:
    """The cache of sequences whose last token is new: full blocks before it packed, the rest in the window."""
    d, rows = heads.head_dim, [x.shape[2] for x in sequences]
    packed = [max(n - 1, 0) // oscar.WINDOW * oscar.WINDOW for n in rows]
    window = np.full((2, BATCH, KV_HEADS, oscar.WINDOW, d), np.nan, BF16)
    norms = np.ones((BATCH, CAPACITY), np.float32)
    for b, (x, old) in enumerate(zip(sequences, packed, strict=True)):
        window[:, b, :, : x.shape[2] - old] = x[:, :, old:]
        norms[b, : x.shape[2]] = oscar.token_norms(x[0].transpose(1, 0, 2))
    cache = {"pages": device.empty((BATCH, KV_HEADS, CAPACITY // 64, raw.page_bytes(scheme, d)), np.uint8), "norms": device.array(norms)}
    cache |= {f"window_{n}": device.array(w) for n, w in zip(("keys", "values"), window, strict=True)}
    if scheme.sinks:
        cache |= {f"sink_{n}": device.empty((BATCH, KV_HEADS, scheme.sinks, d), BF16) for n in ("keys", "values")}
    keys, values = (device.array(x) for x in np.concatenate(sequences, axis=2).transpose(0, 2, 1, 3))
    first, starts, counts = (device.array(np.array(x, np.int32)) for x in (np.cumsum([0, *rows[:-1]]), [0] * BATCH, packed))
    new = raw.Arrivals(keys, values, KV_HEADS * d, KV_HEADS * d, first, None, starts, counts, max(rows))
    device.run(raw.pack_bulk(heads, scheme, new, cache))
    return cache


def run(device, name, d, q_per_kv, share, blocks, arch, lengths, kind, seed, order=0):
    """Output and log-sum-exp, the kernel's and the reference's, each [BATCH, q_heads, ...]."""
    rng = np.random.default_rng(seed)
    scheme, heads = oscar.SCHEMES[name], raw.Heads(KV_HEADS * share * q_per_kv, KV_HEADS, d)
    q = rng.normal(size=(BATCH, heads.q_heads, d)).astype(BF16)
    sequences = [history(rng, n, d, kind) for n in lengths]
    if scheme.quantized:
        cache = packed_cache(device, sequences, scheme, heads)
    else:
        plain = np.full((2, BATCH, KV_HEADS, CAPACITY, d), np.nan, BF16)
        for b, x in enumerate(sequences):
            plain[:, b, :, : x.shape[2]] = x
        cache = {n: device.array(x) for n, x in zip(("keys", "values"), plain, strict=True)}
    plan = raw.Plan(q_per_kv, share, WARPS, STAGES, blocks)
    out, lse = device.empty((BATCH, heads.q_heads, d), np.float32), device.empty((BATCH, heads.q_heads), np.float32)
    workspace, arrived = device.empty(plan.workspace_floats(d), np.float32), device.array(np.zeros(BATCH * KV_HEADS * share, np.int32))
    known = device.array(np.array(lengths, np.int32) - ADDED)
    device.run(
        raw.decode_attention(heads, scheme, plan, device.array(q), cache, known, out, lse, workspace, arrived, added=ADDED), arch, order
    )
    assert not device.numpy(arrived).any()
    expected = np.zeros(q.shape), np.zeros(q.shape[:2])
    for b, x in enumerate(sequences):
        if x.shape[2]:
            old = (x.shape[2] - 1) // oscar.WINDOW * oscar.WINDOW if scheme.quantized else 0
            expected[0][b], expected[1][b] = attention(q[b], *dequantized(x, old, scheme))
    return (device.numpy(out), device.numpy(lse, allow_unwritten=True)), expected


def check(got, expected, lengths, limit):
    assert np.all(np.isfinite(got[0].astype(np.float32)))
    error = np.linalg.norm(got[0].astype(np.float64) - expected[0]) / np.linalg.norm(expected[0])
    assert error <= limit, error
    alive = np.array(lengths) > 0
    assert np.all(got[0][~alive] == 0)
    assert np.abs(got[1] - expected[1])[alive].max() <= 2e-3 * max(1, np.abs(expected[1]).max())


RAGGED = (300, 1, 128, 513)
CASES = [  # scheme, head_dim, q heads a kv head, share, compute capability
    ("int2", 128, 4, 1, 80),
    ("int2", 128, 4, 1, 90),
    ("int2", 64, 3, 1, 80),
    ("int2", 96, 8, 1, 80),
    ("int2", 256, 1, 1, 80),
    ("int2-compact", 128, 8, 2, 80),
    ("oscar", 128, 7, 1, 80),
    ("oscar", 64, 2, 1, 90),
    ("kivi", 96, 4, 1, 80),
    ("int4", 128, 4, 1, 80),
    ("bf16", 128, 4, 1, 80),
    ("bf16", 64, 3, 1, 90),
]


@on_each_device
@pytest.mark.parametrize(("name", "d", "q_per_kv", "share", "arch"), CASES)
def test_decode_attention_over_unequal_lengths_and_any_number_of_blocks(device, seed, name, d, q_per_kv, share, arch):
    for blocks, lengths in ((1, RAGGED), (5, RAGGED), (23, (129, 0, 257, 64)), (9, (2, 385, 0, 0))):
        check(*run(device, name, d, q_per_kv, share, blocks, arch, lengths, "", seed), lengths, 2e-3)


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
def test_decode_attention_over_fewer_units_than_blocks(device, seed, name):
    for lengths in ((2, 385, 0, 0), (0, 40, 0, 1), (0, 0, 0, 0)):
        got, expected = run(device, name, 128, 4, 1, 132, 80, lengths, "", seed)
        if any(lengths):
            check(got, expected, lengths, 2e-3)


@on_each_device
@pytest.mark.parametrize("kind", ["zero", "ramp", "sink"])
def test_decode_attention_over_difficult_caches(device, seed, kind):
    check(*run(device, "int2", 128, 4, 1, 5, 80, RAGGED, kind, seed), RAGGED, 2e-3)


@on_each_device
@pytest.mark.parametrize("name", ["int2", "bf16"])
def test_decode_attention_gives_equal_bits_in_every_order_of_blocks_and_threads(device, seed, name):
    first, *others = [run(device, name, 128, 4, 1, 7, 80, RAGGED, "", seed, order)[0] for order in range(4)]
    assert all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))
