"""Which replica a prompt goes to: one that holds its beginning, unless too much waits there.

A replica is worth so many blocks of the prompt as it need not read, less ROW blocks for each answer that runs there.
Where nobody holds anything, the first block chooses: replicas stand on a ring, each at POINTS places, and the prompt
goes to the first one behind its own place (consistent hashing: Karger et al., STOC 1997) that has no more than SKEW
times the mean of running answers (bounded loads: Mirrokni et al., arXiv 1608.01350). So doors that know nothing of one
another send equal beginnings to the same replica, and a replica that comes or goes moves only its own share.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b

from .names import sizes

ROW = 4  # blocks: what one more running answer costs, in reading of prompts
SKEW = 1.25
POINTS = 64
CHOICES = 3  # replicas that are named for a prompt, the best first


class Places:
    """slots: answers that run at a time in one replica. running: how many a replica has, as far as is known."""

    def __init__(self, slots: int, running: Callable[[str], int]):
        self.slots, self.running = slots, running
        self.replicas: tuple[str, ...] = ()
        self.ring: list[tuple[int, str]] = []
        self.holders: dict[int, Counter[str]] = {}  # name -> who has it, and by how many entries we know
        self.reported: dict[str, Sequence[int]] = {}
        self.sent: dict[str, deque[tuple[float, Sequence[int]]]] = {}
        self.asked = 0

    def set(self, replicas: Sequence[str]) -> None:
        """These are all there are."""
        if set(replicas) == set(self.replicas):
            return
        for gone in set(self.replicas) - set(replicas):
            self.remove(gone)
        self.replicas = tuple(sorted(replicas))
        for replica in self.replicas:
            self.sent.setdefault(replica, deque())
        self.ring = sorted((place(f"{replica}:{i}"), replica) for replica in self.replicas for i in range(POINTS))

    def remove(self, replica: str) -> None:
        """It has died."""
        self._forget(replica, self.reported.pop(replica, ()))
        for _, names in self.sent.pop(replica, ()):
            self._forget(replica, names)
        self.replicas = tuple(one for one in self.replicas if one != replica)
        self.ring = [point for point in self.ring if point[1] != replica]

    def report(self, replica: str, names: Sequence[int], since: float) -> None:
        """It holds these; of what was sent to it before `since`, the report has what is left."""
        if replica not in self.sent:
            return
        self._forget(replica, self.reported.get(replica, ()))
        self.reported[replica] = names
        self._learn(replica, names)
        while self.sent[replica] and self.sent[replica][0][0] < since:
            self._forget(replica, self.sent[replica].popleft()[1])

    def send(self, replica: str, names: Sequence[int], now: float) -> None:
        """A prompt goes there: it will hold its beginning, until as many others came as it has slots. One that goes on
        from another takes its place."""
        sent = self.sent.get(replica)
        if sent is None or not names:
            return
        self._learn(replica, names)
        before = [one for one in sent if one[1] == names[: len(one[1])]]
        for one in before:
            sent.remove(one)
        sent.append((now, names))
        if len(sent) > self.slots:
            before.append(sent.popleft())
        for _, gone in before:
            self._forget(replica, gone)

    def _learn(self, replica: str, names: Sequence[int]) -> None:
        for name in names:
            self.holders.setdefault(name, Counter())[replica] += 1

    def _forget(self, replica: str, names: Sequence[int]) -> None:
        for name in names:
            found = self.holders[name]
            found[replica] -= 1
            if not found[replica]:
                del found[replica]
            if not found:
                del self.holders[name]

    def held(self, names: Sequence[int]) -> dict[str, int]:
        """Blocks of the prompt that replicas have, of those that have any."""
        found: dict[str, int] = {}
        for name, size in zip(reversed(names), reversed(sizes_of(names)), strict=True):
            for replica in self.holders.get(name, ()):
                found.setdefault(replica, size)
        return found

    def choose(self, names: Sequence[int], mean: float) -> list[str]:
        """Up to CHOICES replicas, the best first. mean: answers that run in a replica."""
        self.asked += 1
        near = self._along(names[0] if names else place(str(self.asked)), SKEW * mean + 1)
        held = self.held(names)
        if names and not held:
            return near
        blocks = sizes_of(names)[-1] if names else 0

        def cost(replica: str) -> tuple[bool, int]:
            runs = self.running(replica)
            return runs >= self.slots, blocks - held.get(replica, 0) + ROW * runs

        return sorted(dict.fromkeys([*held, *near]), key=cost)[:CHOICES]

    def _along(self, start: int, bound: float) -> list[str]:
        """The first CHOICES replicas of the ring that have room, and if these are fewer, those that have none."""
        found, full = dict[str, None](), dict[str, None]()
        for replica in self._behind(start):
            (found if self.running(replica) <= bound else full)[replica] = None
            if len(found) == CHOICES or len(found) + len(full) == len(self.replicas):
                break
        return [*found, *full][:CHOICES]

    def _behind(self, start: int) -> Iterator[str]:
        at = bisect(self.ring, (start, ""))
        for i in range(len(self.ring)):
            yield self.ring[(at + i) % len(self.ring)][1]


def place(text: str) -> int:
    """On the ring, from 0 to 2^64 - 1, as names are."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def sizes_of(names: Sequence[int]) -> list[int]:
    """Blocks of the beginnings that have these names."""
    found = sizes(len(names))
    while len(found) < len(names):
        found = sizes(2 * found[-1])
    return found[: len(names)]
