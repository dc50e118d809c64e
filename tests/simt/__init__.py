"""Runs CUDA kernels on the CPU: g++ compiles the unchanged .cu file, fibers are its threads, and every access to
memory is checked.

`compile_kernel` gives a `Kernel`; calling it runs a grid and raises `Fault`, with the block, the thread, the array and
the source line, on an access out of bounds, a read of memory that nobody wrote or whose asynchronous copy is in
flight, a race, or a divergent barrier. Needs g++ (11 or later) and binutils; Linux on x86-64 or aarch64.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from minioscar.sm90.launch import TensorMap

HERE = Path(__file__).parent
BUILD = Path(os.environ.get("MINIOSCAR_SIMT_BUILD") or HERE / ".build")
MAX_DYNAMIC_SHARED = 227 * 1024
MAX_STATIC_SHARED = 48 * 1024
DYNAMIC = "simt_dynamic_shared"
_GAP = 64  # unused bytes after each shared variable: an index past its end is seen


class Fault(AssertionError):
    """What a kernel did wrong, in one line: kernel, block, thread, what, which array, where in the source."""


def missing() -> str | None:
    """Why kernels cannot be simulated here, or None."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"simulated kernels need Linux on x86-64 or aarch64, this is {platform.system()} on {platform.machine()}"
    absent = [tool for tool in ("g++", "readelf", "addr2line") if not shutil.which(tool)]
    return f"simulated kernels need {', '.join(absent)} (apt install g++)" if absent else None


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr.strip()[:4000]}")
    return done.stdout


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """nvcc merges a*b+c into one rounding, so do we where the CPU can; elsewhere results differ by that rounding."""
    fma = platform.machine() == "aarch64" or " fma " in Path("/proc/cpuinfo").read_text()
    return ("-ffp-contract=fast", *(["-mfma"] if fma and platform.machine() == "x86_64" else []))


def _built(key: str, suffix: str, make: Any) -> Path:
    """BUILD/key+suffix, made by make(path) if it is not there; whole or not at all, and by one process only."""
    path = BUILD / f"{key}{suffix}"
    if path.exists():
        return path
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / ".gitignore").write_text("*\n")
    with FileLock(BUILD / f"{key}.lock"):
        if not path.exists():
            draft = BUILD / f"{key}.draft{suffix}"
            make(draft)
            draft.rename(path)
    return path


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


@functools.cache
def _version(*suffixes: str) -> str:
    """Of the compiler, of this file, and of the files beside it with these suffixes."""
    sources = sorted(p for p in HERE.rglob("*") if p.suffix in suffixes and BUILD not in p.parents)
    own = [Path(__file__), *sources]
    return _digest(_run("g++", "--version"), _machine_flags(), *(p.read_text() for p in own))


class _Report(ctypes.Structure):
    _fields_ = [
        ("text", ctypes.c_char * 640),
        ("address", ctypes.c_uint64),
        ("pc", ctypes.c_uint64),
        ("other_pc", ctypes.c_uint64),
    ]


@functools.cache
def _runtime() -> ctypes.CDLL:
    sources = [HERE / name for name in ("scheduler.cpp", "memory.cpp", "copies.cpp", "warpgroup.cpp")]
    flags = ("-std=c++17", "-O3", *_machine_flags(), "-fPIC", "-shared", "-Wl,-Bsymbolic")
    path = _built(f"runtime-{_version('.h', '.cpp')}", ".so", lambda out: _run("g++", *flags, *sources, "-o", out))
    lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    lib.simt_alloc.restype = ctypes.c_void_p
    lib.simt_alloc.argtypes = [ctypes.c_size_t]
    lib.simt_mark_written.argtypes = lib.simt_first_unwritten.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.simt_first_unwritten.restype = ctypes.c_long
    lib.simt_is_global.argtypes = [ctypes.c_void_p]
    lib.simt_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    lib.simt_shared.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int]
    lib.simt_launch.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return lib


# ---- Global memory: NumPy arrays that live where the runtime can watch them.
_arrays: dict[int, tuple[int, str]] = {}  # address: bytes, what it is


def _free(address: int) -> None:
    size, _ = _arrays.pop(address)
    _runtime().simt_free(address, size, not _arrays)


def empty(shape: int | Sequence[int], dtype: Any) -> np.ndarray:
    """An array in simulated global memory that no kernel may read before it is written; its bytes are 0xFF (NaN)."""
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = int(np.prod(shape)) * dtype.itemsize
    address = _runtime().simt_alloc(max(size, 1))
    if not address:
        raise MemoryError("simulated global memory (1 GB) is full")
    memory = (ctypes.c_uint8 * max(size, 1)).from_address(address)
    _arrays[address] = size, f"{dtype}{list(shape)}"
    weakref.finalize(memory, _free, address).atexit = False
    return np.ndarray(shape, dtype, memory)


def array(values: Any) -> np.ndarray:
    """A copy of values in simulated global memory."""
    values = np.asarray(values)
    out = empty(values.shape, values.dtype)
    out[...] = values
    _runtime().simt_mark_written(out.ctypes.data, out.nbytes)
    return out


def tensor_map(given: TensorMap) -> np.void:
    """The TensorMap of include/sm90/wgmma.cuh; its matrix is from `array` or `empty`."""
    matrix = given.array
    fields = [("base", np.uint64), ("rows", np.uint64), ("row_bytes", np.uint64)]
    fields += [("box_rows", np.uint32), ("box_row_bytes", np.uint32), ("swizzled", np.uint64), ("rest", "V88")]
    sizes = len(matrix), matrix.nbytes // len(matrix), given.box_rows, given.row_bytes, given.swizzled
    return np.array((matrix.ctypes.data, *sizes, b""), np.dtype(fields))[()]


def numpy(device_array: np.ndarray, allow_unwritten: bool = False) -> np.ndarray:
    """A copy of an array in simulated global memory; raises Fault if kernels left parts of it unwritten."""
    if not device_array.flags.c_contiguous:
        raise ValueError("only contiguous arrays are read back")
    at = -1 if allow_unwritten else _runtime().simt_first_unwritten(device_array.ctypes.data, device_array.nbytes)
    if at >= 0:
        element = [int(i) for i in np.unravel_index(at // device_array.itemsize, device_array.shape)]
        raise Fault(f"element {element} of {device_array.dtype}{list(device_array.shape)} was never written")
    return device_array.copy()


def _location(address: int, args: Sequence[Any]) -> str:
    """The array of which an address is part, or which ends just before it, and the argument that leads there."""
    near = [start for start in _arrays if start <= address]
    if not near:
        return hex(address)
    start = max(near)
    size, what = _arrays[start]
    which = [
        f"argument {i}, "
        for i, a in enumerate(args)
        if isinstance(a, np.ndarray) and start <= a.ctypes.data < start + max(size, 1)
    ]
    return f"{which[0] if which else ''}{what} + {address - start} of {size} bytes"


# ---- Modules.
class Module:
    """A compiled .cu file with some of its kernels: module[name] is a Kernel."""

    def __init__(self, path: Path, source: Path, names: Sequence[str]):
        self.path, self.source = path, source
        self.lib = ctypes.CDLL(str(path))
        self.lib.simt_dynamic.restype = self.lib.simt_begin.restype = self.lib.simt_end.restype = ctypes.c_void_p
        symbols = re.findall(
            r"^ *\d+: ([0-9a-f]+) +(\d+|0x[0-9a-f]+) TLS .* (\S+)$", _run("readelf", "-sW", path), re.M
        )
        self.variables = sorted(
            {(int(offset, 16), int(size, 0), name) for offset, size, name in symbols if int(size, 0)}
        )
        self.kernels = {name: Kernel(self, i, name) for i, name in enumerate(names)}

    def __getitem__(self, name: str) -> Kernel:
        return self.kernels[name]

    def share(self, dynamic: int) -> int:
        """Tell the runtime which bytes of the module's thread-local segment are shared memory; returns where that
        segment begins."""
        at = next(offset for offset, _, name in self.variables if name == DYNAMIC)
        base = self.lib.simt_dynamic() - at
        statics = [(offset, size, name.startswith("_ZGV")) for offset, size, name in self.variables if offset != at]
        static = sum(size for _, size, guard in statics if not guard)
        if dynamic > MAX_DYNAMIC_SHARED or static > MAX_STATIC_SHARED:
            raise Fault(
                f"{self.source.name}: {dynamic} bytes of dynamic, {static} of static shared memory: more than a block "
                "can have"
            )
        usable = np.array([*statics, (at, dynamic, 0)], np.uint64)
        end = max(offset + size for offset, size, _ in self.variables)
        _runtime().simt_shared(base, end + _GAP, usable.ctypes.data, len(usable))
        return base

    def line(self, pc: int) -> str:
        """` at file:line` of the kernel's source for an address in its code."""
        offset = pc - self.lib.simt_begin()
        if not pc or not 0 <= offset < self.lib.simt_end() - self.lib.simt_begin():
            return ""
        frames = _run("addr2line", "-i", "-e", self.path, hex(offset - 1)).split("\n")
        ours = [f for f in frames if f and not f.startswith(str(HERE / "include")) and not f.startswith("?")]
        return f" at {Path(ours[0].split(' ')[0]).name}" if ours else ""


class Kernel:
    """Call it as kernel(grid, block, args, shared=dynamic bytes): args are arrays from `array` or `empty`, and NumPy
    scalars.

    Equal seeds give equal orders of threads and blocks. Without checks memory is not watched; a launch takes two
    thirds of the time.
    """

    def __init__(self, module: Module, number: int, name: str):
        self.module, self.name = module, name
        self.entry = ctypes.cast(getattr(module.lib, f"simt_entry_{number}"), ctypes.c_void_p)
        signature = getattr(module.lib, f"simt_signature_{number}")
        signature.restype = ctypes.c_char_p
        self.types = re.findall(r"\D\d+", signature().decode())

    def __call__(
        self, grid: Any, block: Any, args: Sequence[Any], shared: int = 0, seed: int = 0, checks: bool = True
    ) -> None:
        if len(args) != len(self.types):
            raise TypeError(f"{self.name} takes {len(self.types)} arguments, not {len(args)}")
        cells = [self._cell(i, kind, arg) for i, (kind, arg) in enumerate(zip(self.types, args, strict=True))]
        pointers = (ctypes.c_void_p * len(cells))(*[c.ctypes.data for c in cells])
        base = self.module.share(shared)
        three = [np.array((*((n,) if isinstance(n, int) else n), 1, 1)[:3], np.uint32) for n in (grid, block)]
        if three[1].prod() > 1024 or not three[1].prod() or not three[0].prod():
            raise ValueError(f"{self.name}: grid {grid}, block {block}")
        runtime, module = _runtime(), (self.module.lib.simt_begin(), self.module.lib.simt_end())
        if runtime.simt_launch(self.entry, pointers, *(n.ctypes.data for n in three), seed, checks, *module):
            raise Fault(self._explain(_Report.in_dll(runtime, "simt_report"), base, shared, args) + f" (seed {seed})")

    def _cell(self, i: int, kind: str, arg: Any) -> np.ndarray:
        if kind[0] == "P":
            if arg is None:
                return np.zeros(1, np.uint64)
            if isinstance(arg, np.ndarray):
                return np.array([arg.ctypes.data], np.uint64)
        elif (
            isinstance(arg, np.generic)
            and arg.dtype.itemsize == int(kind[1:])
            and (kind[0] == "V" or arg.dtype.kind == kind[0])
        ):
            return np.frombuffer(arg.tobytes(), np.uint8).copy()
        is_not = f"is {type(arg).__name__}, the kernel takes {kind} (P pointer, i/u/f/b number, V struct; bytes)"
        raise TypeError(f"argument {i} of {self.name} {is_not}")

    def _explain(self, report: _Report, base: int, dynamic: int, args: Sequence[Any]) -> str:
        text = report.text.decode(errors="replace")
        offset = report.address - base
        near = [
            v
            for v in self.module.variables
            if 0 <= offset and v[0] <= offset + _GAP // 2 and offset < v[0] + v[1] + _GAP
        ]
        if near:
            start, size, name = near[-1]
            if name == DYNAMIC:
                name, size = "dynamic shared memory", dynamic
            else:
                name = "shared " + re.sub(r"^_ZZ.*E\d*([A-Za-z]\w*?)(_\d+)?$", r"\1", name)
            where = f"{name} + {offset - start} of {size} bytes"
        else:
            where = _location(report.address, args)
        return (
            f"{self.name}{self.module.line(report.pc)}, " + text.replace("@", where) + self.module.line(report.other_pc)
        )


def _shared_definitions(assembly: str) -> str:
    """Give every shared variable a gap after it, and every `extern __shared__` array the one block of dynamic shared
    memory."""
    sections = re.split(r"^(?=[ \t]*\.(?:section|text|data|bss|popsection|previous)\b)", assembly, flags=re.M)
    for i, text in enumerate(sections):
        if ".tbss" in text[: text.find("\n")]:
            sections[i] = re.sub(r"\.zero\s+(\d+)", lambda size: f".zero\t{int(size[1]) + _GAP}", text)
    assembly = "".join(sections)
    uses = "\n".join(line for line in assembly.split("\n") if "tls" in line or "gottpoff" in line)
    used = set(re.findall(r"([\w.$]+)@(?:tlsgd|gottpoff|tlsdesc)", uses)) | set(
        re.findall(r":(?:tlsdesc|tlsgd):([\w.$]+)", uses)
    )
    outside = sorted(name for name in used if not re.search(rf"^{re.escape(name)}:", assembly, re.M))
    labels = [*(name for name in outside if name != DYNAMIC), DYNAMIC]
    tail = ['.section .tbss.simt_dynamic,"awT",%nobits', ".p2align 10"]
    for name in labels:
        tail += [f".globl {name}", f".hidden {name}", f".type {name}, %object", f"{name}:"]
    return assembly + "\n".join(
        ["", *tail, f".size {DYNAMIC}, {MAX_DYNAMIC_SHARED}", f".zero {MAX_DYNAMIC_SHARED + _GAP}", ""]
    )


def _flags(arch: int) -> list[str]:
    flags = ["-std=c++17", "-O1", "-g1", "-gdwarf-4", "-fPIC", "-w", "-fno-strict-aliasing", "-fsigned-char"]
    flags += _machine_flags()
    flags += ["-fno-extern-tls-init", "-fno-section-anchors", "-fno-gnu-unique"]  # unique: one instance for all modules
    flags += ["-fno-tree-loop-im"]  # would read ahead of conditions
    # A sixth of the time of a compilation, for code that is as fast: calls of the checks are what takes time.
    flags += ["-fira-region=one", "-fno-ira-share-save-slots", "-fno-move-loop-invariants", "-fno-ivopts"]
    flags += ["-fno-tree-scev-cprop", "-fno-forward-propagate", "-fno-dse"]
    flags += ["-fno-var-tracking"]  # a fault wants lines, not variables; a fifth of the time of a compilation
    flags += ["-fno-exceptions", "-fno-asynchronous-unwind-tables", "--param", "tsan-instrument-func-entry-exit=0"]
    flags += ["-U_GNU_SOURCE", "-D_DEFAULT_SOURCE"]  # a smaller <math.h>
    flags += ["-fsanitize=thread,alignment,bounds,shift-exponent"]
    return [*flags, "-I", str(HERE / "include"), f"-D__CUDA_ARCH__={arch}0"]


def _headers(arch: int) -> Path:
    """Included before every source; g++ reads the precompiled header (.gch) beside it instead."""
    key = f"headers-{arch}-{_version('.h', '.cuh')}"
    header = BUILD / f"{key}.h"

    def make(out: Path) -> None:
        header.write_text('#include "simt.h"\n#include "device.cuh"\n#include "sm90/wgmma.cuh"\n')
        _run("g++", *_flags(arch), "-x", "c++-header", header, "-o", out)

    _built(key, ".h.gch", make)
    return header


@functools.cache
def _module(source: Path, names: tuple[str, ...], defines: tuple[str, ...], arch: int, key: str) -> Module:
    wrapper = [  # the defines come after simt's own headers, whose names they might redefine
        *(f"#define {d.replace('=', ' ', 1) if '=' in d else d + ' 1'}" for d in defines),
        f'#include "{source}"',
        'extern "C" {',
        f"extern thread_local char {DYNAMIC}[];",
        '__attribute__((visibility("hidden"))) extern char __ehdr_start[], _end[];',
        f"void* simt_dynamic() {{ return {DYNAMIC}; }}",
        "void* simt_begin() { return __ehdr_start; }",
        "void* simt_end() { return _end; }",
    ]
    for i, name in enumerate(names):
        wrapper += [f"void simt_entry_{i}(void** v) {{ simt::call(&{name}, v); }}"]
        wrapper += [f"const char* simt_signature_{i}() {{ return simt::signature(&{name}); }}"]
    wrapper += ["}", ""]

    def make(out: Path) -> None:
        code = out.with_suffix(".cpp")
        code.write_text("\n".join(wrapper))
        assembly = out.with_suffix(".s")
        _run("g++", *_flags(arch), "-include", _headers(arch), "-S", code, "-o", assembly)
        assembly.write_text(_shared_definitions(assembly.read_text()))
        # The rest comes with the runtime
        _run("g++", "-shared", "-nodefaultlibs", "-Wl,-Bsymbolic", assembly, "-lm", "-o", out)
        code.unlink()
        assembly.unlink()

    _runtime()
    return Module(_built(f"{source.stem}-{key}", ".so", make), source, names)


def compile_module(source: str | Path, names: Sequence[str], defines: Sequence[str] = (), arch: int = 80) -> Module:
    """The kernels `names` (extern "C" names, or template instantiations as C++ writes them) of a .cu file; defines are
    NAME=VALUE."""
    source = Path(source).resolve()
    folder = source.parent.parent if source.parent.name == "sm90" else source.parent
    near = sorted(p for p in folder.rglob("*") if p.suffix in (".cuh", ".h"))
    texts = [p.read_text() for p in (source, *near)]
    key = _digest(_version(".h", ".cuh"), source, *texts, names, defines, arch)
    return _module(source, tuple(names), tuple(defines), arch, key)


@functools.cache  # sources stay what they are while a process runs, and launches are many
def compile_kernel(source: str | Path, name: str, defines: tuple[str, ...] = (), arch: int = 80) -> Kernel:
    """One kernel of a .cu file, compiled with all its kernels that are no templates: other calls want those."""
    kernels = re.findall(
        r'^extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(', Path(source).read_text(), re.M
    )
    return compile_module(source, kernels if name in kernels else [name], defines, arch)[name]
