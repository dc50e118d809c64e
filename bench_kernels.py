"""`bench.py kernel`: the kernels of the cache alone, beside the bytes they must move and the best BF16 kernels that are installed.

Every case runs as 20 launches in one replayed graph over rotating caches that no L2 holds (minioscar/measure.py), ours and the
peers alike. A cache has its window half full, as it is on average.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from bench_peers import peer_times
from minioscar.cache import BF16
from minioscar.measure import copies_of, graph_time
from minioscar.ops import raw
from minioscar.oscar import SCHEMES, WINDOW, Scheme

Array = Any


@dataclass(frozen=True)
class Case:
    """Decode attention of `batch` sequences with `context` packed tokens each."""

    kv: str
    batch: int
    context: int
    heads: raw.Heads = raw.Heads(32, 8, 128)
    peers: bool = False  # measure the other kernels on the same shape


HEADLINES = [(1, 131072), (48, 4096), (1, 32768)]
SHAPES = [(40, 8, 128), (64, 8, 128), (28, 4, 128), (16, 8, 128), (12, 2, 128), (9, 3, 64)]


def cases(quick: bool) -> list[Case]:
    found = [Case(kv, *shape, peers=kv == "bf16") for shape in HEADLINES for kv in ("bf16", "int2", "oscar", "int2-compact")]
    if quick:
        return found[:2]
    found += [Case("int4", 1, 131072), Case("kivi", 1, 131072), Case("int2", 256, 4096), Case("int2", 8, 32768)]
    return found + [Case("int2", 2 * (8 // heads[1]) if heads[2] == 128 else 12, 131072, raw.Heads(*heads)) for heads in SHAPES]


def random_bf16(shape: tuple[int, ...], rng: Any) -> Array:
    """Normal numbers, made on the card in pieces (float32 for a whole cache would not fit)."""
    out = cupy.empty(int(np.prod(shape)), BF16)
    for at in range(0, out.size, 1 << 26):
        piece = out[at : at + (1 << 26)]
        piece[...] = rng.standard_normal(piece.size, dtype=np.float32).astype(BF16)
    return out.reshape(shape)


def filled(case: Case, rng: Any) -> dict[str, Array]:
    """A layer's cache of random keys and values, packed by the bulk kernel; the window half full."""
    scheme, h, rows, context = SCHEMES[case.kv], case.heads, case.batch, case.context
    if not scheme.quantized:
        shape = rows, h.kv_heads, context + WINDOW, h.head_dim
        return {"keys": random_bf16(shape, rng), "values": random_bf16(shape, rng)}
    window = rows, h.kv_heads, WINDOW, h.head_dim
    cache = {"window_keys": random_bf16(window, rng), "window_values": random_bf16(window, rng)}
    cache["pages"] = cupy.empty((rows, h.kv_heads, context // raw.PAGE_TOKENS, raw.page_bytes(scheme, h.head_dim)), np.uint8)
    if scheme.scale:
        cache["norms"] = (h.kv_heads * h.head_dim) ** 0.5 * (1 + 0.2 * rng.standard_normal((rows, context), dtype=np.float32))
    if scheme.sinks:
        sinks = rows, h.kv_heads, scheme.sinks, h.head_dim
        cache["sink_keys"], cache["sink_values"] = cupy.empty(sinks, BF16), cupy.empty(sinks, BF16)
    for _, launch in packing(h, scheme, cache, rng):
        launch()
    return cache


def packing(h: raw.Heads, scheme: Scheme, cache: dict[str, Array], rng: Any) -> Iterator[tuple[int, Callable[[], None]]]:
    """Launches of the bulk kernel that fill the pages of every row; the number is the tokens of one launch."""
    rows, _, page_count, _ = cache["pages"].shape
    context = page_count * raw.PAGE_TOKENS
    k, v = (random_bf16((context, h.kv_heads, h.head_dim), rng) for _ in range(2))
    stride = h.kv_heads * h.head_dim
    for row in range(rows):
        ints = [cupy.asarray([x], np.int32) for x in (0, row, 0, context)]
        launch = raw.pack_bulk(h, scheme, raw.Arrivals(k, v, stride, stride, *ints, context), cache)
        yield context, lambda launch=launch: raw.run(launch)


def moved_bytes(case: Case) -> int:
    """What a step must read of the cache: pages (or BF16), norms, sinks and the window's 64 tokens."""
    scheme, h = SCHEMES[case.kv], case.heads
    token = h.kv_heads * h.head_dim * 2 * 2
    if not scheme.quantized:
        return case.batch * (case.context + WINDOW // 2) * token
    pages = case.context // raw.PAGE_TOKENS * h.kv_heads * raw.page_bytes(scheme, h.head_dim)
    return case.batch * (pages + 4 * case.context * scheme.scale + (scheme.sinks + WINDOW // 2) * token)


def attention(case: Case, rng: Any) -> tuple[list[Callable[[], None]], list[dict[str, Array]]]:
    """One launch per rotating cache."""
    scheme, h = SCHEMES[case.kv], case.heads
    first = filled(case, rng)
    size = sum(array.nbytes for array in first.values())
    caches = [first] + [{name: array.copy() for name, array in first.items()} for _ in range(copies_of(size) - 1)]
    plan = plan_of(case)
    q = random_bf16((case.batch, h.q_heads, h.head_dim), rng)
    lengths = cupy.full(case.batch, case.context + WINDOW // 2 - 1, np.int32)
    out = cupy.empty(q.shape, BF16)
    workspace = cupy.empty(plan.workspace_floats(h.head_dim), np.float32)
    arrived = cupy.zeros(case.batch * h.kv_heads * plan.share, np.int32)
    tasks = cupy.empty(plan.task_shape, np.int32)
    raw.run(raw.schedule(h, scheme, plan, lengths, tasks))  # once a step, for all layers: its own row
    made = [raw.decode_attention(h, scheme, plan, q, cache, lengths, tasks, out, None, workspace, arrived) for cache in caches]
    return [lambda launch=launch: raw.run(launch) for launch in made], caches


def plan_of(case: Case) -> raw.Plan:
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    capability = 10 * properties["major"] + properties["minor"]
    return raw.plan(case.heads, SCHEMES[case.kv], case.batch, properties["multiProcessorCount"], capability)


def compile_all(wanted: list[Case]) -> None:
    """NVRTC on all cores, before anything is timed."""
    q = cupy.empty(0, BF16)
    seen = {}
    for case in wanted:
        cache = {name: cupy.empty((1, 1, 1, 1), np.uint8) for name in ("keys", "values", "pages", "norms")}
        lengths = np.empty(case.batch)
        launch = raw.decode_attention(case.heads, SCHEMES[case.kv], plan_of(case), q, cache, lengths, None, q, None, None, None)
        seen[launch.source, launch.name, launch.defines] = None
        if SCHEMES[case.kv].quantized:
            seen["pack.cu", "pack", raw.layout_defines(SCHEMES[case.kv], case.heads.head_dim)] = None
    with multiprocessing.get_context("spawn").Pool(min(len(seen), os.cpu_count() or 1)) as pool:  # each fills the cache on disk
        pool.starmap(raw.kernel, list(seen), chunksize=1)


def measure(copy_rate: float, quick: bool, peers: bool, show: Callable[[dict], None]) -> list[dict]:
    """All cases; `show` gets each row as it is measured."""
    rng, rows, wanted = cupy.random.default_rng(0), [], cases(quick)
    compile_all(wanted)
    for case in wanted:
        launches, caches = attention(case, rng)
        us, spread = graph_time(launches)
        row = entry("decode_attention", case, us, spread, moved_bytes(case), copy_rate)
        if peers and case.peers:
            row["peers"] = peer_times(case, caches)
        rows.append(row)
        show(row)
        del launches, caches
        cupy.get_default_memory_pool().free_all_blocks()
    for row in writing(rng, copy_rate):
        rows.append(row)
        show(row)
    return rows


def entry(op: str, case: Case, us: float, spread: float, size: int, copy_rate: float) -> dict:
    h = case.heads
    return {
        "op": op, "kv": case.kv, "batch": case.batch, "context": case.context, "q_heads": h.q_heads, "kv_heads": h.kv_heads,
        "head_dim": h.head_dim, "us": us, "us_spread": spread, "bytes": size, "fraction_of_copy": size / (us * 1e-6) / copy_rate,
    }


def writing(rng: Any, copy_rate: float) -> Iterator[dict]:
    """rotate_scale with append, pack of a step that finds nothing full, the schedule of a step, and the bulk pack of a prompt."""
    case = Case("int2", 1, 131072)
    scheme, h = SCHEMES[case.kv], case.heads
    cache = filled(case, rng)
    qkv = random_bf16((1, (h.q_heads + 2 * h.kv_heads) * h.head_dim), rng)
    lengths = cupy.full(1, case.context + WINDOW // 2 - 1, np.int32)
    cos = cupy.ones((case.context + WINDOW, h.head_dim // 2), np.float32)
    q = cupy.empty((1, h.q_heads, h.head_dim), BF16)
    weight = cupy.ones(h.head_dim, BF16)
    options = {"keys": cache["window_keys"], "values": cache["window_values"], "norms": cache["norms"], "norm_stride": case.context}
    options |= {"q_weight": weight, "k_weight": weight, "eps": 1e-6}
    rotate = raw.rotate_scale(h, qkv, lengths, cos, cos, q, rotate=True, **options)
    pack = raw.pack_step(h, scheme, lengths, cache)
    plan = plan_of(case)
    schedule = raw.schedule(h, scheme, plan, lengths, cupy.empty(plan.task_shape, np.int32))
    for op, made in (("rotate_scale_append", (rotate,)), ("rotate_scale_append_pack", (rotate, pack)), ("schedule", (schedule,))):

        def launch(made: tuple = made) -> None:
            for one in made:
                raw.run(one)

        us, spread = graph_time([launch])
        yield entry(op, case, us, spread, 2 * qkv.nbytes, copy_rate)
    for kv, context in (("int2", 131072), ("oscar", 131072), ("int2", 4096)):
        case = Case(kv, 1, context)
        launches = []
        for _ in range(3):
            cache = filled(case, rng)
            launches += [launch for _, launch in packing(h, SCHEMES[kv], cache, rng)]
        us, spread = graph_time(launches)
        read = 2 * context * h.kv_heads * h.head_dim * 2 + 4 * context
        written = cache["pages"].nbytes + sum(cache[name].nbytes for name in ("sink_keys", "sink_values") if name in cache)
        yield entry("pack_bulk", case, us, spread, read + written, copy_rate)
