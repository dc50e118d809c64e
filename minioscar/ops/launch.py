"""From a `Launch` to the card: the compiled kernel, and the launch itself.

From compute capability 9.0 on a launch may begin while the one before it still runs ("programmatic dependent launch",
CUDA programming guide): a kernel waits by itself, in `wait_for_previous` of device.cuh, before it touches what another
wrote. That saves a microsecond a launch. CuPy cannot ask for it, so the driver is called directly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..compilation.cubins import compiled

Array = Any
# Compute capability -> KiB of shared memory that a block may use.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
BFLOAT16, NOT_INTERLEAVED, SWIZZLE_128B, L2_256B, ZEROS = 9, 0, 3, 3, 0  # CUtensorMapDataType and so on


@dataclass(frozen=True)
class Card:
    """What plans are made for."""

    multiprocessors: int
    capability: int  # 90: compute capability 9.0

    @property
    def max_shared_bytes(self) -> int:
        """Dynamic shared memory that a block may use; one KiB is left for what a kernel declares statically."""
        return SHARED_KIB.get(self.capability, 99) * 1024 - 1024

    @classmethod
    @cache
    def current(cls) -> Card:
        """CuPy's current device."""
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        return cls(properties["multiProcessorCount"], 10 * properties["major"] + properties["minor"])


@dataclass(frozen=True)
class Launch:
    source: str
    name: str
    defines: tuple[str, ...]
    grid: tuple[int, ...]
    block: int
    args: tuple[Any, ...]
    shared: int = 0


@dataclass(frozen=True)
class TensorMap:
    """An argument: a matrix of 16-bit numbers that the copy engine reads in boxes of 64 columns (tma_load_2d)."""

    array: Array
    box_rows: int


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
        _launch_overlapping(function.kernel.ptr, launch)
        return
    args = (np.uintp(0) if a is None else np.uintp(a.ptr) if isinstance(a, Address) else a for a in launch.args)
    function(launch.grid, (launch.block,), tuple(args), shared_mem=launch.shared)


class _Attribute(ctypes.Structure):  # CUlaunchAttribute of cuda.h: the value is a union of 64 bytes
    _fields_ = [
        ("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60),
    ]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("attribute_count", ctypes.c_uint),
    ]


@cache
def _driver(name: str) -> Any:
    function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    if name == "cuLaunchKernelEx":
        function.argtypes = [ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return function


EIGHT_BYTES = ctypes.c_uint64 * 64  # an argument each; a short prompt waits for the host in hundreds of launches
OVERLAPPING = ctypes.pointer(_Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1))


def _launch_overlapping(function: int, launch: Launch) -> None:
    import cupy

    values = EIGHT_BYTES(*[
        int(a) & 0xFFFFFFFF if type(a) is np.int32 else 0 if a is None or type(a) is TensorMap
        else int.from_bytes(a.tobytes(), "little") if isinstance(a, np.generic) else a.data.ptr for a in launch.args
    ])  # fmt: skip
    pointers = EIGHT_BYTES(*range(first := ctypes.addressof(values), first + 8 * len(launch.args), 8))
    for i, a in enumerate(launch.args):
        if type(a) is TensorMap:
            pointers[i] = _tensor_map(a.array.data.ptr, *a.array.shape, a.box_rows)[1]
    x, y, z = (*launch.grid, 1, 1)[:3]
    stream = cupy.cuda.get_current_stream().ptr
    config = _Config(int(x), int(y), int(z), launch.block, 1, 1, launch.shared, stream, OVERLAPPING, 1)
    if code := _driver("cuLaunchKernelEx")(config, function, pointers, None):
        raise cupy.cuda.driver.CUDADriverError(code)


@lru_cache(4096)
def _tensor_map(address: int, rows: int, columns: int, box_rows: int) -> tuple[np.ndarray, int]:
    """A CUtensorMap, at a multiple of 64 bytes (CUDA driver API, cuTensorMapEncodeTiled), and where it is."""
    import cupy

    memory = np.zeros(192, np.uint8)
    tensor_map = memory[-memory.ctypes.data % 64 :][:128]
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * columns)
    box, steps = (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    matrix = ctypes.c_void_p(tensor_map.ctypes.data), BFLOAT16, 2, ctypes.c_void_p(address), sizes, strides, box, steps
    if code := _driver("cuTensorMapEncodeTiled")(*matrix, NOT_INTERLEAVED, SWIZZLE_128B, L2_256B, ZEROS):
        raise cupy.cuda.driver.CUDADriverError(code)
    return tensor_map, tensor_map.ctypes.data
