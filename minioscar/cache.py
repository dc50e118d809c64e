"""The KV cache: the rows of a batch, their lengths and their blocks; what a layer keeps of them is in layer_cache.py.

Here a row has blocks of its own for good; in pooled.py rows share a pool of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .batch import Batch
from .config import Config
from .layer_cache import (
    BF16,
    SINK_ARRAYS,
    Backend,
    LayerCache,
    Layout,
    NewTokens,
    PackedCache,
    array_cache,
    blocks_of,
    row_layout,
    widen,
)
from .oscar import Scheme

__all__ = ["BF16", "Cache", "LayerCache", "NewTokens", "PackedCache", "row_layout", "widen"]
Array = Any
KEPT = "kept_"  # before the names of sinks whose rows are gone


class Cache:
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

    def rollback(self, batch: Batch) -> None:
        """After a pass that ended midway: some layers have its tokens, others not."""
        for slot, start, count in zip(batch.slots, batch.starts, batch.counts, strict=True):
            self.restore(slot, start, count)

    def restore(self, slot: int, start: int, count: int) -> None:
        """A row of `start` tokens after up to `count` more were written: without its window if these overwrote it."""
        self.lengths[slot] = start
        self.cuts[slot], self.lengths[slot] = self.packed_tokens(slot), self._intact(slot, count)

    def _intact(self, slot: int, unread: int) -> int:
        """How many tokens of a row are left where up to `unread` more were written: those of a window whose oldest slot
        was overwritten are not."""
        packed, length = self.packed_tokens(slot), int(self.lengths[slot])
        return packed if self.scheme.quantized and length + unread > packed + self.scheme.ring else length

    def left_after_cut(self, slot: int, length: int, unread: int = 0) -> int:
        """How many tokens of a row are left when it is cut to `length`; unread: more may be written behind them.

        All, if the window has those after the first P(length). Else P(length) packed ones, so that the caller feeds up
        to flush + keep - 1 tokens again: then the row is as if it had never been longer.
        """
        whole = self.scheme.packed_tokens(length)
        return whole if whole < self.packed_tokens(slot) else min(length, self._intact(slot, unread))

    def truncate(self, slot: int, length: int, unread: int = 0) -> int:
        """Forgets the tokens of a row from `length` on; returns how many are left (`left_after_cut`). The caller feeds
        the rest again, up to `length` at least, before the row is stepped or exported."""
        left, packed = self.left_after_cut(slot, length, unread), self.packed_tokens(slot)
        self.shifts[slot] = 0  # that of text; a pass over a row with media says what is true
        self.lengths[slot], self.cuts[slot] = left, min(self.scheme.packed_tokens(length), packed)
        return left

    def check_whole(self, slot: int) -> None:
        """Raises ValueError for a row whose tokens up to where it was cut were not fed again."""
        if self.cuts[slot] > self.scheme.packed_tokens(int(self.lengths[slot])):
            raise ValueError(f"row {slot} was cut to {self.lengths[slot]} tokens; feed those that followed first")

    def export_row(self, slot: int) -> list[dict[str, np.ndarray]]:
        """Each layer's part of a row, on the host (`LayerCache.export_row`). Raises ValueError as `check_whole`."""
        self.check_whole(slot)
        return [layer_cache.export_row(slot, int(self.lengths[slot]), self.config) for layer_cache in self.layers]

    def import_row(self, slot: int, rows: Iterable[dict[str, np.ndarray]], tokens: int, length: int) -> None:
        """What `export_row` gave for a row of `tokens`, cut to `length` as by `truncate`."""
        self.lengths[slot], self.cuts[slot] = tokens, 0
        self.truncate(slot, length)
        shapes = row_layout(self.config, self.scheme, int(self.lengths[slot]), int(self.cuts[slot]))
        for layer_cache, row in zip(self.layers, rows, strict=True):
            parts = {name: row[name][tuple(map(slice, shape))] for name, (shape, _) in shapes.items()}
            layer_cache.import_row(slot, parts, int(self.cuts[slot]))

    def copy(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        blocks = slice(blocks_of(int(self.lengths[source])))
        self.copy_blocks(self.table[source, blocks], self.table[target, blocks])
        self.copy_row(source, target)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for name in self.block_arrays:
            for source, target in zip(sources, targets, strict=True):
                self.arrays[name][:, target] = self.arrays[name][:, source]

    def copy_row(self, source: int, target: int) -> None:
        """All of a row but its blocks."""
        for name in self.arrays.keys() & set(self.layers[0].row_arrays):
            self.arrays[name][:, target] = self.arrays[name][:, source]
        for of_rows in (self.lengths, self.cuts, self.shifts):
            of_rows[target] = of_rows[source]

    def swap(self, one: int, other: int) -> None:
        """Two rows change places."""
        if one == other:
            return
        for name in self.arrays.keys() & set(self.layers[0].row_arrays):
            kept = self.arrays[name][:, one].copy()
            self.arrays[name][:, one] = self.arrays[name][:, other]
            self.arrays[name][:, other] = kept
        both = [one, other]
        for of_rows in (self.table, self.lengths, self.cuts, self.shifts):
            of_rows[both] = of_rows[both[::-1]]
        self.arrays["table"][both] = self.ops.xp.asarray(self.table[both])

    @property
    def block_arrays(self) -> list[str]:
        others = *self.layers[0].row_arrays, *(KEPT + name for name in SINK_ARRAYS), "table"
        return [name for name in self.arrays if name not in others]

    def reset(self, slot: int) -> None:
        """Row `slot` is empty again. What its arrays hold is never read: every read is bounded by the length."""
        self.lengths[slot] = self.cuts[slot] = self.shifts[slot] = 0

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)


def of_layer(arrays: dict[str, Array], index: int) -> dict[str, Array]:
    """One layer's arrays; the table is everybody's."""
    return {name: array if name == "table" else array[index] for name, array in arrays.items()}


def blocks_of_row(scheme: Scheme, context: int) -> int:
    return blocks_of(context) if scheme.quantized else 0


def row_bytes(config: Config, scheme: Scheme, length: int) -> int:
    """Bytes of what all layers hold of a row of `length` tokens."""
    arrays = row_layout(config, scheme, length).values()
    return config.num_layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)


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
