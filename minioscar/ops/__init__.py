"""The operations of the model on two back ends: `reference` (NumPy) and `cuda` (CuPy and raw kernels)."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import UserError, shown

if TYPE_CHECKING:
    from .reference import Reference


DEVICES = ("auto", "cuda", "cpu")
ENTRY = "MINIOSCAR_BACKEND"  # an environment variable: a back end of the tests instead of these


def backend(device: str | None) -> Reference:
    """device: "cpu", "cuda", or "auto" (None: cuda where there is one). UserError for others, and without a GPU."""
    from .reference import Reference

    device = "auto" if device is None else device
    if not isinstance(device, str) or device not in DEVICES:
        names = f"{', '.join(DEVICES)} (CUDA_VISIBLE_DEVICES chooses the GPU)"
        raise UserError(f"device {shown(device)} is not known; choose from {names}")
    if entry := os.environ.get(ENTRY):
        return _named(entry)
    if device == "cpu":
        return Reference()
    reason = cuda_missing()
    if reason is None:
        from .cuda import Cuda

        return Cuda()
    if device == "cuda":
        raise UserError(f"--device cuda: {reason}; --device cpu works everywhere")
    return Reference()


def _named(entry: str) -> Reference:
    """module:Class of another back end, such as the tests' simulator (tests/simt/README.md). UserError without one."""
    module, _, name = entry.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{ENTRY}={entry}: no back end of this name, module:Class ({error}); unset it") from None
    return kind()


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
