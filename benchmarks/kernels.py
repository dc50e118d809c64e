"""`bench.py kernel`: the kernels of the cache alone, beside the bytes they must move and the best BF16 kernels that
are installed.

Every case runs as 20 launches in one replayed graph over rotating caches that no L2 holds (benchmarks/measure.py), ours
and the peers alike. A cache has its window half full, as it is on average.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np

from benchmarks.cases import CHUNK, Case, entry, moved_bytes, too_large
from benchmarks.measure import copies_of, graph_time
from benchmarks.peers import peer_times
from minioscar.layer_cache import BF16, BLOCK_TOKENS, blocks_of
from minioscar.ops import attention
from minioscar.ops.launch import Card, kernel, run
from minioscar.oscar import SCHEMES
from minioscar.pages import PAGE_TOKENS, page_bytes
from minioscar.plans import decode_plan

Array = Any


def random_bf16(shape: tuple[int, ...], rng: Any) -> Array:
    """Normal numbers, made on the card in chunks (float32 for a whole cache would not fit)."""
    out = cupy.empty(int(np.prod(shape)), BF16)
    for at in range(0, out.size, CHUNK):
        chunk = out[at : at + CHUNK]
        chunk[...] = rng.standard_normal(chunk.size, dtype=np.float32).astype(BF16)
    return out.reshape(shape)


def filled(case: Case, rng: Any) -> dict[str, Array]:
    """A layer's cache of random keys and values, packed by the bulk kernel; the window half full."""
    scheme, h, rows, context = case.scheme, case.heads, case.batch, case.context
    if not scheme.quantized:
        shape = rows, h.kv_heads, context + scheme.ring, h.head_dim
        return {"keys": random_bf16(shape, rng), "values": random_bf16(shape, rng)}
    window = rows, h.kv_heads, scheme.ring, h.head_dim
    cache = {"window_keys": random_bf16(window, rng), "window_values": random_bf16(window, rng)}
    of_row = blocks_of(context + scheme.ring)
    cache["table"] = cupy.asarray(some_table(rows, of_row))
    cache["pages"] = cupy.empty((rows * of_row, h.kv_heads, 2, page_bytes(scheme, h.head_dim)), np.uint8)
    if scheme.scale:
        cache["norms"] = (h.kv_heads * h.head_dim) ** 0.5 * (
            1 + 0.2 * rng.standard_normal((rows * of_row, BLOCK_TOKENS), dtype=np.float32)
        )
    if scheme.sinks:
        sinks = rows, h.kv_heads, scheme.sinks, h.head_dim
        cache["sink_keys"], cache["sink_values"] = cupy.empty(sinks, BF16), cupy.empty(sinks, BF16)
    for launch in packing(case, cache, rng):
        launch()
    return cache


def some_table(rows: int, blocks: int) -> np.ndarray:
    """The blocks of each row, int32 [rows, blocks], as a pool that has served for long gives them out."""
    return np.random.default_rng(0).permutation(rows * blocks).astype(np.int32).reshape(rows, blocks)


def packing(case: Case, cache: dict[str, Array], rng: Any) -> Iterator[Callable[[], None]]:
    """Launches of the bulk kernel that fill the pages of every row. Where the scheme is shaped its tables hold zeros:
    their numbers do not change the time."""
    h, scheme, tokens = case.heads, case.scheme, case.context + case.scheme.keep
    k, v = (random_bf16((tokens, h.kv_heads, h.head_dim), rng) for _ in range(2))
    stride = h.kv_heads * h.head_dim
    feedback = cupy.zeros((h.kv_heads, h.head_dim, h.head_dim), np.float32) if scheme.shaped else None
    for row in range(case.batch):
        ints = [cupy.asarray([x], np.int32) for x in (0, row, 0, tokens)]
        new = attention.PrefillTokens(k, v, stride, stride, *ints, tokens)
        launch = attention.pack_bulk(h, scheme, new, cache, feedback)
        yield lambda launch=launch: run(launch)


def attention_launches(case: Case, rng: Any) -> tuple[list[Callable[[], None]], list[dict[str, Array]]]:
    """One launch per rotating cache."""
    h, first = case.heads, filled(case, rng)
    size = sum(array.nbytes for array in first.values())
    caches = [first] + [{name: array.copy() for name, array in first.items()} for _ in range(copies_of(size) - 1)]
    q = random_bf16((case.batch, h.q_heads, h.head_dim), rng)
    state, out = decode_state(case, first.get("table")), cupy.empty(q.shape, BF16)
    run(attention.schedule(state))  # once a step, for all layers: its own row
    rotation = enumerate(caches * (1 + len(caches) % 2))  # an even number: launches alternate two workspaces
    made = [attention.decode_attention(state, q, cache, out, parity=i % 2) for i, cache in rotation]
    return [lambda launch=launch: run(launch) for launch in made], caches


def decode_state(case: Case, table: Array | None) -> attention.DecodeState:
    plan = decode_plan(case.heads, case.scheme, case.batch, Card.current())
    lengths = cupy.full(case.batch, case.context + case.window - 1, np.int32)
    return attention.DecodeState.allocate(cupy, case.heads, case.scheme, plan, lengths, table)


def compile_all(cases: list[Case]) -> None:
    """NVRTC on all cores, before anything is timed."""
    q = cupy.empty(0, BF16)
    seen = {}
    for case in cases:
        cache = {name: cupy.empty((1, 1, 1, 1), np.uint8) for name in ("keys", "values", "pages", "norms")}
        state = decode_state(case, cupy.empty((1, 1), np.int32))
        launch = attention.decode_attention(state, q, cache, q, parity=0)
        seen[launch.source, launch.name, launch.defines] = None
        if case.scheme.quantized:
            seen["pack.cu", "pack", attention.pack_defines(case.scheme, case.heads.head_dim)] = None
    if not seen:
        return
    # Each fills the cache on disk
    with multiprocessing.get_context("spawn").Pool(min(len(seen), os.cpu_count() or 1)) as pool:
        pool.starmap(kernel, list(seen), chunksize=1)


def measure(cases: list[Case], copy_rate: float, peers: bool, rest: bool = True) -> Iterator[dict]:
    """A row of every case; one that the card's memory cannot hold says why instead of a time. rest: as `graph_time`
    has it."""
    rng = cupy.random.default_rng(0)
    fitting = {case: too_large(case, free_bytes()) for case in cases}
    compile_all([case for case, reason in fitting.items() if reason is None])
    for case, reason in fitting.items():
        if reason is not None:
            yield {
                "op": "decode_attention",
                "kv": case.kv,
                "batch": case.batch,
                "context": case.context,
                "skipped": reason,
            }
            continue
        launches, caches = attention_launches(case, rng)
        us, spread = graph_time(launches, rest=rest)
        row = entry("decode_attention", case, us, spread, moved_bytes(case), copy_rate)
        if peers and case.peers:
            row["peers"] = peer_times(case, caches, rest)
        del launches, caches
        cupy.get_default_memory_pool().free_all_blocks()
        yield row


def free_bytes() -> int:
    return cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()


def writing(copy_rate: float) -> Iterator[dict]:
    """rotate_scale with append, pack of a step that finds nothing full, the schedule of a step, and the bulk pack of a
    prompt."""
    rng, case = cupy.random.default_rng(0), Case("int2", 1, 131072)
    scheme, h = case.scheme, case.heads
    cache = filled(case, rng)
    qkv = random_bf16((1, (h.q_heads + 2 * h.kv_heads) * h.head_dim), rng)
    lengths = cupy.full(1, case.context + case.window - 1, np.int32)
    cos = cupy.ones((case.context + scheme.ring, h.head_dim // 2), np.float32)
    q = cupy.empty((1, h.q_heads, h.head_dim), BF16)
    weight = cupy.ones(h.head_dim, BF16)
    to = attention.KeyOutputs(None, cache["window_keys"], cache["window_values"], cache["norms"], cache["table"])
    rotation = attention.Rotation(h, cos, cos, True, weight, weight, 1e-6)
    rotate = attention.rotate_scale(rotation, qkv, lengths, q, to)
    feedback = cupy.zeros((1, h.kv_heads, h.head_dim, h.head_dim), np.float32) if scheme.shaped else None
    pack = attention.pack_step(h, scheme, lengths, cache, feedback=feedback)
    schedule = attention.schedule(decode_state(case, cache["table"]))
    for op, made in (
        ("rotate_scale_append", (rotate,)),
        ("rotate_scale_append_pack", (rotate, pack)),
        ("schedule", (schedule,)),
    ):

        def launch(made: tuple = made) -> None:
            for one in made:
                run(one)

        us, spread = graph_time([launch])
        yield entry(op, case, us, spread, 2 * qkv.nbytes, copy_rate)
    shapes = [("int2", 131072), ("oscar", 131072), ("int2", 4096), ("oscar", 4096)]
    for kv, context in shapes:
        case = Case(kv, 1, context)
        launches = []
        for _ in range(3):
            cache = filled(case, rng)
            launches += packing(case, cache, rng)
        us, spread = graph_time(launches)
        read = 2 * context * h.kv_heads * h.head_dim * 2 + 4 * context
        written = context // PAGE_TOKENS * h.kv_heads * page_bytes(case.scheme, h.head_dim) + sum(
            cache[name].nbytes for name in ("sink_keys", "sink_values") if name in cache
        )
        yield entry("pack_bulk", case, us, spread, read + written, copy_rate)


def flushing(copy_rate: float) -> Iterator[dict]:
    """pack_step where the windows of all rows are full, in all layers of a Qwen3-8B: what one step in `flush` of them
    takes longer than `rotate_scale_append_pack` says. Shaped rounding (int2) beside plain."""
    rng, layers = cupy.random.default_rng(0), 36
    for kv, batch in (("oscar", 1), ("int2", 1), ("oscar", 48), ("int2", 48)):
        case = Case(kv, batch, SCHEMES[kv].flush)
        scheme, h, rows = case.scheme, case.heads, (layers, batch)
        tokens = *rows, h.kv_heads, scheme.ring, h.head_dim
        cache = {"window_keys": random_bf16(tokens, rng), "window_values": random_bf16(tokens, rng)}
        blocks = blocks_of(scheme.ring)
        cache["table"] = cupy.asarray(some_table(batch, blocks))
        shape = layers, batch * blocks, h.kv_heads, 2, page_bytes(scheme, h.head_dim)
        cache["pages"] = cupy.empty(shape, np.uint8)
        cache["norms"] = cupy.ones((layers, batch * blocks, BLOCK_TOKENS), np.float32)
        sinks = *rows, h.kv_heads, scheme.sinks, h.head_dim
        cache["sink_keys"], cache["sink_values"] = cupy.empty(sinks, BF16), cupy.empty(sinks, BF16)
        feedback = cupy.zeros((layers, h.kv_heads, h.head_dim, h.head_dim), np.float32) if scheme.shaped else None
        lengths = cupy.full(batch, scheme.ring - 1, np.int32)
        launch = attention.pack_step(h, scheme, lengths, cache, layers, feedback)
        us, spread = graph_time([lambda launch=launch: run(launch)])
        read = sum(cache[f"window_{name}"].nbytes for name in ("keys", "values")) * scheme.flush // scheme.ring
        written = page_bytes(scheme, h.head_dim) * layers * batch * h.kv_heads * scheme.flush // PAGE_TOKENS
        yield entry("pack_step_full", case, us, spread, read + written, copy_rate)
