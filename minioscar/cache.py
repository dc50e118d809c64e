"""The KV cache: the rows of a batch, their lengths and their blocks; what a layer keeps of them is in layer_cache.py.

Here a row has blocks of its own for good; in serve/pooled.py rows share a pool of them. Rows are cut, copied and saved
by rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .backend import Backend
from .batch import Batch
from .config import Config
from .layer_cache import BF16, SINK_ARRAYS, LayerCache, Layout, NewTokens, array_cache, blocks_of
from .oscar import Scheme
from .rows import KEPT, Rows

__all__ = ["BF16", "Cache", "LayerCache", "NewTokens"]
Array = Any


class Cache(Rows):
    """Keys and values of `batch` sequences of at most `context` tokens, in the given scheme.

    layers[i] is layer i's cache; its arrays are slices of `arrays`, which have one more axis in front: what is done for
    all layers at once takes those. table: the blocks of each row, int32 [batch, blocks] (host); arrays["table"] is the
    same where kernels see it, one for all layers. lengths[b] counts the tokens of row b; cuts[b] of them are packed at
    least, which are more than P(lengths[b]) until a row that was cut is fed again; shifts[b]: position minus place of
    what follows row b, where media have positions of their own (host, int64).
    """

    def __init__(self, config: Config, scheme: Scheme, batch: int, context: int, ops: Backend):
        of_row = blocks_of_row(scheme, context)
        table = np.arange(batch * of_row, dtype=np.int32).reshape(batch, of_row)
        self._allocate(config, scheme, (batch, context), ops, table, batch * of_row)

    def _allocate(
        self, config: Config, scheme: Scheme, size: tuple[int, int], ops: Backend, table: np.ndarray, blocks: int,
        sinks: int = 0,
    ) -> None:
        self.config, self.scheme, self.ops = config, scheme, ops
        (batch, self.context), kind = size, ops.cache_type(config, scheme)
        self.lengths, self.cuts, self.shifts = np.zeros((3, batch), np.int64)
        shapes = shapes_of(kind, config, scheme, size, blocks, sinks)
        self.arrays = {
            name: ops.xp.zeros((config.num_layers, *shape), dtype) for name, (shape, dtype) in shapes.items()
        }
        self.table, self.arrays["table"] = table, ops.xp.asarray(table)
        self.layers = [kind(of_layer(self.arrays, i), scheme, ops, self.table, i) for i in range(config.num_layers)]

    @property
    def nbytes(self) -> int:
        """Of all that depends on tokens; the table, 4 bytes for 128 of them, is counted with the work of a pass."""
        return sum(array.nbytes for name, array in self.arrays.items() if name != "table")

    def batch_for(self, slots: Iterable[int], counts: Iterable[int]) -> Batch:
        """Room for counts[i] new tokens in row slots[i]. Raises ValueError if a row would grow past the context."""
        slots, counts = tuple(slots), tuple(counts)
        starts, packed = tuple(int(self.lengths[s]) for s in slots), tuple(map(self.packed_tokens, slots))
        for slot, start, count in zip(slots, starts, counts, strict=True):
            if count < 1 or start + count > self.context:
                raise ValueError(f"row {slot} holds {start} of {self.context} tokens; {count} more do not fit")
        shifts = tuple(int(self.shifts[s]) for s in slots)
        return Batch(slots, starts, packed, counts, shifts if any(shifts) else None)

    def packed_tokens(self, slot: int) -> int:
        """How many tokens of a row are packed."""
        return max(self.scheme.packed_tokens(int(self.lengths[slot])), int(self.cuts[slot]))

    def advance(self, batch: Batch) -> None:
        """The new tokens of `batch` are now part of their rows."""
        for slot, start, count in zip(batch.slots, batch.starts, batch.counts, strict=True):
            self.lengths[slot] = start + count
        if batch.inputs is not None:
            self.shifts[list(batch.slots)] = batch.inputs.shifts


def of_layer(arrays: dict[str, Array], index: int) -> dict[str, Array]:
    """One layer's arrays; the table is everybody's."""
    return {name: array if name == "table" else array[index] for name, array in arrays.items()}


def blocks_of_row(scheme: Scheme, context: int) -> int:
    return blocks_of(context) if scheme.quantized else 0


def shapes_of(
    kind: type[LayerCache], config: Config, scheme: Scheme, size: tuple[int, int], blocks: int, sinks: int
) -> Layout:
    """Of the arrays of a layer: `LayerCache.layout`, and those of so many rows whose sinks alone are kept."""
    shapes = kind.layout(config, scheme, *size, blocks)
    kept = {name: ((sinks, *shapes[name][0][1:]), shapes[name][1]) for name in SINK_ARRAYS if name in shapes}
    return shapes | {KEPT + name: of for name, of in kept.items() if sinks}


def cache_bytes(
    config: Config, scheme: Scheme, batch: int, context: int, blocks: int | None = None, sinks: int = 0
) -> int:
    """Bytes of a whole cache, before it is made; equal to the `nbytes` that it will have. blocks: of its pool (None:
    those of full rows). sinks: rows of sinks beyond the cache's own."""
    blocks = batch * blocks_of_row(scheme, context) if blocks is None else blocks
    arrays = shapes_of(array_cache(scheme), config, scheme, (batch, context), blocks, sinks).values()
    return config.num_layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)
