"""A cache whose rows take their blocks from a pool: rows of any length up to the pool, and rows that begin alike hold
the same blocks.

A row has blocks for so many tokens as `reserve` was asked for. Whole packed blocks never change, so they can be shared
and outlive their row; what a block is written with is its row's alone. Window and sinks stay per row; the sinks of rows
that are gone are kept beside them, since a block is of no use without those of its first one. What the pool gives to
other tokens goes to the host, if there is room, and comes back bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from ..backend import Backend
from ..cache import Cache, blocks_of_row
from ..config import Config
from ..layer_cache import BLOCK_TOKENS, SINK_ARRAYS, blocks_of
from ..oscar import Scheme
from ..rows import KEPT
from .blocks import BlockPool, chained_keys
from .host_store import HostStore

Array = Any


@dataclass(frozen=True)
class Swapped:
    """What a row's blocks hold, on the host, while they serve others. blocks, generations: where it was."""

    blocks: list[int]
    generations: list[int]
    arrays: list[dict[str, np.ndarray]]  # of each block: [layers, ...]


def kept_sinks(batch: int) -> int:
    """How many beginnings keep their sinks when their rows are gone."""
    return max(batch, 16)


def host_sinks(blocks: int) -> int:
    """The same on the host, which keeps so many blocks: a conversation has some 2,000 tokens."""
    return -(-blocks // 16)


class PooledCache(Cache):
    """blocks[b]: those of row b, in their order. swapped[b]: what row b has of them on the host. on_host: how many
    blocks that were in the pool the host has room for; restored: how many came back.

    A scheme that packs nothing has no blocks, and its rows are as ever.
    """

    BLOCK_TOKENS = BLOCK_TOKENS

    def __init__(
        self, config: Config, scheme: Scheme, batch: int, context: int, ops: Backend, blocks: int, on_host: int = 0
    ):
        blocks = blocks if scheme.quantized else 0
        table = np.zeros((batch, blocks_of_row(scheme, context)), np.int32)
        self._allocate(config, scheme, (batch, context), ops, table, blocks, kept_sinks(batch))
        self.pool, self.blocks = BlockPool(blocks), [[] for _ in range(batch)]
        self.swapped: dict[int, Swapped] = {}
        # Key of a row's first block -> where its sinks are kept; the one unused for longest first
        self.sinks: OrderedDict[bytes, int] = OrderedDict()
        self.unused_sinks = list(range(kept_sinks(batch)))
        on_host, self.restored = on_host if blocks else 0, 0
        self.host = HostStore(ops, {name: self.arrays[name][:, 0] for name in self.block_arrays}, on_host)
        of_root = {name: kept[:, 0] for name, kept in self._sink_arrays()}
        self.host_sinks = HostStore(ops, of_root, host_sinks(on_host))

    def gauges(self) -> dict[str, tuple[float, str]]:
        """For `Scheduler.gauges`."""
        pool = self.pool
        return {
            "blocks": (pool.size, "blocks of 128 packed tokens in the pool"),
            "blocks_free": (len(pool.free), "blocks that no row holds"),
            "blocks_known": (pool.num_known, "free blocks that a prompt may still begin with"),
            "blocks_shared": (pool.num_shared, "blocks that several rows hold"),
            "swapped": (len(self.swapped), "rows whose blocks wait on the host"),
            "blocks_on_host": (len(self.host), "blocks that the pool has not, but the host"),
            "blocks_restored": (self.restored, "blocks that came back from the host so far"),
        }  # fmt: skip

    # --- blocks of a row

    def blocks_of(self, tokens: int) -> int:
        """Blocks that a row of so many tokens holds."""
        return blocks_of(tokens) if self.scheme.quantized else 0

    def missing(self, slot: int, tokens: int) -> int:
        """How many free blocks `reserve` takes for so many tokens of a row."""
        swapped = self.swapped.get(slot)
        if swapped is None:
            return max(self.blocks_of(tokens) - len(self.blocks[slot]), 0)
        held = sum(self.pool.holders[block] > 0 for block in self._unchanged(swapped))
        return max(self.blocks_of(tokens), len(swapped.blocks)) - held

    def reserve(self, slot: int, tokens: int) -> None:
        """The row has its blocks, and room for so many tokens. Raises ValueError, and does nothing, where the pool has
        not `missing` blocks."""
        count = self.missing(slot, tokens)
        if count > len(self.pool.free):
            raise ValueError(f"row {slot} lacks {count} blocks, and {len(self.pool.free)} are free")
        if slot in self.swapped:
            self._swap_in(slot, self.swapped.pop(slot))
        self._append(slot, self._take(self.missing(slot, tokens)))

    def _take(self, count: int) -> list[int]:
        """Free blocks; the host keeps what was known of them."""
        for key, block in self.pool.next_known(count).items() if self.host.arrays else ():
            self.host.keep(key, {name: self.arrays[name][:, block] for name in self.block_arrays})
        return self.pool.take(count)

    def _append(self, slot: int, blocks: Sequence[int]) -> None:
        """The row has these blocks, which it holds already, behind its others."""
        if blocks:
            first = len(self.blocks[slot])
            self.blocks[slot] += blocks
            of_row = slot, slice(first, first + len(blocks))
            self.table[of_row] = blocks
            self.arrays["table"][of_row] = self.ops.xp.asarray(self.table[of_row])

    def _drop(self, slot: int, count: int) -> None:
        """The row gives up all but its first `count` blocks."""
        self.pool.release(self.blocks[slot][count:])
        del self.blocks[slot][count:]

    def swap(self, one: int, other: int) -> None:
        """Raises KeyError for a row that waits on the host: it runs, and stays where it is."""
        if self.swapped.keys() & {one, other}:
            raise KeyError(f"row {one} or {other} waits on the host")
        super().swap(one, other)
        if one != other:
            self.blocks[one], self.blocks[other] = self.blocks[other], self.blocks[one]

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self.swapped.pop(slot, None)
        self._drop(slot, 0)

    # --- what rows share

    def left_to_share(self, slot: int, length: int, unread: int = 0) -> int:
        """How many tokens of a row another one, or this one for another answer, can begin with: as `left_after_cut`,
        but of packed tokens that are not all of the row's only whole blocks, since a part of one would be written
        again."""
        if slot in self.swapped:
            return 0
        left = self.left_after_cut(slot, length, unread)
        return left if left >= self.packed_tokens(slot) else left // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def most_own(self) -> int:
        """Blocks at most that a row takes for itself in `take_over`: those that are not packed whole."""
        return self.blocks_of(self.scheme.ring) + (self.scheme.quantized and self.scheme.flush < BLOCK_TOKENS)

    def _whole(self, slot: int, length: int) -> int:
        return min(self.packed_tokens(slot), length) // BLOCK_TOKENS

    def take_over(self, source: int, target: int, length: int, unread: int = 0) -> int:
        """Row `target` becomes what the first `length` tokens of row `source` are; how many of them it has
        (`left_to_share`). Blocks that are packed whole are the same, others are copied. Raises ValueError where the
        pool has not so many, at most `most_own`."""
        left = self.left_to_share(source, length, unread)
        whole, packed = self._whole(source, left), self.packed_tokens(source)
        shift = int(self.shifts[source]) if left == self.lengths[source] else 0  # as in `truncate`
        if source != target:
            shared = self.blocks[source][:whole]
            self.pool.hold(shared)
            self.reset(target)
            self._append(target, shared)
            self.reserve(target, left)
            parts = slice(whole, len(self.blocks[target]))
            self.copy_blocks(self.blocks[source][parts], self.blocks[target][parts])
            self.copy_row(source, target)
        elif left < packed:
            self._drop(target, whole)
        self.lengths[target], self.cuts[target], self.shifts[target] = left, min(packed, left), shift
        return left

    def publish(self, slot: int, ids: Sequence[int]) -> None:
        """Rows may begin with the whole packed blocks of this one, whose tokens are these. The steps that wrote them
        must have been read."""
        blocks = self.blocks[slot][: self._whole(slot, len(ids))]
        new = sum(self.pool.keys[block] is None for block in blocks)
        known = len(blocks) - new
        parent = self.pool.keys[blocks[known - 1]] if known else b""
        tokens = ids[known * BLOCK_TOKENS : len(blocks) * BLOCK_TOKENS]
        for block, key in zip(blocks[known:], chained_keys(tokens, parent), strict=True):
            self.pool.publish(block, key)
        if blocks:
            self._keep_sinks(slot, self.pool.keys[blocks[0]])

    def _keep_sinks(self, slot: int, root: bytes) -> None:
        if root not in self.sinks:
            at = self._sinks_for(root)
            for name, kept in self._sink_arrays():
                kept[:, at] = self.arrays[name][:, slot]
        self.sinks.move_to_end(root)

    def _sinks_for(self, root: bytes) -> int:
        """Where sinks can be kept; those that were there go to the host."""
        if self.unused_sinks:
            at = self.unused_sinks.pop()
        else:
            old, at = self.sinks.popitem(last=False)
            self.host_sinks.keep(old, {name: kept[:, at] for name, kept in self._sink_arrays()})
        self.sinks[root] = at
        return at

    def _sink_arrays(self) -> list[tuple[str, Array]]:
        return [(name, self.arrays[KEPT + name]) for name in SINK_ARRAYS if name in self.arrays]

    def match(self, keys: Sequence[bytes], tokens: int) -> list[bytes]:
        """Keys of the blocks, in the pool or on the host, that hold the beginning of a prompt of so many tokens, whose
        `chained_keys` are given: at most as many as are packed when all of it is fed, for behind them its window is fed
        again."""
        keys = keys[: self.scheme.packed_tokens(tokens) // BLOCK_TOKENS]
        if not keys or keys[0] not in self.sinks and keys[0] not in self.host_sinks:
            return []
        return [*takewhile(lambda key: key in self.pool.by_key or key in self.host, keys)]

    def free_for(self, keys: Sequence[bytes]) -> int:
        """How many blocks must be free for `begin_with`: those that are, and those for what the host alone has."""
        blocks = map(self.pool.by_key.get, keys)
        return sum(block is None or not self.pool.holders[block] for block in blocks)

    def begin_with(self, slot: int, keys: Sequence[bytes]) -> int:
        """The row holds what `match` found, and nothing else; how many tokens that is. Raises ValueError where the pool
        has not `free_for` blocks."""
        if (count := self.free_for(keys)) > len(self.pool.free):
            raise ValueError(f"row {slot} lacks {count} blocks, and {len(self.pool.free)} are free")
        held = {key: self.pool.by_key[key] for key in keys if key in self.pool.by_key}
        self.pool.hold(held.values())
        self.reset(slot)
        self._append(slot, [held[key] if key in held else self._restore(key) for key in keys])
        self._restore_sinks(keys[0])
        for name, kept in self._sink_arrays():
            self.arrays[name][:, slot] = kept[:, self.sinks[keys[0]]]
        self.lengths[slot] = self.cuts[slot] = len(keys) * BLOCK_TOKENS
        return int(self.lengths[slot])

    def _restore(self, key: bytes) -> int:
        """A block of the pool with what the host has under a key."""
        with self.host.held(key) as arrays:
            (block,) = self._take(1)
            for name, array in arrays.items():
                self.arrays[name][:, block] = array
        self.pool.publish(block, key)
        self.restored += 1
        return block

    def _restore_sinks(self, root: bytes) -> None:
        if root not in self.sinks:
            with self.host_sinks.held(root) as arrays:
                at = self._sinks_for(root)
                for name, kept in self._sink_arrays():
                    kept[:, at] = arrays[name]
        self.sinks.move_to_end(root)

    # --- rows that wait on the host

    def swap_out(self, slot: int) -> None:
        """The row gives its blocks up; what they hold is on the host until `reserve`. Window and sinks stay."""
        blocks = list(self.blocks[slot])
        arrays = [self._on_host(block) for block in blocks]
        self.swapped[slot] = Swapped(blocks, [self.pool.generations[block] for block in blocks], arrays)
        self._drop(slot, 0)

    def _on_host(self, block: int) -> dict[str, np.ndarray]:
        return {name: self.ops.on_host(self.arrays[name][:, block]) for name in self.block_arrays}

    def _unchanged(self, swapped: Swapped) -> list[int]:
        """Blocks that nobody has taken since they were given up: what they hold need not come back."""
        where = zip(swapped.blocks, swapped.generations, strict=True)
        return [block for block, generation in where if self.pool.generations[block] == generation]

    def _swap_in(self, slot: int, swapped: Swapped) -> None:
        """Bit for bit."""
        unchanged = self._unchanged(swapped)
        self.pool.hold(unchanged)
        taken = iter(self._take(len(swapped.blocks) - len(unchanged)))
        blocks = [block if block in unchanged else next(taken) for block in swapped.blocks]
        for block, old, arrays in zip(blocks, swapped.blocks, swapped.arrays, strict=True):
            for name, array in arrays.items() if block != old or block not in unchanged else ():
                self.arrays[name][:, block] = self.ops.xp.asarray(array)
        self._append(slot, blocks)
