"""The operations of the model on two back ends: `reference` (NumPy) and `cuda` (CuPy and raw kernels)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .reference import Reference


def backend(device: str) -> Reference:
    """device: "cpu", "cuda", or "auto" (cuda where there is one). Raises UserError for "cuda" without one."""
    from .reference import Reference

    if device == "cpu":
        return Reference()
    reason = cuda_missing()
    if reason is None:
        from .cuda import Cuda

        return Cuda()
    if device == "cuda":
        raise UserError(f"--device cuda: {reason}; --device cpu works everywhere")
    return Reference()


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
