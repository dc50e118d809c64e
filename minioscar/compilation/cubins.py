"""From a kernel's file to machine code: the text that NVRTC compiles, and the cubins that later processes find.

NVRTC compiles on as many threads as call it, and CuPy's binding lets other threads run meanwhile: what a model needs
and the cache on disk does not have is compiled side by side.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any

from ..errors import Failure

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
Program = tuple[str, tuple[str, ...]]  # a kernel's file and its macros


@cache
def source(name: str) -> str:
    """Text of a kernel with the package's headers inlined: one text says all that its machine code depends on."""
    seen: set[Path] = set()

    def inline(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        include = re.compile(r'^#include "([\w./]+)"$', re.MULTILINE)
        return include.sub(lambda match: inline(find(match[1], path.parent)), path.read_text())

    def find(name: str, folder: Path) -> Path:
        beside = (folder / name).resolve()
        return beside if beside.exists() else KERNELS / name

    return inline((KERNELS / name).resolve())


def architecture(file: str, capability: int) -> str:
    """What a kernel is compiled for. Files in sm90/ have instructions of compute capability 9.0 alone."""
    return f"sm_{capability}a" if Path(file).parent.name == "sm90" else f"sm_{capability}"


def options(program: Program, capability: int) -> tuple[str, ...]:
    """Of NVRTC, without the folders of headers."""
    file, defines = program
    target = f"--gpu-architecture={architecture(file, capability)}"
    return target, "-std=c++17", "-ftz=true", *(f"-D{d}" for d in defines)


def cubin(program: Program, capability: int, nvrtc: Any) -> Path:
    """Where its machine code is kept, beside what CuPy keeps; whether it is there is the caller's to find out.

    nvrtc: `cupy.cuda.nvrtc`, of which the version counts.
    """
    parts = source(program[0]), options(program, capability), nvrtc.getVersion()
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    return folder / f"minioscar-{hashlib.sha256(repr(parts).encode()).hexdigest()}.cubin"


def compiled(program: Program, capability: int, nvrtc: Any) -> Path:
    """The file of its machine code, which is compiled if it is not there. Raises Failure with the compiler's log."""
    path = cubin(program, capability, nvrtc)
    if path.exists():
        return path
    code = source(program[0])
    includes = [f"-I{folder}" for folder in headers(nvrtc.getVersion()[0])] if "#include <cuda_" in code else []
    handle = nvrtc.createProgram(code, program[0], (), ())
    try:
        nvrtc.compileProgram(handle, (*options(program, capability), *includes))
        machine_code = nvrtc.getCUBIN(handle)
    except nvrtc.NVRTCError as error:
        log = " ".join(nvrtc.getProgramLog(handle).split())[:2000]
        raise Failure(f"{program[0]} does not compile for this GPU ({error}): {log}") from None
    finally:
        nvrtc.destroyProgram(handle)
    draft = path.with_suffix(f".{os.getpid()}-{get_ident()}")  # several cards load side by side
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(machine_code)
        draft.replace(path)  # another process may be writing the same
    except OSError as error:
        way_out = "set CUPY_CACHE_DIR to a folder that can be written"
        raise Failure(f"{path.parent}: compiled kernels cannot be kept there ({error.strerror}); {way_out}") from None
    return path


def compile_all(programs: Iterable[Program], capability: int, nvrtc: Any, progress: bool) -> int:
    """Compiles those that are not on disk, side by side; returns how many. progress: counts them on stderr."""
    missing = [program for program in dict.fromkeys(programs) if not cubin(program, capability, nvrtc).exists()]
    if not missing:
        return 0
    from tqdm import tqdm

    missing.sort(key=lambda program: len(source(program[0])), reverse=True)  # by and large the slowest first
    desc = "compiling kernels, once for this GPU"
    bar = tqdm(total=len(missing), desc=desc, unit="kernel", leave=False, disable=not progress)
    with bar, ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as threads:
        running = [threads.submit(compiled, program, capability, nvrtc) for program in missing]
        try:
            for done in as_completed(running):
                done.result()
                bar.update()
        finally:
            threads.shutdown(cancel_futures=True)
    return len(missing)


@cache
def headers(major: int) -> tuple[Path, ...]:
    """The folders of CUDA's headers, cuda_fp16.h too: of the CUDA that CuPy takes, or of NVIDIA's wheels.

    Raises Failure where there are none.
    """
    import cupy

    roots = [Path(root) for root in (cupy.cuda.get_cuda_path(), os.environ.get("CONDA_PREFIX")) if root]
    folders = [folder for root in roots for folder in (root / "include", *sorted(root.glob("targets/*/include")))]
    folders += wheel_headers(major)
    if found := tuple(folder for folder in folders if (folder / "cuda_fp16.h").exists()):
        return found
    way_out = f"pip install 'minioscar[cuda{major}]' brings them, or set CUDA_PATH to a toolkit"
    raise Failure(f"CUDA's headers (cuda_fp16.h) are not found, which kernels are compiled with; {way_out}")


def wheel_headers(major: int) -> list[Path]:
    """Of nvidia-cuda-runtime 13 and newer, and of nvidia-cuda-runtime-cu12."""
    try:
        import nvidia
    except ImportError:
        return []
    names = f"cu{major}", "cuda_runtime"
    return [folder for root in nvidia.__path__ for name in names if (folder := Path(root) / name / "include").is_dir()]
