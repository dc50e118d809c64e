"""The kernels against oscar.py, simulated and on a GPU: rotation, norms and packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minioscar import oscar
from minioscar.cache import BF16
from minioscar.ops import attention
from minioscar.pages import HEAD_DIMS, from_pages, page_bytes, unsupported

from .kernel_device import in_blocks, of_row, on_each_device, on_each_device_over, on_the_card, some_table
from .pairwise import scheme_traits
from .tiny import WINDOWS, key_feedback

KERNEL_WINDOWS = [name for name, scheme in WINDOWS.items() if unsupported(scheme, 64) is None]


def rope(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """x: [tokens, heads, d]; cosines and sines of its positions [tokens, d / 2]; half-split pairs."""
    a, b = np.split(x, 2, axis=-1)
    c, s = cosines[:, None], sines[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def qk_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def near(got: np.ndarray, exact: np.ndarray) -> bool:
    """Rounded to bf16 once: half a unit in the last place of 8 bits, and float32 errors of the largest number of its
    head."""
    got = got.astype(np.float64)
    return bool(np.all(np.abs(got - exact) <= 2.0**-8 * np.abs(exact) + 1e-6 * np.abs(exact).max(-1, keepdims=True)))


@on_each_device
@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize(("rotate", "rotate_values"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("q_heads", "kv_heads", "normed"), [(9, 3, False), (4, 1, True), (20, 18, True)])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_rotate_scale_is_norm_rope_and_rotation_rounded_once(
    device, seed, d, q_heads, kv_heads, normed, rotate, rotate_values, prefill
):
    rng = np.random.default_rng(seed)
    tokens, slots, capacity, norm_stride, eps = 4, 5, 128, 300, 1e-6
    qkv = rng.normal(size=(tokens, q_heads + 2 * kv_heads, d)).astype(BF16)
    qkv[1, q_heads : q_heads + kv_heads] = 0  # a token whose keys have norm 0
    weights = [rng.uniform(0.5, 2, d).astype(BF16) if normed else None for _ in "qk"]
    positions, rows = np.array([0, 130, -1, 299], np.int32), np.array([3, 0, 1, 2], np.int32)
    angles = np.arange(norm_stride)[:, None] * 1e4 ** -(np.arange(d // 2) / (d // 2))
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    q_out = device.empty((tokens, q_heads, d), BF16)
    k_out = device.empty((tokens, kv_heads, d), BF16) if prefill else None
    keys, values = (None if prefill else device.empty((slots, kv_heads, capacity, d), BF16) for _ in "kv")
    values = device.empty((tokens, kv_heads, d), BF16) if prefill and rotate_values else values
    table = some_table(rng, slots, 3)
    norms = device.empty((table.size, 128), np.float32)
    q_weight, k_weight = (w if w is None else device.array(w) for w in weights)
    tables, heads = map(device.array, (cosines, sines)), attention.Heads(q_heads, kv_heads, d)
    rotation = attention.Rotation(heads, *tables, rotate, q_weight, k_weight, eps, rotate_values)
    to = attention.KeyOutputs(k_out, keys, values, norms, device.array(table), device.array(rows))
    launch = attention.rotate_scale(rotation, device.array(qkv), device.array(positions), q_out, to)
    device.run(launch, seed=seed % 7)
    q_got, n_got, k_got = (device.numpy(a, allow_unwritten=True) for a in (q_out, norms, k_out if prefill else keys))

    x = qkv.astype(np.float64)
    q, k, v = np.split(x, [q_heads, q_heads + kv_heads], axis=1)
    if normed:
        q, k = (qk_norm(y, w.astype(np.float64), eps) for y, w in zip((q, k), weights, strict=True))
    q, k = (rope(y, cosines[positions].astype(np.float64), sines[positions].astype(np.float64)) for y in (q, k))
    if rotate:
        q, k = (y @ oscar.hadamard(d).astype(np.float64) for y in (q, k))
    n_got = n_got[table].reshape(slots, -1)
    assert (n_got.view(np.uint32) != 0xFFFFFFFF).sum() == (positions >= 0).sum()
    for t, (position, row) in enumerate(zip(positions, rows, strict=True)):
        if position < 0:
            assert np.all(q_got[t].view(np.uint16) == 0xFFFF) and np.all(n_got[row].view(np.uint32) == 0xFFFFFFFF)
            continue
        key = k_got[t] if prefill else k_got[row, :, position % capacity]
        assert near(q_got[t], q[t]) and near(key, k[t])
        expected = oscar.token_norms(key[None])[0]
        assert abs(n_got[row, position] - expected) <= 1e-6 * expected
    own = positions >= 0
    if values is not None:
        v_got = device.numpy(values, allow_unwritten=True)
        v_got = v_got[own] if prefill else v_got[rows[own], :, positions[own] % capacity]
        assert near(v_got, v[own] @ oscar.hadamard(d)) if rotate_values else np.array_equal(v_got, v[own].astype(BF16))
    if prefill:
        return
    live = rows[own], slice(None), positions[own] % capacity
    k_got[live] = np.frombuffer(b"\xff\xff", BF16)[0]
    assert np.all(k_got.view(np.uint16) == 0xFFFF)  # nothing else was written


@on_each_device
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_a_shift_takes_another_row_of_the_tables_and_changes_no_place(device, seed, d):
    """Equal bits to tables whose rows are moved, in every output; a row that is not in use reads none."""
    rng, tokens, heads = np.random.default_rng(seed), 4, attention.Heads(3, 1, d)
    qkv = rng.normal(size=(tokens, 5, d)).astype(BF16)
    positions, shifts = np.array([9, 130, -1, 250], np.int32), np.array([-9, -7, -40, 3], np.int32)
    tables = rng.uniform(-1, 1, (2, 300, d // 2)).astype(np.float32)
    moved = np.full_like(tables, np.nan)
    moved[:, positions] = tables[:, np.maximum(positions + shifts, 0)]
    table, found = some_table(rng, tokens, 3), []
    for given, by in ((tables, device.array(shifts)), (moved, None)):
        q, keys, values = (device.empty(shape, BF16) for shape in ((tokens, 3, d), *[(tokens, 1, 128, d)] * 2))
        norms = device.empty((table.size, 128), np.float32)
        rotation = attention.Rotation(heads, *map(device.array, given), True, shifts=by)
        to = attention.KeyOutputs(None, keys, values, norms, device.array(table))
        device.run(attention.rotate_scale(rotation, device.array(qkv), device.array(positions), q, to))
        found.append([device.numpy(x, allow_unwritten=True) for x in (q, keys, values, norms)])
    for ours, theirs in zip(*found, strict=True):
        assert np.array_equal(ours.view(np.uint16), theirs.view(np.uint16))
    assert np.isfinite(found[0][0][positions >= 0].astype(np.float32)).all()


def check_rotate_heads(device, seed: int, shape: tuple[int, ...], d: int, axis: int) -> None:
    x = np.random.default_rng(seed).normal(size=shape).astype(BF16)
    there = device.array(x)
    device.run(attention.rotate_heads(there, d, axis), seed=seed % 7)
    heads = np.moveaxis(x, axis, -1).astype(np.float64)
    heads = heads.reshape(*heads.shape[:-1], -1, d)
    got = np.moveaxis(device.numpy(there), axis, -1).reshape(heads.shape)
    assert near(got, heads @ oscar.hadamard(d).astype(np.float64))


@on_each_device
@pytest.mark.parametrize("what", ["rows", "columns", "bias", "token"])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_rotate_heads_rotates_every_head_of_a_matrix(device, seed, d, what):
    shapes = {"rows": ((2 * d, 45), 0), "columns": ((15, 3 * d), 1), "bias": ((3 * d,), 0), "token": ((1, 19 * d), 1)}
    shape, axis = shapes[what]
    check_rotate_heads(device, seed, shape, d, axis)


@on_the_card
@pytest.mark.parametrize(("shape", "d", "axis"), [((1024, 4096), 128, 0), ((4096, 4096), 128, 1), ((576, 576), 64, 1)])
def test_rotate_heads_of_models_shapes(device, seed, shape, d, axis):
    check_rotate_heads(device, seed, shape, d, axis)


PACKED = [oscar.SCHEMES[kv] for kv in ("oscar", "int2", "int2-compact", "int4", "kivi", "k3v2", "k3v3", "k4v2", "k4v4")]
PACKED += [WINDOWS[name] for name in KERNEL_WINDOWS]
CHOSEN = [oscar.SCHEMES[kv] for kv in ("int2", "int2-compact", "int2-long")]
SHAPED = [*CHOSEN, oscar.SCHEMES["k4v2"], oscar.SCHEMES["k3v3"]]
SHAPED += [replace(oscar.SCHEMES["int4"], name="int4-shaped", shaped=True)]


STEPS = {  # tokens of each sequence before it, and new ones
    "prefill": (np.array([0, 70, 200], np.int32), np.array([300, 58, 375], np.int32)),
    "decode": (np.array([127, 128, 383], np.int32), np.array([1, 1, 1], np.int32)),
    "prefill after a cut": (np.array([0, 128, 256], np.int32), np.array([300, 58, 375], np.int32)),  # all are packed
}


def has_groups(step: str, d: int, scheme: oscar.Scheme) -> bool:
    return d % scheme.value_group(d) == 0 and d % 32 == 0


SCHEMES = list(dict.fromkeys(PACKED + SHAPED))


@on_each_device_over(has_groups, {"scheme": scheme_traits}, step=list(STEPS), d=HEAD_DIMS, scheme=SCHEMES)
def test_packed_pages_hold_oscar_s_codes_bit_for_bit(device, seed, step, d, scheme):
    rng = np.random.default_rng(seed)
    batch, kv_heads, norm_stride, sinks = 3, 2, 640, scheme.sinks
    starts, counts = STEPS[step]
    total = starts + counts
    old = starts if step == "prefill after a cut" else np.array([scheme.packed_tokens(n) for n in starts])
    history = [rng.normal(size=(2, kv_heads, n, d)).astype(BF16) for n in total]  # keys and values of each sequence
    for h in history:
        h[0] *= rng.uniform(0.01, 10, (h.shape[2], 1)).astype(BF16)  # norms of very different size
        h[:, :, :32, :8] = 0.5  # groups in which all are equal
        in_pairs = np.arange(h.shape[2]) // 16 % 3 == 2
        h[1][:, in_pairs] = repeating(rng, kv_heads, h.shape[2], d)[:, in_pairs]
    norms = np.full((batch, norm_stride), np.nan, np.float32)
    window = np.full((2, batch, kv_heads, scheme.ring, d), np.nan, BF16)
    slots = np.array([2, 0, 1], np.int32)
    for s, h in zip(slots, history, strict=True):
        norms[s, : h.shape[2]] = oscar.token_norms(h[0].transpose(1, 0, 2)) if scheme.scale else 1
    for s, packed, start, n, h in zip(slots, old, starts, total, history, strict=True):
        for t in range(packed, n if step == "decode" else start):
            window[:, s, :, t % scheme.ring] = h[:, :, t]
    new = np.concatenate([h[:, :, start:] for h, start in zip(history, starts, strict=True)], axis=2)
    new = new.transpose(0, 2, 1, 3)
    first_rows = np.append(0, np.cumsum(counts)[:-1]).astype(np.int32)
    table = some_table(rng, batch, 5)
    pages = device.empty((table.size, kv_heads, 2, page_bytes(scheme, d)), np.uint8)
    sink = [device.empty((batch, kv_heads, max(sinks, 1), d), BF16) for _ in "kv"]
    cache = {"pages": pages, "norms": device.array(in_blocks(norms, table)), "table": device.array(table)}
    cache |= {"sink_keys": sink[0], "sink_values": sink[1]}
    cache |= {"window_keys": device.array(window[0]), "window_values": device.array(window[1])}
    heads, feedback = attention.Heads(kv_heads, kv_heads, d), key_feedback(scheme, kv_heads, d)
    on_device = None if feedback is None else device.array(feedback)
    if step == "decode":
        lengths = device.array(starts[np.argsort(slots)])
        launch = attention.pack_step(heads, scheme, lengths, cache, feedback=on_device)
    else:
        rows = [device.array(x) for x in (first_rows, slots, starts, counts)]
        packed = device.array(old.astype(np.int32)) if step == "prefill after a cut" else None
        new_tokens = attention.PrefillTokens(
            *map(device.array, new), kv_heads * d, kv_heads * d, *rows, int(counts.max()), packed
        )
        launch = attention.pack_bulk(heads, scheme, new_tokens, cache, on_device)
    device.run(launch, seed=seed % 7)
    got = [of_row(device.numpy(pages, allow_unwritten=True), table, row) for row in range(batch)]
    sinks_got = [device.numpy(a, allow_unwritten=True) for a in sink]
    for s, begin, n, h in zip(slots, old, total, history, strict=True):
        end = max(begin, scheme.packed_tokens(n))
        assert np.all(got[s][:, : begin // 64] == 255) and np.all(got[s][:, end // 64 :] == 255)
        if begin == end:
            continue
        k, v = h[:, :, begin:end].astype(np.float32)
        expected = [*oscar.quantize_keys(k, norms[s, begin:end], scheme, feedback=feedback)]
        expected += oscar.quantize_values(v, scheme)
        check_pages(got[s][:, begin // 64 : end // 64], scheme, d, expected)
        sink_tokens = list(range(begin, min(end, sinks)))
        for i in range(2):
            assert np.array_equal(sinks_got[i][s][:, sink_tokens], h[i][:, sink_tokens])


def repeating(rng: np.random.Generator, kv_heads: int, tokens: int, d: int) -> np.ndarray:
    """Values in sixteenths of a step of a dithered group: they stand on the edges of its codes. The two of a pair
    differ by as much as dither.NEAR allows, in half of the groups of 32 channels by a sixteenth more."""
    shape = kv_heads, -(-tokens // 2), 1, d // 32, 32
    near, far = (rng.integers(-most, most + 1, shape) for most in (6, 7))
    near[..., 1], far[..., 1] = 6, 7
    first = rng.integers(-17, 18, shape)
    second = first + np.where(rng.integers(2, size=(*shape[:-1], 1)), near, far)
    first[..., 0] = second[..., 0] = 24
    return (np.concatenate([first, second], axis=2).reshape(kv_heads, -1, d)[:, :tokens] / 16).astype(BF16)


def check_pages(pages: np.ndarray, scheme: oscar.Scheme, d: int, expected: list[np.ndarray | None]) -> None:
    """pages [kv_heads, n, bytes] hold exactly these codes, steps and minima of keys, then of values."""
    arrays = from_pages(pages, scheme, d)
    for name, bits in (("key_codes", scheme.key_bits), ("value_codes", scheme.value_bits)):
        arrays[name] = oscar.unpack(arrays[name], bits)
    names = [f"{kind}_{part}" for kind in ("key", "value") for part in ("codes", "step", "min")]
    for name, theirs in zip(names, expected, strict=True):
        mine = arrays.get(name)
        assert mine is None if theirs is None else np.array_equal(mine.reshape(theirs.shape), theirs), name


@on_each_device
@pytest.mark.parametrize("scheme", CHOSEN, ids=lambda scheme: scheme.name)
def test_a_step_packs_all_layers_each_with_its_own_feedback(device, seed, scheme):
    rng, layers, kv_heads, d = np.random.default_rng(seed), 2, 3, 64
    lengths = np.array([scheme.ring - 1, 5, scheme.ring + scheme.flush - 1], np.int32)
    window = rng.normal(size=(2, layers, len(lengths), kv_heads, scheme.ring, d)).astype(BF16)
    norms = rng.uniform(0.5, 2, (layers, len(lengths), 512)).astype(np.float32)
    feedback = np.stack([key_feedback(scheme, kv_heads, d), rng.normal(size=(kv_heads, d, d)).astype(np.float32) / d])
    feedback[1] = np.triu(feedback[1], 1)
    table = some_table(rng, len(lengths), 5)
    pages = device.empty((layers, table.size, kv_heads, 2, page_bytes(scheme, d)), np.uint8)
    sinks = [device.array(np.zeros((layers, len(lengths), kv_heads, scheme.sinks, d), BF16)) for _ in "kv"]
    of_blocks = np.stack([in_blocks(x, table) for x in norms])
    cache = {"pages": pages, "norms": device.array(of_blocks), "table": device.array(table)}
    cache |= {"sink_keys": sinks[0], "sink_values": sinks[1]}
    cache |= {"window_keys": device.array(window[0]), "window_values": device.array(window[1])}
    heads = attention.Heads(kv_heads, kv_heads, d)
    launch = attention.pack_step(heads, scheme, device.array(lengths), cache, layers, device.array(feedback))
    device.run(launch, seed=seed % 7)
    got = device.numpy(pages, allow_unwritten=True)
    for layer, row in np.ndindex(layers, len(lengths)):
        first, of = lengths[row] + 1 - scheme.ring, of_row(got[layer], table, row)
        if first < 0:
            assert np.all(of == 255)
            continue
        tokens = np.arange(first, first + scheme.flush)
        k, v = window[:, layer, row][:, :, tokens % scheme.ring].astype(np.float32)
        expected = [*oscar.quantize_keys(k, norms[layer, row, tokens], scheme, feedback=feedback[layer])]
        written = of[:, first // 64 : (first + scheme.flush) // 64]
        check_pages(written, scheme, d, [*expected, *oscar.quantize_values(v, scheme)])


@on_each_device
@pytest.mark.parametrize(("flush", "keep"), [(128, 0), (64, 64), (128, 128)])
def test_a_step_of_many_sequences_packs_those_whose_window_is_full(device, seed, flush, keep):
    """A warp looks at 32 of them at a time; some are not in use. Pages are those of a sequence alone, and nothing else
    is written."""
    heads, batch, rng = attention.Heads(1, 1, 64), 70, np.random.default_rng(seed)
    scheme = replace(WINDOWS["plain"], flush=flush, keep=keep)
    lengths = rng.choice(np.array([-1, 0, flush - 1 if keep else 126, 128, 200, 254], np.int32), batch)
    full = np.array([0, 31, 32, 50, 69])
    lengths[full] = np.array([0, flush, 0, 0, 2 * flush]) + scheme.ring - 1
    window = rng.normal(size=(2, batch, 1, scheme.ring, 64)).astype(BF16)
    norms = rng.uniform(1, 2, (batch, 384)).astype(np.float32)

    def packed(rows: np.ndarray) -> np.ndarray:
        table = some_table(rng, len(rows), 3)
        pages = device.empty((table.size, 1, 2, page_bytes(scheme, 64)), np.uint8)
        cache = {"pages": pages, "norms": device.array(in_blocks(norms[rows], table)), "table": device.array(table)}
        cache |= {
            name: device.array(np.zeros((len(rows), 1, scheme.sinks, 64), BF16))
            for name in ("sink_keys", "sink_values")
        }
        cache |= {f"window_{name}": device.array(window[i, rows]) for i, name in enumerate(("keys", "values"))}
        device.run(attention.pack_step(heads, scheme, device.array(lengths[rows]), cache), seed=seed % 7)
        got = device.numpy(pages, allow_unwritten=True)
        return np.stack([of_row(got, table, row) for row in range(len(rows))])

    together = packed(np.arange(batch))
    assert all(np.array_equal(together[row], packed(np.array([row]))[0]) for row in full)
    written = (together != 255).any(axis=(1, 3))
    pages = [(row, (lengths[row] + 1 - scheme.ring) // 64 + page) for row in full for page in range(flush // 64)]
    assert [tuple(at) for at in np.argwhere(written)] == pages


@on_each_device
@pytest.mark.parametrize("name", ["int2", *KERNEL_WINDOWS])
@pytest.mark.parametrize("d", [64, 128])
def test_tokens_that_are_not_packed_go_to_the_window(device, seed, d, name):
    scheme, rng, kv_heads = (oscar.SCHEMES | WINDOWS)[name], np.random.default_rng(seed), 3
    starts, counts, slots = (
        np.array([0, 70, 200, 127], np.int32),
        np.array([300, 58, 50, 1], np.int32),
        np.array([2, 0, 1, 3], np.int32),
    )
    new = rng.normal(size=(2, counts.sum(), kv_heads, d)).astype(BF16)
    first_rows = np.append(0, np.cumsum(counts)[:-1]).astype(np.int32)
    names = ("window_keys", "window_values")
    before = np.zeros((4, kv_heads, scheme.ring, d), BF16)
    cache = {n: device.array(before) for n in names}
    rows = [device.array(x) for x in (first_rows, slots, starts, counts)]
    heads = attention.Heads(kv_heads, kv_heads, d)
    new_tokens = attention.PrefillTokens(*map(device.array, new), kv_heads * d, kv_heads * d, *rows, int(counts.max()))
    device.run(attention.fill_window(heads, scheme, new_tokens, cache), seed=seed % 7)
    for x, name in zip(new, names, strict=True):
        expected = before.copy()
        for first, slot, start, n in zip(first_rows, slots, starts, counts, strict=True):
            for t in range(max(start, scheme.packed_tokens(int(start + n))), start + n):
                expected[slot, :, t % scheme.ring] = x[first + t - start]
        assert np.array_equal(device.numpy(cache[name]), expected)
