"""What a layer keeps of each token on several cards: each card the keys and values of its own kv heads, and the norms.

A row leaves and enters with all kv heads, so that what a prompt cache holds does not depend on the number of cards.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..batch import Batch
from ..config import Config
from ..layer_cache import LayerCache, Layout, NewTokens, PackedCache
from ..oscar import Scheme
from ..rows import export_row, import_row
from .ranks import Ranks, of_rank
from .shares import first_key, local

Array = Any
WHOLE = ("norms",)  # of a row: on every card; of the other arrays the first axis are kv heads


class SplitCache(LayerCache):
    """A layer's cache whose arrays are `Ranks`. kind: of each card's. Its `ops` is the back end of all cards."""

    kind: type[LayerCache]
    cards: int

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int, blocks: int) -> Layout:
        """Of one card's arrays."""
        return cls.kind.layout(local(config, cls.cards, 0), scheme, batch, context, blocks)

    def of(self, rank: int) -> LayerCache:
        """That of one card."""
        arrays = of_rank(self.arrays, rank)
        return self.kind(arrays, self.scheme, self.ops.ranks[rank], self.table, self.index)

    def with_own_heads(self, config: Config) -> list[int]:
        """The cards whose kv heads are, in order, those of the model: of cards with the same head the first."""
        firsts = [int(first_key(config, self.cards, rank)) for rank in range(self.cards)]
        return [firsts.index(first) for first in dict.fromkeys(firsts)]


@export_row.register
def _export_row(split: SplitCache, slot: int, length: int, config: Config) -> dict[str, np.ndarray]:
    own, parts = local(config, split.cards, 0), []
    for rank in split.with_own_heads(config):
        with split.ops.on(rank):
            parts.append(export_row(split.of(rank), slot, length, own))
    first, *_ = parts
    return {name: array if name in WHOLE else np.concatenate([part[name] for part in parts])
            for name, array in first.items()}  # fmt: skip


@import_row.register
def _import_row(split: SplitCache, slot: int, row: dict[str, np.ndarray], packed: int) -> None:
    config = split.ops.config
    for rank in range(split.cards):
        first, count = first_key(config, split.cards, rank), max(config.num_kv_heads // split.cards, 1)
        own = {name: array if name in WHOLE else array[first : first + count] for name, array in row.items()}
        with split.ops.on(rank):
            import_row(split.of(rank), slot, own, packed)


class SplitArrayCache(SplitCache):
    """Array code: each card's by itself."""

    def append(self, new: NewTokens, batch: Batch) -> None:
        for rank in range(len(self.ops.ranks)):
            with self.ops.on(rank):
                self.of(rank).append(of_rank(new, rank), batch)

    def attend(self, q: Array, new: NewTokens, batch: Batch) -> Array:
        return Ranks([
            self.of(rank).attend(of_rank(q, rank), of_rank(new, rank), batch) for rank in range(len(self.ops.ranks))
        ])  # fmt: skip


@cache
def split_cache(kind: type[LayerCache], cards: int) -> type[SplitCache]:
    """The kind of cache that several cards make of one card's, in array code."""
    about = {"kind": kind, "cards": cards, "row_arrays": kind.row_arrays}
    return type(f"Split{kind.__name__}", (SplitArrayCache,), about)


@cache
def split_kernel_cache(kind: type[LayerCache], cards: int) -> type[SplitCache]:
    """The same where kernels fill and read it: one launch is every card's. What a prefill appends to a plain cache is
    array code."""
    about = {"kind": kind, "cards": cards}
    if not issubclass(kind, PackedCache):
        about["append"] = _append_plain
    return type(f"Split{kind.__name__}", (SplitCache, kind), about)


def _append_plain(self: SplitCache, new: NewTokens, batch: Any) -> None:
    if new.k is not None:
        SplitArrayCache.append(self, new, batch)
