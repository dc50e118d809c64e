"""Every kernel compiles for every supported card without a GPU, in its budget of registers and without spills.

The budget is what lets as many blocks run as raw.plan counts on: 65,536 registers a multiprocessor over the threads of a block.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from minioscar.ops import raw
from minioscar.oscar import SCHEMES

ARCHES = ("80", "86", "89", "90a", "100", "120")
MULTIPROCESSORS = 132
NVCC = shutil.which("nvcc")


def attention(kv: str, dim: int, together: int, capability: int) -> raw.Launch:
    heads, scheme = raw.Heads(2 * together, 2, dim), SCHEMES[kv]
    plan = raw.plan(heads, scheme, 1, MULTIPROCESSORS, capability)
    cache = {name: np.empty((1, 1, 1, 1), np.uint8) for name in ("keys", "values", "pages", "norms")}
    out = np.empty(1, np.uint16)
    return raw.decode_attention(heads, scheme, plan, out, cache, np.empty(1, np.int32), None, out, None, None, None)


def launches(capability: int, everything: bool) -> dict[str, tuple[str, tuple[str, ...], int]]:
    """Label -> file, macros, threads of a block."""
    wanted = [("int2", 128, 4), ("bf16", 128, 4)]
    if everything:
        wanted += [("oscar", 128, 4), ("int2-compact", 128, 8), ("int4", 128, 4), ("kivi", 96, 1), ("int2", 64, 3), ("int2", 256, 7)]
        wanted += [("bf16", 256, 8)]
    found = {}
    for kv, dim, together in wanted:
        launch = attention(kv, dim, together, capability)
        found[f"{launch.name} {kv} d{dim} {together}"] = launch.source, launch.defines, launch.block
    for kv, dim in [("int2", 128)] + [("int4", 64), ("oscar", 256)] * everything:
        found[f"pack {kv} d{dim}"] = "pack.cu", raw.layout_defines(SCHEMES[kv], dim), dim
    for dim in (128, *((64, 80, 96, 256) if everything else ())):
        found[f"rotate_scale d{dim}"] = "rotate_scale.cu", (f"HEAD_DIM={dim}",), 256
    return found


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed; the kernels are compiled by NVRTC on the card")
@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_compile_within_their_registers_and_without_spills(arch: str, tmp_path: Path):
    capability = int(arch.rstrip("a"))
    for label, (file, defines, threads) in launches(capability, everything=arch == "90a").items():
        source = tmp_path / file
        source.write_text(raw.source(file))
        options = ["-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-Xptxas", "-v", *(f"-D{d}" for d in defines)]
        done = subprocess.run([NVCC, *options, source, "-o", tmp_path / "out.cubin"], capture_output=True, text=True)
        assert done.returncode == 0, f"{label} for sm_{arch}: {done.stderr[-2000:]}"
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
        print(f"sm_{arch} {label}: {max(registers)} registers, {sum(spills)} bytes spilled, {threads} threads")
        assert registers and not any(spills), f"{label} for sm_{arch} spills: {done.stderr[-800:]}"
        assert max(registers) * threads <= 65536, f"{label} for sm_{arch}: {max(registers)} registers of {threads} threads do not fit"
