"""`bench.py kernel` on a card, the second half: the kernels of a step that are not the cache's, in the shapes of
Qwen3-8B.

Products and sampling beside the bytes that they must read, the attention of a prefill beside its operations. As
everywhere, many launches in one replayed graph, over weights that no L2 holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

import cupy
import numpy as np

from benchmarks.cases import DENSE, PREFILLS, Case, Matrix, pairs
from benchmarks.kernels import filled, random_bf16, some_table
from benchmarks.measure import copies_of, graph_time
from benchmarks.quantized import random_form
from minioscar.layer_cache import BF16, BLOCK_TOKENS, blocks_of
from minioscar.ops import attention, linear, prefill, sample
from minioscar.ops.launch import Card, Launch, run
from minioscar.quantized import Quantized, on_card
from minioscar.sampling import RowSampling, Sampling
from minioscar.sm90 import prefill_attention as sm90

Array = Any
HEADS = attention.Heads(32, 8, 128)
VOCABULARY, EPS = 151936, 1e-6
TOKENS = (1, 8, 48, 128, 256)
FORMS = [("int4", 128), ("int4", 64), ("int8", 64), ("e4m3", 128)]
SAMPLINGS = [
    ("greedy", Sampling()),
    ("top-k 40, top-p 0.9", Sampling(0.8, top_k=40, top_p=0.9)),
    ("top-p 0.9", Sampling(0.8, top_p=0.9)),
    ("temperature alone", Sampling(0.8)),
    ("temperature and penalties", Sampling(0.8, repetition_penalty=1.1, presence_penalty=0.5)),
]


def measure(copy_rate: float, matmul_rate: float, quick: bool) -> Iterator[dict]:
    rng = cupy.random.default_rng(0)
    for matrix in DENSE[:1] if quick else DENSE:
        weights = [random_bf16((matrix.rows, matrix.size), rng)]
        weights += [weights[0].copy() for _ in range(copies_of(weights[0].nbytes) - 1)]
        for tokens in TOKENS[:1] if quick else TOKENS:
            us, spread = graph_time(products(matrix, weights, tokens, rng))
            yield row(
                "linear",
                f"{matrix.size} to {matrix.rows}: {matrix.name}",
                tokens,
                us,
                spread,
                weights[0].nbytes,
                copy_rate,
            )
        del weights
        cupy.get_default_memory_pool().free_all_blocks()
    yield from quantized(copy_rate, quick)
    for name, sampling in SAMPLINGS[:1] if quick else SAMPLINGS:
        for batch in (1,) if quick else (1, 48, 256):
            us, spread = graph_time([drawing(sampling, batch, rng)])
            yield row("sample", name, batch, us, spread, batch * VOCABULARY * 4, copy_rate)
    for name, shape, tokens, launch, moved in between(rng):
        us, spread = graph_time([together([launch])])
        yield row(name, shape, tokens, us, spread, moved, copy_rate)
    for past, new in PREFILLS[:1] if quick else PREFILLS:
        us, spread = graph_time([prefill_after(past, new, rng)], replays=5)
        operations = 4 * HEADS.head_dim * HEADS.q_heads * pairs(past, new)
        yield row("prefill_attention", f"after {past:,} tokens", new, us, spread, operations, matmul_rate)
    if not quick:
        us, spread = graph_time([unpacking(131072, rng)], replays=5)
        yield row("unpack", "int2", 131072, us, spread, 2 * 2 * 131072 * HEADS.kv_heads * HEADS.head_dim, copy_rate)


def row(op: str, shape: str, tokens: int, us: float, spread: float, work: int, rate: float) -> dict:
    """work: the bytes or operations that the limit is about, rate: of them a second."""
    return {
        "op": op,
        "shape": shape,
        "tokens": tokens,
        "us": us,
        "us_spread": spread,
        "fraction_of_limit": work / (us * 1e-6) / rate,
    }


def products(matrix: Matrix, weights: list[Any], tokens: int, rng: Any) -> list[Callable[[], None]]:
    """The launches for each copy of the weights; where the norm is a launch of its own, it is counted."""
    made = linear.Products(cupy, Card.current())
    x, norm = random_bf16((tokens, matrix.size), rng), cupy.ones(matrix.size, BF16)
    width = matrix.rows // 2 if matrix.silu else matrix.rows
    out = cupy.empty((tokens, width), np.float32 if matrix.float32 else BF16)
    options = {"silu": matrix.silu, "residual": random_bf16((tokens, width), rng) if matrix.residual else None}
    options["norm"] = (norm, EPS) if matrix.norm else None
    launches = on_card.launches if isinstance(weights[0], Quantized) else linear.Products.launches
    return [together(launches(made, x, weight, out, **options)) for weight in weights]


def quantized(copy_rate: float, quick: bool) -> Iterator[dict]:
    """The products of DENSE with weights in 4 and 8 bits; their bytes are codes and scales."""
    rng = cupy.random.default_rng(0)
    for matrix in DENSE[:1] if quick else DENSE:
        for kind, group in FORMS[:1] if quick else FORMS:
            first = random_form(kind, matrix.rows, matrix.size, group, cupy, rng)
            weights = [first, *(first.map(cupy.copy) for _ in range(copies_of(first.nbytes) - 1))]
            for tokens in TOKENS[:1] if quick else TOKENS:
                us, spread = graph_time(products(matrix, weights, tokens, rng))
                op, shape = f"linear {kind} g{group}", f"{matrix.size} to {matrix.rows}: {matrix.name}"
                yield row(op, shape, tokens, us, spread, first.nbytes, copy_rate)
            del weights
            cupy.get_default_memory_pool().free_all_blocks()


def drawing(sampling: Sampling, batch: int, rng: Any) -> Callable[[], None]:
    logits = rng.standard_normal((batch, VOCABULARY), dtype=np.float32) * 3
    drawing = sample.Drawing(cupy, [RowSampling(sampling, i) for i in range(batch)], VOCABULARY)
    return together(sample.sample(logits, drawing, *(cupy.zeros(batch, np.int32) for _ in range(2))))


def together(launches: Sequence[Launch]) -> Callable[[], None]:
    def run_all() -> None:
        for launch in launches:
            run(launch)

    return run_all


def between(rng: Any) -> Iterator[tuple[str, str, int, Launch, int]]:
    """What runs between the products of a prompt: name, shape, tokens, launch, and bytes in and out."""
    tokens = 4096
    gate_up, out = random_bf16((tokens, 24576), rng), cupy.empty((tokens, 12288), BF16)
    yield "silu_mul", "12,288", tokens, linear.silu_mul(gate_up, out), gate_up.nbytes + out.nbytes
    x, y = (random_bf16((tokens, 4096), rng) for _ in "xy")
    yield "add", "4,096", tokens, linear.add(x, y), x.nbytes + 2 * y.nbytes
    tokens, (q_heads, kv_heads, head_dim) = 32768, astuple(HEADS)
    qkv, tables = (
        random_bf16((tokens, (q_heads + 2 * kv_heads) * head_dim), rng),
        cupy.ones((2, tokens, head_dim // 2), np.float32),
    )
    q, k = (cupy.empty((tokens, n, head_dim), BF16) for n in (q_heads, kv_heads))
    table, weight = cupy.asarray(some_table(1, blocks_of(tokens))), cupy.ones(head_dim, BF16)
    norms = cupy.empty((table.size, BLOCK_TOKENS), np.float32)
    to = attention.KeyOutputs(k, None, None, norms, table, cupy.zeros(tokens, np.int32))  # all of one sequence
    rotation = attention.Rotation(HEADS, *tables, True, weight, weight, EPS)
    launch = attention.rotate_scale(rotation, qkv, cupy.arange(tokens, dtype=np.int32), q, to)
    moved = 2 * (q.nbytes + k.nbytes) + tables.nbytes + norms.nbytes
    yield "rotate_scale", f"{q_heads} and {kv_heads} heads of {head_dim}", tokens, launch, moved


def prefill_after(past: int, new: int, rng: Any) -> Callable[[], None]:
    h, card = HEADS, Card.current()
    q, k, v = (random_bf16((new, n, h.head_dim), rng) for n in (h.q_heads, h.kv_heads, h.kv_heads))
    older = tuple(random_bf16((1, h.kv_heads, past, h.head_dim), rng) for _ in "kv") if past else None
    stride = h.kv_heads * h.head_dim
    rows = (cupy.asarray([n], np.int32) for n in (0, 0, past, new))
    new_tokens = attention.PrefillTokens(k, v, stride, stride, *rows, new)
    if sm90.tiled(h.head_dim, card):
        tiles = tiles_for(past + new, new_tokens.first_rows)
        run(sm90.fill_tiles(h, new_tokens, older, past + new, tiles))
        older = tiles
    plan = sm90.split_plan(h, new, 1, past, card)
    splits = plan and sm90.KeySplits.allocate(cupy, plan, h.head_dim)
    launch = prefill.prefill_attention(h, q, new_tokens, older, cupy.empty_like(q), card, splits=splits)
    return lambda: run(launch)


def tiles_for(tokens: int, first: Array) -> sm90.Tiles:
    """Unwritten."""
    return sm90.Tiles.allocate(cupy, HEADS, -(-tokens // sm90.TILE_TOKENS), first)


def unpacking(tokens: int, rng: Any) -> Callable[[], None]:
    case = Case("int2", 1, tokens, HEADS)
    keys, values = (cupy.empty((1, HEADS.kv_heads, tokens, HEADS.head_dim), BF16) for _ in "kv")
    tiled = sm90.tiled(HEADS.head_dim, Card.current())
    to = tiles_for(tokens, cupy.zeros(1, np.int32)) if tiled else (keys, values)
    launch = prefill.unpack(HEADS, case.scheme, None, cupy.asarray([tokens], np.int32), tokens, filled(case, rng), to)
    return lambda: run(launch)
