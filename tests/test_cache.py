"""The cache holds, bit for bit, what oscar.py says, whichever way the tokens came in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minioscar import oscar
from minioscar.cache import BF16, Cache, NewTokens, cache_bytes
from minioscar.config import Config
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES, WINDOW, Scheme

from .tiny import CONFIG, WINDOWS, key_feedback

ALL = SCHEMES | WINDOWS
QUANTIZED = [name for name, scheme in ALL.items() if type(scheme) is Scheme and scheme.quantized]


def config(**changes) -> Config:
    return Config.from_dict({**CONFIG, "head_dim": 64, **changes})


def appended(scheme, keys, values, pieces, context=640):
    """A one-layer cache after the tokens came in pieces of the given sizes; keys, values [tokens, kv_heads, d]."""
    ops = Reference()
    cache = Cache(config(num_hidden_layers=1), scheme, 2, context, ops)
    norms, at = oscar.token_norms(keys.astype(BF16)), 0
    for count in pieces:
        batch = cache.batch_for([1], [count])
        span = slice(at, at + count)
        new = NewTokens(keys[span], values[span], norms[span] if scheme.scale else None, key_feedback(scheme, 2, 64))
        cache.layers[0].append(new, batch)
        cache.advance(batch)
        at += count
    return cache, norms


PIECES = [
    [640], [300, 340], [1] * 260, [127, 1, 1, 127, 384], [128, 128, 128], [500, 12, 12, 1], [5], [31, 1, 1, 30, 1, 1],
    [63, 64, 1, 63, 1, 1, 64, 1],
]


@pytest.mark.parametrize("pieces", PIECES, ids=lambda p: f"{len(p)}x{p[0]}")
@pytest.mark.parametrize("name", QUANTIZED)
def test_packed_blocks_window_and_sinks_are_what_oscar_says(name, pieces, seed):
    scheme, n = ALL[name], sum(pieces)
    keys, values = np.random.default_rng(seed).standard_normal((2, n, 2, 64)).astype(np.float32)
    cache, norms = appended(scheme, keys, values, pieces)
    layer, packed = cache.layers[0], max(n // scheme.flush * scheme.flush - scheme.keep, 0)
    stored = {"keys": keys.astype(BF16).swapaxes(0, 1), "values": values.astype(BF16).swapaxes(0, 1)}
    assert cache.lengths.tolist() == [0, n]
    row = layer.packed_row(1, packed)
    for kind, bits in (("key", scheme.key_bits), ("value", scheme.value_bits)):
        whole = stored[f"{kind}s"][:, :packed]
        if packed == 0:
            continue
        if kind == "key":
            codes, step, minimum = oscar.quantize_keys(
                whole, norms[:packed], scheme, feedback=key_feedback(scheme, 2, 64)
            )
        else:
            codes, step, minimum = oscar.quantize_values(whole, scheme)
        np.testing.assert_array_equal(oscar.unpack(row[f"{kind}_codes"], bits), codes)
        np.testing.assert_array_equal(row[f"{kind}_step"], step)
        if minimum is not None:
            np.testing.assert_array_equal(row[f"{kind}_min"], minimum)
        if scheme.sinks:
            sinks = min(scheme.sinks, packed)
            np.testing.assert_array_equal(layer[f"sink_{kind}s"][1, :, :sinks], whole[:, :sinks])
    if scheme.scale:
        np.testing.assert_array_equal(layer.norms(1, n), norms)
    for kind in ("keys", "values"):
        for token in range(packed, n):
            slot = token % (scheme.flush + scheme.keep)
            np.testing.assert_array_equal(layer[f"window_{kind}"][1, :, slot], stored[kind][:, token])


@pytest.mark.parametrize("name", QUANTIZED)
def test_attention_reads_dequantized_blocks_sinks_and_window(name, seed):
    scheme, n = ALL[name], 300
    keys, values = np.random.default_rng(seed).standard_normal((2, n, 2, 64)).astype(np.float32)
    cache, norms = appended(scheme, keys, values, [n])
    end = scheme.packed_tokens(n)
    got_keys, got_values = cache.layers[0].past(1, n, scheme.packed_tokens(n))
    want = {
        "keys": keys.astype(BF16).astype(np.float32).swapaxes(0, 1),
        "values": values.astype(BF16).astype(np.float32).swapaxes(0, 1)
    }
    exact = {**want}
    packed = slice(0, end)
    want = {kind: x.copy() for kind, x in want.items()}
    codes = oscar.quantize_keys(want["keys"][:, packed], norms[packed], scheme, feedback=key_feedback(scheme, 2, 64))
    want["keys"][:, packed] = oscar.dequantize_keys(*codes, norms[packed], scheme)
    codes = oscar.quantize_values(want["values"][:, packed], scheme)
    want["values"][:, packed] = oscar.dequantize_values(*codes, scheme)
    for kind, got in (("keys", got_keys), ("values", got_values)):
        want[kind][:, : scheme.sinks] = exact[kind][:, : scheme.sinks]
        np.testing.assert_array_equal(got, want[kind])
        assert (got[:, end:] == exact[kind][:, end:]).all()
        assert (got[:, scheme.sinks : end] != exact[kind][:, scheme.sinks : end]).any()


@pytest.mark.parametrize("pieces", [[300], [100, 100, 100], [127, 1, 172]], ids=str)
def test_outlier_tokens_are_those_of_smallest_keys_and_come_back_exactly(pieces, seed):
    """Three of each block and kv head; no other token of their groups pays for them."""
    scheme, rng = SCHEMES["ott"], np.random.default_rng(seed)
    keys, values = (4 + rng.standard_normal((2, 300, 2, 64))).astype(BF16).astype(np.float32)
    small = {0: ([3, 17, 90], [5, 6, 127]), 1: ([0, 64, 65], [31, 32, 100])}  # kv head -> places in blocks 0 and 1
    for head, blocks in small.items():
        for block, places in enumerate(blocks):
            keys[np.array(places) + WINDOW * block, head] *= 0.01
    keys = keys.astype(BF16).astype(np.float32)
    cache, _ = appended(scheme, keys, values, pieces)
    got_keys, got_values = cache.layers[0].past(1, 300, scheme.packed_tokens(300))
    for head, blocks in small.items():
        places = np.concatenate([np.array(places) + WINDOW * block for block, places in enumerate(blocks)])
        np.testing.assert_array_equal(got_keys[head, places], keys[places, head])
        np.testing.assert_array_equal(got_values[head, places], values[places, head])
        others = np.setdiff1d(np.arange(256), places)
        # 4 +- 3 in 4 levels; with a 0 in the group, 4 / 3 more
        assert abs(got_keys[head, others] - keys[others, head]).max() < 1.5
        assert (got_values[head, others] != values[others, head]).any(axis=1).all()


@pytest.mark.parametrize(("flush", "keep"), [(128, 0), (64, 64), (32, 96), (64, 128), (32, 0)])
def test_tokens_are_packed_after_the_step_that_fills_the_window(flush, keep, seed):
    """The token that fills it still attends to all of it unquantized; the next sees the oldest `flush` quantized."""
    scheme, ops, rng = replace(SCHEMES["oscar"], flush=flush, keep=keep), Reference(), np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 200, 2, 64)).astype(BF16).astype(np.float32)
    for last in (flush + keep - 1, flush + keep):
        cache, _ = appended(scheme, keys[:last], values[:last], [last])
        q = rng.standard_normal((1, 4, 64)).astype(np.float32)
        new = NewTokens(keys[last : last + 1], values[last : last + 1], oscar.token_norms(keys[last : last + 1]))
        got = ops.attention(q, new, cache.layers[0], cache.batch_for([1], [1]))
        scores = np.einsum("hgd,thd->hgt", q[0].reshape(2, 2, 64), keys[: last + 1]) / 8
        p = np.exp(scores - scores.max(-1, keepdims=True))
        exact = np.einsum("hgt,thd->hgd", p / p.sum(-1, keepdims=True), values[: last + 1]).reshape(4, 64)
        error = np.linalg.norm(got[0] - exact) / np.linalg.norm(exact)
        assert error < 1e-5 if last < flush + keep else error > 1e-2


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("batch", "context"), [(1, 64), (1, 128), (3, 1000), (2, 2048)])
def test_nbytes_is_exact_and_known_before_allocation(name, batch, context):
    cache = Cache(config(), ALL[name], batch, context, Reference())
    of_layers = (array for layer in cache.layers for name, array in layer.arrays.items() if name != "table")
    allocated = sum(array.nbytes for array in of_layers)
    assert cache.nbytes == cache_bytes(config(), ALL[name], batch, context) == allocated


def test_oscar_takes_3_bits_an_element_and_a_norm():
    c, scheme = config(num_hidden_layers=1), SCHEMES["oscar"]
    slope = cache_bytes(c, scheme, 1, 4096) - cache_bytes(c, scheme, 1, 2048)
    elements = 2 * 2048 * c.num_kv_heads * c.head_dim
    assert slope == elements * 3 // 8 + 2048 * 4


@pytest.mark.parametrize("name", ALL)
def test_tokens_in_chunks_up_to_the_flush_are_tokens_one_by_one(name, seed):
    """What `eval` relies on. Keys and values are BF16 numbers here, so that only the order of float32 sums can
    differ."""
    scheme, ops, rng = ALL[name], Reference(), np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 330, 2, 64)).astype(BF16).astype(np.float32)
    q, norms, outputs = rng.standard_normal((330, 4, 64)).astype(np.float32), oscar.token_norms(keys), []
    flushes = np.arange(150 // scheme.flush + 1, 330 // scheme.flush + 1) * scheme.flush
    for pieces in ([150] + [1] * 180, np.diff([0, 150, *flushes, 330]).tolist()):
        cache, rows, at = Cache(config(num_hidden_layers=1), scheme, 1, 330, ops), [], 0
        for count in pieces:
            batch, span = cache.batch_for([0], [count]), slice(at, at + count)
            new = NewTokens(
                keys[span], values[span], norms[span] if scheme.scale else None, key_feedback(scheme, 2, 64)
            )
            rows.append(ops.attention(q[span], new, cache.layers[0], batch))
            cache.advance(batch)
            at += count
        outputs.append(np.concatenate(rows))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=2e-6 * abs(outputs[1]).max())


def test_a_row_that_is_full_is_refused_and_a_reset_row_is_empty():
    cache = Cache(config(), SCHEMES["int2"], 2, 16, Reference())
    cache.advance(cache.batch_for([0], [16]))
    with pytest.raises(ValueError, match="row 0 holds 16 of 16 tokens"):
        cache.batch_for([0], [1])
    cache.reset(0)
    assert cache.batch_for([0], [16]).starts == (0,)
