"""What a server does once before it is ready, so that nothing is compiled or allocated when it is asked."""

from __future__ import annotations

import numpy as np

from ..batch import Batch
from ..decoding import Decoder
from ..model import Model
from ..plans import BATCH_TOKENS
from ..sampling import RowSampling, Sampling
from .pooled import PooledCache


def longest_pass(cache: PooledCache, chunk: int) -> Batch:
    """The longest piece, at the end of the longest row."""
    start = max(cache.context - chunk, 0)
    return Batch((0,), (start,), (cache.scheme.packed_tokens(start),), (cache.context - start,))


def passes(cache: PooledCache, chunk: int) -> list[Batch]:
    """One of each size by which kernels are chosen: of tokens, and of rows, which is that of logits."""
    sizes, rows = range(1, min(BATCH_TOKENS + 1, chunk, cache.context) + 1), range(2, len(cache.lengths) + 1)
    alone = [Batch((0,), (0,), (0,), (size,)) for size in sizes]
    return [longest_pass(cache, chunk), *alone, *(Batch(tuple(range(n)), *[(0,) * n] * 2, (1,) * n) for n in rows)]


def warm_up(model: Model, cache: PooledCache, decoder: Decoder, chunk: int) -> None:
    """What the longest pass, a small one, a row's beginning and a step of each size allocate stays at hand; on the
    thread that runs them later, since libraries keep state for each."""
    last = {decoder.rows_with(slot): slot for slot in range(len(cache.lengths))}  # of the rows that each step has
    with decoder.ordered(), np.errstate(all="ignore"):
        for batch in (longest_pass(cache, chunk), Batch((0,), (0,), (0,), (1,))):
            cache.reserve(0, cache.context)
            logits = model.step(np.zeros(batch.counts[0], np.int64), cache, batch, lambda logits: logits)[1]
            model.ops.numpy(logits)
            cache.reset(0)
        cache.advance(batch)
        end = min(2, cache.context)
        for last_slot in last.values():
            has_room = 2 * cache.missing(0, end) <= len(cache.pool.free)
            slots = [0, last_slot] if last_slot and has_room else [last_slot]
            cache.lengths[0] = 1  # the token of the small pass
            for slot in slots:
                cache.copy_row(0, slot)
                cache.reserve(slot, end)
                decoder.join(slot, RowSampling(Sampling(1.0)), logits[0])
            if cache.context > 1:
                decoder.launch(slots)
                decoder.read()
            for slot in slots:
                cache.reset(slot)
    with decoder.ordered():
        for slot in range(len(cache.lengths)):
            cache.reset(slot)
        cache.reserve(0, 1)
        cache.swap_out(0)
        cache.pool.release(cache.pool.take(cache.blocks_of(1)))  # somebody has had it: it is copied back
        cache.reserve(0, 1)
        cache.copy_blocks(cache.blocks[0], cache.blocks[0])
        cache.copy_row(0, 0)
        cache.reset(0)
