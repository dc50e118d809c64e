"""Which of minioscar's CUDA extras goes with this machine's NVIDIA driver: `cuda12`, `cuda13`, or an empty line.

The Makefile asks before anything is installed, so this needs Python alone. It asks the driver itself, the library that
CuPy loads: where there is none, or no GPU, nothing is said; one that is too old or does not work has its reason on
stderr.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

SIZES = Path(__file__).resolve().parent.parent / "docs" / "results" / "installed-size.json"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def extra() -> str:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    version, devices = ctypes.c_int(), ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDriverGetVersion(
        ctypes.byref(version)
    ) or driver.cuDeviceGetCount(ctypes.byref(devices))
    if code == NO_DEVICE or not code and not devices.value:
        return ""
    if code:
        return without(f"the NVIDIA driver does not work (CUDA error {code})")
    major, minor = version.value // 1000, version.value % 1000 // 10
    if major < 12:
        return without(f"the NVIDIA driver has CUDA {major}.{minor}, and CuPy needs 12 or newer; update the driver")
    return f"cuda{min(major, 13)}"


def without(reason: str) -> str:
    print(f"minioscar: {reason}; going on without the GPU", file=sys.stderr)
    return ""


def announcement(name: str) -> str:
    """What is about to be installed, and how large it is: installed, which is more than what is fetched."""
    sizes = {row["command"]: row["mb"] for row in json.loads(SIZES.read_text())["rows"]}
    more = sizes[f"pip install '.[{name}]'"] - sizes["pip install ."]
    what = f"CuPy, cuBLAS and NVRTC (extra {name}, {more:,} MB on disk)"
    return f"minioscar: there is an NVIDIA GPU: installing {what} to run on it; make demo DEVICE=cpu does without"


if __name__ == "__main__":
    print(announcement(sys.argv[1]) if len(sys.argv) > 1 else extra())
