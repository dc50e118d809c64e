"""The operations of the model on two back ends: `reference` (NumPy) and `cuda` (CuPy and raw kernels)."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from threading import Thread
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .reference import Reference


DEVICES = ("auto", "cuda", "cpu")


def backend(device: str | None) -> Reference:
    """device: "cpu", "cuda", or "auto" (None: cuda where there is one). Raises UserError for others, and without a GPU."""
    from .reference import Reference

    device = "auto" if device is None else device
    if not isinstance(device, str) or device not in DEVICES:
        from ..sampling import shown  # not above: NumPy takes a while, and --help needs none

        names = f"{', '.join(DEVICES)} (CUDA_VISIBLE_DEVICES chooses the GPU)"
        raise UserError(f"device {shown(device)} is not known; choose from {names}")
    if os.environ.get("MINIOSCAR_BACKEND") == "simt":
        return _simulator()
    if device == "cpu":
        return Reference()
    reason = cuda_missing()
    if reason is None:
        from .cuda import Cuda

        return Cuda()
    if device == "cuda":
        raise UserError(f"--device cuda: {reason}; --device cpu works everywhere")
    return Reference()


def wake(device: str) -> None:
    """Has a context made on the GPU that `backend` will use, if it will, and returns at once: that takes 0.2 s, in which Python imports.

    What goes wrong with it is for `backend` to say.
    """
    if device != "cpu" and os.environ.get("MINIOSCAR_BACKEND") != "simt" and find_spec("cupy"):
        Thread(target=_make_context, name="wake").start()  # not a daemon: the driver does not like to be left in the middle of it


def _make_context() -> None:
    """The primary one of the first device, which CUDA's runtime, and so CuPy, takes too (CUDA driver API, Primary Context Management)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), 0):
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _simulator() -> Reference:
    """The CUDA back end on the simulator of the tests, for whoever works on kernels without a GPU (tests/simt/README.md)."""
    try:
        from tests.simt.backend import Simt
    except ImportError as error:
        raise UserError(f"MINIOSCAR_BACKEND=simt works in a checkout of minioscar only ({error}); unset it") from None
    return Simt()


def cuda_missing() -> str | None:
    """Why the CUDA back end cannot run here, in a few words; None where it can."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed (pip install 'minioscar[cuda13]')"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable GPU ({error})"
    return None
