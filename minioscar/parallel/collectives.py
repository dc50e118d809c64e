"""Launches in which all cards take part, and the memory that they share.

What a decode step sums is small: a kernel writes it into the other cards' memory. What a prefill sums is large: NCCL.
Cards that do not reach each other's memory leave everything to NCCL, which goes through the host's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import Failure, one_line
from ..ops.launch import Launch
from .ranks import Ranks
from .together import undivided

PUSHED = 1 << 20  # numbers of a sum that a kernel pushes at most; more go through NCCL
NOTHING_PUSHED = 0  # of cards that do not reach each other's memory
MAX_CARDS, MAX_BLOCKS, MAX_SUM_BLOCKS = 8, 128, 64  # kernels/parallel/peers.cuh
ALL = 7  # phases
FLOAT32, BFLOAT16, ADD = 7, 9, 0  # ncclDataType_t and ncclRedOp_t of nccl.h
DEVICE_TO_DEVICE = 3  # cudaMemcpyKind


@dataclass(frozen=True)
class Sum:
    """A sum by NCCL, among the launches of a recorded step: arrays bf16, in place."""

    arrays: Ranks
    name = "sum by NCCL"

    def run(self, links: Links) -> None:
        links.sum(self.arrays)

    def map(self, change: Callable[[Ranks], Any]) -> Sum:
        return Sum(change(self.arrays))


@dataclass(frozen=True)
class Gather:
    """`Links.gather` by NCCL, among the launches of a recorded step: into shares, float32 [cards, tokens, share] of
    every card, and from there into out."""

    arrays: Ranks
    shares: Ranks
    out: Ranks
    firsts: list[int]
    name = "gather by NCCL"

    def run(self, links: Links) -> None:
        links.gather_shares(self.arrays, self.shares)
        links.place_shares(self.shares, self.out, self.firsts)

    def map(self, change: Callable[[Ranks], Any]) -> Gather:
        return Gather(change(self.arrays), change(self.shares), change(self.out), self.firsts)


class Links:
    """Of the cards of a back end: inboxes, counters of calls, NCCL's communicators. xp: `ranks.Namespace`; pushed:
    numbers of a sum at most, `NOTHING_PUSHED` where cards do not reach each other's memory."""

    def __init__(self, xp: Any, cards: int, on: Callable[[int], AbstractContextManager], pushed: int = PUSHED):
        self.xp, self.cards, self.on, self.pushed = xp, cards, on, pushed
        self.inbox = xp.zeros((2, cards, pushed // 2), np.uint64)
        self.epochs = {name: xp.zeros(MAX_BLOCKS, np.int32) for name in ("all_reduce", "gather")}
        self.flags = xp.zeros((2, cards, MAX_BLOCKS), np.int32)
        self.number = Ranks([np.int32(rank) for rank in range(cards)])
        self.communicators, self.beside = list[Any](), list[Any]()  # and streams, of each card

    def all_reduce(self, part: Ranks, residual: Ranks | None, out: Ranks) -> Launch:
        """out = residual + the sum over cards of part; bf16 [tokens, n], n a multiple of 4, at most `pushed` numbers.
        Raises ValueError for others."""
        if part.size > self.pushed or part.shape[-1] % 4:
            raise ValueError(f"{part.size} numbers, {part.shape[-1]} a token, do not fit all_reduce.cu")
        peers = [*map(self._inboxes, range(1, self.cards)), *[None] * (MAX_CARDS - self.cards)]
        sizes = self.number, np.int32(part.size), np.int32(self.pushed // 2)
        args = part, residual, out, self.epochs["all_reduce"], self.inbox, *peers, *sizes
        grid = (min(-(-part.size // 1024), MAX_SUM_BLOCKS),)
        return Launch("parallel/all_reduce.cu", "all_reduce", self._defines(), grid, 256, args)

    def gather(self, part: Ranks, out: Ranks, firsts: list[int]) -> Launch | Gather:
        """out[:, first : first + share] = part of every card: part float32 [tokens, share], out [tokens, vocab]."""
        (tokens, share), vocab = part.shape, out.shape[1]
        if self.pushed == NOTHING_PUSHED:
            return Gather(part, self.xp.empty((self.cards, tokens, share), np.float32), out, firsts)
        outs, flags = self._everywhere(out), self._everywhere(self.flags)
        nothing = [None] * (MAX_CARDS - self.cards)
        sizes = self.number, np.int32(tokens), np.int32(share), np.int32(vocab), Ranks([np.int32(n) for n in firsts])
        args = part, *outs, *nothing, *flags, *nothing, self.epochs["gather"], *sizes
        width = 1 if any(n % 4 for n in (share, vocab, *firsts)) else 4
        grid = (min(-(-tokens * share // 1024), MAX_BLOCKS),)
        defines = f"WIDTH={width}", *self._defines()
        return Launch("parallel/gather.cu", "gather", defines, grid, 256, args)

    def _inboxes(self, i: int) -> Ranks:
        """For each card that of the i-th one after it."""
        return Ranks([self.inbox.values[(rank + i) % self.cards] for rank in range(self.cards)])

    def _everywhere(self, x: Ranks) -> list[Ranks]:
        """The arrays of all cards, as each of them has them."""
        return [Ranks([of_card] * self.cards) for of_card in x.values]

    def _defines(self) -> tuple[str, ...]:
        return f"RANKS={self.cards}", f"PHASES={ALL}"

    def sum(self, arrays: Ranks, streams: Sequence[Any] | None = None) -> None:
        """In place, by NCCL: bf16. streams: of each card (None: the current ones). Raises Failure where NCCL fails."""

        def add(rank: int, communicator: Any, stream: int) -> None:
            x = arrays.values[rank]
            communicator.allReduce(x.data.ptr, x.data.ptr, math.prod(x.shape), BFLOAT16, ADD, stream)

        self._by_nccl("sum", add, streams)

    def gather_shares(self, part: Ranks, shares: Ranks) -> None:
        """shares[r] = part of card r, on every card, by NCCL: float32. Raises Failure where NCCL fails."""

        def collect(rank: int, communicator: Any, stream: int) -> None:
            x, to = part.values[rank], shares.values[rank]
            communicator.allGather(x.data.ptr, to.data.ptr, math.prod(x.shape), FLOAT32, stream)

        self._by_nccl("gather", collect)

    def place_shares(self, shares: Ranks, out: Ranks, firsts: list[int]) -> None:
        """out[:, first : first + share] = shares[r], in turn, since shares may overlap. Copies by addresses: a recorded
        step keeps no arrays, and a capture has no memory for those of array code."""
        import cupy

        (_, tokens, share), vocab = shares.shape, out.shape[1]
        for rank in range(self.cards):
            with self.on(rank):
                stream, to, source = cupy.cuda.get_current_stream(), out.values[rank].data, shares.values[rank].data
                for r, first in enumerate(firsts):
                    where = to.ptr + 4 * first, 4 * vocab, source.ptr + 4 * r * tokens * share, 4 * share
                    cupy.cuda.runtime.memcpy2DAsync(*where, 4 * share, tokens, DEVICE_TO_DEVICE, stream.ptr)

    def _by_nccl(self, what: str, call: Callable[[int, Any, int], None], streams: Sequence[Any] | None = None) -> None:
        """`call` with each card's number, communicator and stream: NCCL takes part on all cards, or on none."""
        import cupy
        from cupy.cuda import nccl

        try:
            if not self.communicators:
                os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast memory is not for every container
                self.communicators = nccl.NcclCommunicator.initAll(list(range(self.cards)))
            with undivided():
                nccl.groupStart()
                for rank, communicator in enumerate(self.communicators):
                    with self.on(rank):
                        stream = cupy.cuda.get_current_stream() if streams is None else streams[rank]
                        call(rank, communicator, stream.ptr)
                nccl.groupEnd()
        except nccl.NcclError as error:
            why = f"NCCL cannot {what} over the cards ({one_line(error)}); NCCL_DEBUG=WARN says more"
            raise Failure(why) from None

    def sum_beside(self, arrays: Ranks) -> None:
        """The same on streams of their own, behind what the current ones have now."""
        self._order(beside_waits=True)
        self.sum(arrays, self.beside)

    def join(self) -> None:
        """What follows on the current streams comes after those sums."""
        self._order(beside_waits=False)

    def _order(self, beside_waits: bool) -> None:
        import cupy

        for rank in range(self.cards):
            with self.on(rank):
                if len(self.beside) == rank:
                    self.beside.append(cupy.cuda.Stream(non_blocking=True))
                both = cupy.cuda.get_current_stream(), self.beside[rank]
                before, after = both if beside_waits else both[::-1]
                after.wait_event(before.record(cupy.cuda.Event(disable_timing=True)))
