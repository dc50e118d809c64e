"""NCCL of the cards that cards.py plays: sums and gathers over all of them, which the cards come to in their order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from minioscar.cache import BF16

from . import _runtime

if TYPE_CHECKING:
    from .cards import Cards

TYPES = {7: np.dtype(np.float32), 9: BF16}  # ncclDataType_t of nccl.h


class Nccl:
    """What stands for `cupy.cuda.nccl`. Every call is within a group, in which each card has one."""

    available, NcclError = True, type("NcclError", (RuntimeError,), {})

    def __init__(self, cards: Cards):
        self.cards, self.group = cards, None
        self.NcclCommunicator = SimpleNamespace(initAll=self._init_all)
        self.is_connected = False

    def _init_all(self, devices: list[int]) -> list[Communicator]:
        assert devices == list(range(len(self.cards.queues))) and not self.is_connected
        assert not any(stream.is_capturing() for stream in self.cards.stream_at.values()), "connected in a capture"
        self.is_connected = True
        return [Communicator(self, card) for card in devices]

    def groupStart(self) -> None:  # noqa: N802
        assert self.group is None
        self.group = []

    def groupEnd(self) -> None:  # noqa: N802
        from .cards import Work

        calls, self.group, sent = self.group, None, {}
        assert [card for card, *_ in calls] == list(range(len(self.cards.queues)))
        for card, meeting, stream, send, receive in calls:

            def run(phase: int, card: int = card, send: Any = send, receive: Any = receive) -> None:
                if phase == 1:
                    sent[card] = np.array(send())
                elif phase == 4:
                    receive([sent[other] for other in range(len(calls))])

            stream.enqueue(card, Work(run, meeting))


class Communicator:
    def __init__(self, nccl: Nccl, card: int):
        self.nccl, self.card = nccl, card

    def allReduce(self, send: int, receive: int, count: int, kind: int, op: int, stream: int) -> None:  # noqa: N802
        """In the order of the cards, rounded after each, as a ring of two does."""

        def add(parts: list[np.ndarray]) -> np.ndarray:
            total = parts[0]
            for part in parts[1:]:
                total = (total.astype(np.float32) + part.astype(np.float32)).astype(part.dtype)
            return total

        assert op == 0  # ncclSum
        self._call("allReduce", add, send, receive, count, count, kind, stream)

    def allGather(self, send: int, receive: int, count: int, kind: int, stream: int) -> None:  # noqa: N802
        size = count * len(self.nccl.cards.queues)
        self._call("allGather", np.concatenate, send, receive, count, size, kind, stream)

    def _call(
        self, name: str, made: Any, send: int, receive: int, count: int, size: int, kind: int, stream: int
    ) -> None:
        cards, dtype = self.nccl.cards, TYPES[kind]

        def sent() -> np.ndarray:
            return cards.bytes_at(self.card, send, count * dtype.itemsize).view(dtype)

        def receives(parts: list[np.ndarray]) -> None:
            cards.bytes_at(self.card, receive, size * dtype.itemsize).view(dtype)[...] = made(parts)
            _runtime().simt_mark_written(receive, size * dtype.itemsize)

        cards.check(self.card)
        self.nccl.group.append((self.card, (name, count, kind), cards.stream(stream), sent, receives))
