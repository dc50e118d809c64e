"""A GPU that is asked for is woken while Python still imports."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from threading import Thread

from ..ops import ENTRY


def wake(device: str) -> None:
    """Has a context made on the GPU that `ops.backend` will use and returns at once: 0.2 s in which Python imports.

    `ops.backend` reports what fails.
    """
    if device != "cpu" and not os.environ.get(ENTRY) and find_spec("cupy"):
        Thread(target=_make_context, name="wake").start()  # not a daemon: it must not be stopped within the driver


def _make_context() -> None:
    """The primary one of the first device, which CuPy takes too (CUDA driver API, Primary Context Management)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), 0):
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
