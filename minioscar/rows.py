"""What becomes of a row of a cache beside being read and stepped: it is cut, copied, exchanged, and leaves for a file.

Chats cut their row, prompt caches export it, several answers begin with copies, the server's rows come and go; and a
pass that breaks off leaves rows that are whole again. A row that leaves has the form of `row_layout`, which does not
depend on the back end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any

import numpy as np

from .batch import Batch
from .config import Config
from .layer_cache import BF16, SINK_ARRAYS, WINDOW_ARRAYS, LayerCache, Layout, blocks_of
from .oscar import WINDOW, Scheme

KEPT = "kept_"  # before the names of sinks whose rows are gone


class Rows:
    """What `Cache`, which says what these are, can do with its rows."""

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
        """Each layer's part of a row, on the host (`export_row`). Raises ValueError as `check_whole`."""
        self.check_whole(slot)
        return [export_row(layer_cache, slot, int(self.lengths[slot]), self.config) for layer_cache in self.layers]

    def import_row(self, slot: int, rows: Iterable[dict[str, np.ndarray]], tokens: int, length: int) -> None:
        """What `export_row` gave for a row of `tokens`, cut to `length` as by `truncate`."""
        self.lengths[slot], self.cuts[slot] = tokens, 0
        self.truncate(slot, length)
        shapes = row_layout(self.config, self.scheme, int(self.lengths[slot]), int(self.cuts[slot]))
        for layer_cache, row in zip(self.layers, rows, strict=True):
            parts = {name: row[name][tuple(map(slice, shape))] for name, (shape, _) in shapes.items()}
            import_row(layer_cache, slot, parts, int(self.cuts[slot]))

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
        """The names of those whose second axis are blocks."""
        others = *self.layers[0].row_arrays, *(KEPT + name for name in SINK_ARRAYS), "table"
        return [name for name in self.arrays if name not in others]

    def reset(self, slot: int) -> None:
        """Row `slot` is empty again. What its arrays hold is never read: every read is bounded by the length."""
        self.lengths[slot] = self.cuts[slot] = self.shifts[slot] = 0


def whole_blocks(context: int, config: Config) -> int:
    """A capacity of whole blocks, if the model has such a context: a row of it can be saved and go on in any other."""
    return min(-(-context // WINDOW) * WINDOW, config.max_context)


def row_layout(config: Config, scheme: Scheme, length: int, packed: int | None = None) -> Layout:
    """What one layer of a row of `length` tokens, `packed` of them packed (None: P(length)), holds: what a saved cache
    consists of. On every back end the same; nothing empty is in it."""
    heads, dim = config.num_kv_heads, config.head_dim
    if not scheme.quantized:
        return dict.fromkeys(("keys", "values"), ((heads, length, dim), BF16))
    packed = scheme.packed_tokens(length) if packed is None else packed
    layout: dict[str, tuple[tuple[int, ...], Any]] = {
        name: ((heads, *shape), dtype) for name, (shape, dtype) in scheme.packed_layout(packed, dim).items()
    }
    layout |= dict.fromkeys(WINDOW_ARRAYS, ((heads, length - packed, dim), BF16))
    if scheme.scale:  # but those of a context's last tokens, which are never packed
        layout["norms"] = (min(length, config.max_context // scheme.flush * scheme.flush),), np.float32
    layout |= dict.fromkeys(SINK_ARRAYS, ((heads, min(packed, scheme.sinks), dim), BF16))
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in layout.items() if math.prod(shape)}


def row_bytes(config: Config, scheme: Scheme, length: int) -> int:
    """Bytes of what all layers hold of a row of `length` tokens."""
    arrays = row_layout(config, scheme, length).values()
    return config.num_layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)


@singledispatch
def export_row(layer_cache: LayerCache, slot: int, length: int, config: Config) -> dict[str, np.ndarray]:
    """The first `length` tokens of a row as a layer's cache has them, in the form of `row_layout`, the window in the
    order of its tokens: copies on the host. (Of a layer on several cards: parallel/caches.py.)"""
    scheme, row = layer_cache.scheme, {}
    if packed := scheme.packed_tokens(length):
        row = layer_cache.packed_row(slot, packed)
    row |= {name: layer_cache[name][slot] for name in layer_cache.row_arrays if name in layer_cache.arrays}
    if scheme.quantized:
        row |= {name: row[name][:, layer_cache.slots(packed, length)] for name in WINDOW_ARRAYS}
    if scheme.scale:
        row["norms"] = layer_cache.norms(slot, length)
    return {
        name: np.array(layer_cache.ops.numpy(row[name][tuple(map(slice, shape))]), order="C")
        for name, (shape, _) in row_layout(config, scheme, length).items()
    }


@singledispatch
def import_row(layer_cache: LayerCache, slot: int, row: dict[str, np.ndarray], packed: int) -> None:
    """The inverse of `export_row`, bit for bit, into a row that has room for it. packed: its packed tokens."""
    if packed:
        layer_cache.import_packed(slot, row, packed)
    for name, array in row.items():
        array = layer_cache.xp.asarray(array)
        if name in WINDOW_ARRAYS:
            layer_cache[name][slot][:, layer_cache.slots(packed, packed + array.shape[1])] = array
        elif name == "norms":
            layer_cache.put_norms(slot, 0, array)
        elif name in layer_cache.row_arrays:
            layer_cache[name][(slot, *map(slice, array.shape))] = array
