"""Launches from compute capability 9.0 on, which overlap, and tensor maps among their arguments.

A launch may begin while the one before it still runs ("programmatic dependent launch", CUDA programming guide): a
kernel waits by itself, in `wait_for_previous` of device.cuh, before it touches what another wrote. That saves a
microsecond a launch. CuPy cannot ask for it, so the driver is called directly.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

Array = Any
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
UINT64, BFLOAT16, NOT_INTERLEAVED, L2_256B, ZEROS = 4, 9, 0, 3, 0  # CUtensorMapDataType and so on
NOT_SWIZZLED, SWIZZLE_128B = 0, 3


@dataclass(frozen=True)
class TensorMap:
    """An argument: a matrix that the copy engine reads in boxes (tma_load_2d): of 16-bit numbers, 64 columns at a time
    and swizzled, or of any that make rows of multiples of 16 bytes."""

    array: Array  # [rows, ...]
    box_rows: int
    row_bytes: int = 128  # of a box
    swizzled: bool = True  # else columns are addressed by 8 bytes, not by numbers


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


def launch_overlapping(function: int, launch: Any) -> None:
    """launch: an `ops.launch.Launch` of this function. Raises cupy's CUDADriverError where the card refuses it."""
    import cupy

    values = EIGHT_BYTES(*[
        int(a) & 0xFFFFFFFF if type(a) is np.int32 else 0 if a is None or type(a) is TensorMap
        else int.from_bytes(a.tobytes(), "little") if isinstance(a, np.generic) else a.data.ptr for a in launch.args
    ])  # fmt: skip
    pointers = EIGHT_BYTES(*range(first := ctypes.addressof(values), first + 8 * len(launch.args), 8))
    for i, a in enumerate(launch.args):
        if type(a) is TensorMap:
            pointers[i] = _tensor_map(
                a.array.data.ptr, a.array.shape[0], a.array.nbytes, a.box_rows, a.row_bytes, a.swizzled
            )[1]
    x, y, z = (*launch.grid, 1, 1)[:3]
    stream = cupy.cuda.get_current_stream().ptr
    config = _Config(int(x), int(y), int(z), launch.block, 1, 1, launch.shared, stream, OVERLAPPING, 1)
    if code := _driver("cuLaunchKernelEx")(config, function, pointers, None):
        raise cupy.cuda.driver.CUDADriverError(code)


@lru_cache(4096)
def _tensor_map(
    address: int, rows: int, size: int, box_rows: int, row_bytes: int, swizzled: bool
) -> tuple[np.ndarray, int]:
    """A CUtensorMap, at a multiple of 64 bytes (CUDA driver API, cuTensorMapEncodeTiled), and where it is. size: bytes
    of all rows."""
    import cupy

    (kind, unit), swizzle = ((BFLOAT16, 2), SWIZZLE_128B) if swizzled else ((UINT64, 8), NOT_SWIZZLED)
    memory = np.zeros(192, np.uint8)
    tensor_map = memory[-memory.ctypes.data % 64 :][:128]
    sizes, strides = (ctypes.c_uint64 * 2)(size // rows // unit, rows), (ctypes.c_uint64 * 1)(size // rows)
    box, steps = (ctypes.c_uint32 * 2)(row_bytes // unit, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    matrix = ctypes.c_void_p(tensor_map.ctypes.data), kind, 2, ctypes.c_void_p(address), sizes, strides, box, steps
    if code := _driver("cuTensorMapEncodeTiled")(*matrix, NOT_INTERLEAVED, swizzle, L2_256B, ZEROS):
        raise cupy.cuda.driver.CUDADriverError(code)
    return tensor_map, tensor_map.ctypes.data
