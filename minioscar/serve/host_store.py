"""What left the card and may come back: the arrays of a block, or of a beginning's sinks, in pinned memory of the host.

The memory is allocated once. Copies run on the current stream in the order in which they are asked for, so nobody waits
for them: what a slot holds is overwritten by a later copy only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..backend import Backend
from ..parallel.ranks import Ranks

Array = Any


class HostStore:
    """Room for `size` entries, each of arrays like those in `like`, by keys; the one unused for longest makes room."""

    def __init__(self, ops: Backend, like: Mapping[str, Array], size: int):
        self.xp, self.free = ops.xp, list(range(size))
        self.arrays = [{name: ops.on_host(x) for name, x in like.items()} for _ in range(size)]
        self.slots: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.arrays for array in arrays.values())

    def keep(self, key: bytes, arrays: Mapping[str, Array]) -> None:
        """Copies arrays of the card, unless there are some with this key: these are the same."""
        if key not in self.slots:
            if not (self.free or self.slots):
                return
            slot = self.free.pop() if self.free else self.slots.popitem(last=False)[1]
            for name, x in arrays.items():
                self._to_host(x, self.arrays[slot][name])
            self.slots[key] = slot
        self.slots.move_to_end(key)

    @contextmanager
    def held(self, key: bytes) -> Iterator[dict[str, Array]]:
        """Copies on the back end of the arrays with this key, which nothing replaces meanwhile."""
        slot = self.slots.pop(key)
        try:
            yield {name: self._from_host(x) for name, x in self.arrays[slot].items()}
        finally:
            self.slots[key] = slot

    def _to_host(self, x: Array, out: np.ndarray | Ranks) -> None:
        if isinstance(x, Ranks):  # each card's
            x.map(self._to_host, out)
        elif isinstance(x, np.ndarray):
            out[...] = x
        else:  # a CuPy array: what is allocated here is reused behind the copy only
            import cupy

            cupy.ascontiguousarray(x).get(out=out, blocking=False)

    def _from_host(self, x: np.ndarray | Ranks) -> Array:
        there = self.xp.empty(x.shape, x.dtype)
        self._set(there, x)
        return there

    def _set(self, there: Array, x: np.ndarray | Ranks) -> None:
        if isinstance(there, Ranks):
            there.map(self._set, x)
        elif isinstance(there, np.ndarray):
            there[...] = x
        else:
            import cupy

            there.set(x, stream=cupy.cuda.get_current_stream())
