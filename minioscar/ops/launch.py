"""From a `Launch` to the card: the compiled kernel, and the launch itself.

What newer cards do beside that, launches that overlap and tensor maps, is in sm90/launch.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ..compilation.cubins import compiled
from ..machine import Card
from ..sm90.launch import TensorMap, launch_overlapping


@dataclass(frozen=True)
class Launch:
    source: str
    name: str
    defines: tuple[str, ...]
    grid: tuple[int, ...]
    block: int
    args: tuple[Any, ...]
    shared: int = 0


@cache
def kernel(file: str, name: str, defines: tuple[str, ...], device: int = 0) -> Any:
    """The compiled kernel, allowed all the dynamic shared memory that a block may have. device: the current one."""
    import cupy
    from cupy.cuda import nvrtc

    path = compiled((file, defines), Card.current().capability, nvrtc)
    function = cupy.RawModule(path=str(path)).get_function(name)
    limit = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    function.max_dynamic_shared_size_bytes = limit - function.shared_size_bytes
    return function


@dataclass(frozen=True)
class Address:
    """An array of a recorded launch: where it lies and how large it is, without keeping it."""

    ptr: int
    shape: tuple[int, ...]
    nbytes: int

    @property
    def data(self) -> Address:
        return self

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Recording:
    """Launches that were run once and can be run again, in order, on the same arrays.

    What is allocated while it is open comes from a pool of its own, which reuses memory within a step, in every replay
    alike. A launch has addresses of such arrays only, and references to others.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.own: set[int] = set()  # addresses of what came from the pool
        self.pool: Any = None

    @contextmanager
    def open(self) -> Iterator[Recording]:
        import cupy

        self.pool = cupy.cuda.MemoryPool()

        def allocate(size: int) -> Any:
            pointer = self.pool.malloc(size)
            self.own.add(pointer.mem.ptr)
            return pointer

        with cupy.cuda.using_allocator(allocate):
            yield self

    def append(self, launch: Launch) -> None:
        self.launches.append(replace(launch, args=tuple(map(self._released, launch.args))))

    def _released(self, a: Any) -> Any:
        if isinstance(a, TensorMap):
            return replace(a, array=self._released(a.array))
        if a is None or isinstance(a, np.generic) or a.data.mem.ptr not in self.own:
            return a
        return Address(a.data.ptr, a.shape, a.nbytes)


def run(launch: Launch) -> None:
    """On CuPy's current device and stream. Raises cupy's CUDADriverError where the card refuses it."""
    import cupy

    function = kernel(launch.source, launch.name, launch.defines, cupy.cuda.runtime.getDevice())
    if Card.current().capability >= 90:
        launch_overlapping(function.kernel.ptr, launch)
        return
    args = (np.uintp(0) if a is None else np.uintp(a.ptr) if isinstance(a, Address) else a for a in launch.args)
    function(launch.grid, (launch.block,), tuple(args), shared_mem=launch.shared)
