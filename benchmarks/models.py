"""`bench.py decode` and `prefill`: whole models; and `kernel` where there is no GPU: the NumPy back end's decode
attention alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import cycle
from typing import Any

import numpy as np

from benchmarks.cases import Case, entry, layer, moved_bytes
from benchmarks.measure import copies_of, timed
from benchmarks.presets import arrays
from minioscar import oscar
from minioscar.cache import Batch, Cache, NewTokens
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.experts.reference import route
from minioscar.ops.reference import Reference
from minioscar.oscar import WINDOW, Scheme
from minioscar.parallel.backend import Split
from minioscar.parallel.caches import SplitCache
from minioscar.parallel.ranks import of_rank
from minioscar.sampling import RowSampling
from minioscar.weights import Layer, Weights

Array = Any

IN_A_ROW = 32  # decode steps that are timed together where they are queued
MAX_COPIES = 8  # of a cache on a CPU, whose array code dequantizes it into new arrays anyway


def filled(
    config: Config,
    scheme: Scheme,
    ops: Reference,
    batch: int,
    context: int,
    room: int = 1,
    weights: Weights | None = None,
) -> Cache:
    """A cache of `batch` rows that hold the same `context` random tokens, and `room` for more. weights: what shaped
    schemes need."""
    cache = Cache(config, scheme, batch, context + room, ops)
    first = cache.batch_for([0], [context])
    for rank, (one, on) in enumerate(cards_of(ops)):
        with on:
            rng, heads = one.xp.random.default_rng(0), getattr(ops, "local", config).num_kv_heads
            shape = context, heads, config.head_dim
            for layer_cache in cache.layers:
                k, v = (rng.standard_normal(shape, dtype=np.float32).astype(ops.dtype) for _ in range(2))
                norms = oscar.token_norms(k, one.xp) if scheme.scale else None
                if weights:
                    feedback = of_rank(weights.layers[layer_cache.index].key_feedback, rank)
                else:  # numbers do not change the time
                    feedback = one.xp.zeros((heads, config.head_dim, config.head_dim), np.float32)
                own = layer_cache.of(rank) if isinstance(layer_cache, SplitCache) else layer_cache
                own.append(NewTokens(k, v, norms, feedback), first)
    cache.advance(first)
    for row in range(1, batch):
        cache.copy(0, row)
    return cache


def cards_of(ops: Reference) -> list[tuple[Reference, AbstractContextManager]]:
    """The back end of each card, and what makes it the current one."""
    if isinstance(ops, Split):
        return [(one, ops.on(rank)) for rank, one in enumerate(ops.ranks)]
    return [(ops, nullcontext())]


def weight_bytes(weights: Weights) -> int:
    return sum(array.nbytes for array in arrays(weights))


def step_bytes(e: Engine, batch: int, context: int, experts: float = 0.0) -> int:
    """What a decode step must read: every matrix once, of a layer's experts so many (`experts_taken`), the caches once.
    Of an embedding that is not also the head it reads no more than a row a sequence."""
    outer = e.model.weights
    weights = weight_bytes(outer) - (0 if outer.head is outer.embed else outer.embed.nbytes)
    for of_layer in e.model.weights.layers if e.config.experts else ():
        weights -= (of_layer.gate_up.nbytes + of_layer.down.nbytes) * (1 - experts / e.config.experts.count)
    return round(weights) + e.ops.cache_bytes(e.config, e.scheme, batch, context)


class Taken:
    """A back end that counts how many of a layer's experts the tokens of a pass take."""

    def __init__(self, ops: Reference):
        self.ops, self.counts = ops, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def experts(self, x: Array, layer: Layer, config: Config, batch: Batch) -> Array:
        logits = self.ops.linear(x, layer.router, norm=(layer.post_norm, config.rms_norm_eps), float32=True)
        self.counts.append(len(np.unique(route(self.ops.numpy(logits), config.experts)[0])))
        return self.ops.experts(x, layer, config, batch)


def experts_taken(e: Engine, batch: int) -> float:
    """Experts of a layer whose weights a step of so many rows reads, on average over the layers; 0 without experts.
    What the cache holds hardly matters."""
    if e.config.experts is None:
        return 0.0
    cache, model = filled(e.config, e.scheme, e.ops, batch, WINDOW, 1, e.model.weights), copy(e.model)
    model.ops = Taken(e.ops)
    model.forward(np.array(step_tokens(e.config, batch)), cache, cache.batch_for(range(batch), [1] * batch))
    return float(np.mean(model.ops.counts))


def step_tokens(config: Config, rows: int) -> list[int]:
    """Random tokens: equal ones would take equal experts."""
    return np.random.default_rng(2).integers(0, config.vocab_size, rows).tolist()


def stepping(e: Engine, cache: Cache) -> tuple[Callable[[], None], int]:
    """Decode steps of all rows, sampling included, as `generate` takes them; how many a call takes.

    They leave the cache as long as it was, so that every call takes the same.
    """
    start, rows = cache.lengths.copy(), list(range(len(cache.lengths)))
    tokens = step_tokens(e.config, len(rows))
    drawing = [RowSampling()] * len(cache.lengths)
    e.ops.prepare(e.model, cache, [], drawing, False)  # compiles side by side what recording compiles in turn
    decoder = e.ops.decoder(e.model, cache, drawing)
    room = int(cache.context - start.max())
    count = min(IN_A_ROW, room) if decoder.ahead else 1  # what is queued ahead is timed in a row, as it runs

    def run() -> None:
        cache.lengths[:], launched = start, 0
        decoder.feed(rows, tokens)
        for done in range(count):
            while launched < count and launched - done <= decoder.ahead:
                decoder.launch(rows)
                launched += 1
            decoder.read()
        cache.lengths[:] = start

    return run, count


def decode(e: Engine, name: str, batch: int, context: int, limits: dict[str, float], steps: int) -> dict:
    """Steps at a context of whole blocks: none of them fills a window, so no block is packed."""
    experts = experts_taken(e, batch)
    run, count = stepping(e, filled(e.config, e.scheme, e.ops, batch, context, IN_A_ROW, e.model.weights))
    seconds, spread = timed(e.ops, run, steps)
    size = step_bytes(e, batch, context, experts)
    of_limit = {"bytes": size, "fraction_of_limit": size / (limits["copy_tb_s"] * 1e12) / (seconds / count)}
    of_limit |= {"experts": experts} if experts else {}
    times = {"ms": seconds / count * 1e3, "spread": spread, "tokens_per_s": batch / (seconds / count)}
    shape = {"batch": batch, "context": context, **gpus_of(e)}
    return {"model": name, "kv": e.scheme.name, **shape, **times, **of_limit}


def gpus_of(e: Engine) -> dict[str, int]:
    """What a row says of the cards, where there are several; limits are those of all of them."""
    return {"gpus": e.ops.cards} if isinstance(e.ops, Split) else {}


def prefill(e: Engine, name: str, tokens: int, limits: dict[str, float], repeats: int) -> dict:
    """One prompt, logits of its last token."""
    c, ids = e.config, np.random.default_rng(1).integers(0, e.config.vocab_size, tokens)

    def read() -> None:
        cache = Cache(c, e.scheme, 1, tokens, e.ops)
        e.model.forward(ids, cache, cache.batch_for([0], [tokens]))

    seconds, spread = timed(e.ops, read, repeats, 1)
    embedding = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    causal = 2 * tokens**2 * c.q_size * c.num_layers  # half of 4 * n^2
    flops = 2 * tokens * (c.parameters(active=True) - embedding) + causal
    of_limit = {"flops": flops, "fraction_of_limit": flops / (limits["matmul_tflop_s"] * 1e12) / seconds}
    times = {"s": seconds, "spread": spread, "tokens_per_s": tokens / seconds}
    return {"model": name, "kv": e.scheme.name, "tokens": tokens, **gpus_of(e), **times, **of_limit}


def reference_kernel(wanted: Sequence[Case], ops: Reference, copy_rate: float, repeats: int) -> Iterator[dict]:
    """`kernels.measure` without a GPU: decode attention in NumPy over rotating caches, windows half full."""
    for case in wanted:
        seconds, spread = timed(ops, attending(case, ops), repeats)
        yield entry("decode_attention", case, seconds * 1e6, spread, moved_bytes(case), copy_rate)


def attending(case: Case, ops: Reference) -> Callable[[], None]:
    config, h = layer(case.heads), case.heads
    cache = filled(config, case.scheme, ops, case.batch, case.context + case.window - 1, case.scheme.ring)
    (first,) = cache.layers
    copies = min(copies_of(cache.nbytes), MAX_COPIES) - 1
    arrays = ({name: array.copy() for name, array in first.arrays.items()} for _ in range(copies))
    rotated = cycle([first, *(type(first)(of_copy, case.scheme, ops, first.table) for of_copy in arrays)])
    rng, batch = np.random.default_rng(1), cache.batch_for(list(range(case.batch)), [1] * case.batch)
    q, k, v = (
        rng.standard_normal((case.batch, n, h.head_dim), np.float32) for n in (h.q_heads, h.kv_heads, h.kv_heads)
    )
    return lambda: next(rotated).attend(q, NewTokens(k, v), batch)
