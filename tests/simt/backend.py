"""The CUDA back end on the simulator: ops/cuda.py as it is, its arrays in simulated global memory, its launches run by
`simt`.

`MINIOSCAR_BACKEND=tests.simt.backend:Simt python -m minioscar generate ...` runs a model through it, slowly, to show
that the path works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from minioscar.cache import LayerCache, NewTokens
from minioscar.compilation.cubins import KERNELS
from minioscar.config import Config
from minioscar.cublas import ONE
from minioscar.ops.cuda import Cuda
from minioscar.ops.decode import Queue, StepBatch
from minioscar.ops.launch import Card, Launch, Recording, TensorMap
from minioscar.ops.linear import Products
from minioscar.ops.paged import KernelCache
from minioscar.ops.reference import Reference
from minioscar.parallel.backend import Split
from minioscar.parallel.collectives import Sum
from minioscar.parallel.cuda import SplitCuda, launch_of

from . import Fault, _runtime, array, compile_kernel, empty, tensor_map

ARCH = 80
MULTIPROCESSORS = 3  # few, so that heads are shared between blocks even in small caches


class _Memory:
    """NumPy, but what it allocates lies where the simulator watches."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
        return empty(shape, dtype)

    def zeros(self, shape: Any, dtype: Any = float) -> np.ndarray:
        return array(np.zeros(shape, dtype))

    def asarray(self, x: Any, dtype: Any = None) -> np.ndarray:
        """In the order that x has, as CuPy's: what lies column by column stays so."""
        x = np.asarray(x, dtype)
        return x if _simulated(x) else array(x.T).T if x.flags.fnc else array(x)

    def empty_like(self, x: np.ndarray) -> np.ndarray:
        return empty(x.shape[::-1], x.dtype).T if x.flags.fnc else empty(x.shape, x.dtype)


class Simt(Cuda):
    name = "simt"
    numpy, on_host = Reference.numpy, Reference.on_host
    free_bytes, release = Reference.free_bytes, Reference.release
    loading = Reference.loading
    prepare = Reference.prepare  # the simulator compiles by itself

    def __init__(self, arch: int = ARCH) -> None:
        self.xp: Any = _Memory()
        self.card, self.indices, self.recorded = Card(MULTIPROCESSORS, arch), None, None
        self.products = Products(self.xp, self.card)

    def run(self, launch: Launch) -> None:
        check_rows(launch)
        if self.recorded is not None:
            return self.recorded.append(launch)
        kernel = compile_kernel(KERNELS / launch.source, launch.name, launch.defines, self.card.capability)
        args = [_there(a) for a in launch.args]  # copies live as long as this list
        maps = [tensor_map(a) if isinstance(a, TensorMap) else a for a in args]
        kernel(launch.grid, launch.block, maps, shared=launch.shared)

    @contextmanager
    def recording(self, tokens: int, config: Config) -> Iterator[Recording]:
        """The launches with their arrays, since simulated memory has no pools; nothing is compiled for a capture, so
        nothing runs yet."""
        self.recorded = SimpleNamespace(launches=(found := []), append=found.append)
        try:
            yield self.recorded
        finally:
            self.recorded = None

    def array(self, x: np.ndarray) -> np.ndarray:
        return array(np.asarray(x).astype(self.dtype))

    def add_product(self, y: np.ndarray, x: np.ndarray, weight: np.ndarray, beta: np.ndarray = ONE) -> None:
        before = y.astype(np.float32) * beta if beta[0] else 0  # as BLAS has it: not read then
        y[...] = (x.astype(np.float32) @ weight.astype(np.float32).T + before).astype(y.dtype)
        _runtime().simt_mark_written(y.ctypes.data, y.nbytes)  # rows of an array: neighbours

    def attention(self, q: np.ndarray, new: NewTokens, layer_cache: LayerCache, batch: Any) -> np.ndarray:
        """Array code writes its result unseen by the simulator, so it is copied in."""
        y = super().attention(q, new, layer_cache, batch)
        return y if isinstance(layer_cache, KernelCache) else array(y)

    def sum(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return array(super().sum(x, y))

    def queue(self, batch: StepBatch, runs: Mapping[int, Callable[[], None]], graph: bool) -> Queue:
        return Immediate(batch, runs)

    def product(self, x: np.ndarray, weight: np.ndarray, float32: bool) -> np.ndarray:
        """As cuBLAS does it: float32 sums, one rounding to BF16. (NumPy leaves a product of two BF16 matrices in
        float32.)"""
        return array((x.astype(np.float32) @ weight.astype(np.float32).T).astype(np.float32 if float32 else self.dtype))


def check_rows(launch: Launch) -> None:
    """Raises Fault for an array whose last axis is strided: a kernel gets an address and no strides of it."""
    for i, a in enumerate(launch.args):
        a = a.array if isinstance(a, TensorMap) else a
        if isinstance(a, np.ndarray) and a.ndim and a.size and a.shape[-1] > 1 and a.strides[-1] != a.itemsize:
            what = f"argument {i}, {a.dtype}{list(a.shape)}, has strides {a.strides}"
            raise Fault(f"{launch.name} takes numbers of a row for neighbours, but {what}")


class Immediate(Queue):
    """No stream: a step has run when `go` returns."""

    def __init__(self, batch: StepBatch, runs: Mapping[int, Callable[[], None]]):
        self.batch, self.runs, self.found = batch, runs, deque()

    def current(self) -> AbstractContextManager:
        return nullcontext()

    def put(self, array: np.ndarray, values: np.ndarray) -> None:
        array[...] = values

    def get(self, array: np.ndarray) -> np.ndarray:
        return np.array(array)

    def go(self, rows: int) -> None:
        self.runs[rows]()
        self.found.append(np.array(self.batch.tokens))

    def tokens(self) -> np.ndarray:
        return self.found.popleft()

    def drain(self) -> None:
        self.found.clear()


def _there(a: Any) -> Any:
    """The argument of a launch, in simulated memory."""
    if isinstance(a, TensorMap):
        return replace(a, array=_there(a.array))
    return array(a) if isinstance(a, np.ndarray) and not _simulated(a) else a


def _simulated(x: np.ndarray) -> bool:
    """Inputs that NumPy made (a temporary of array code) are copied in; outputs always are the back end's own
    arrays."""
    return bool(_runtime().simt_is_global(x.ctypes.data))


class SplitSimt(SplitCuda):
    """Several cards in the simulated memory, whose launches run one after the other: those in which all take part run
    phase by phase."""

    on, spread = Split.on, Split.spread
    recording = Simt.recording
    prepare = Reference.prepare

    def follow(self, streams: Any = None) -> None:
        """There are no streams."""

    def run(self, launch: Launch | Sum) -> None:
        if self.recorded is not None:
            self.recorded.append(launch)
        elif isinstance(launch, Sum):
            total = sum(part.astype(np.float32) for part in launch.arrays.values)
            for part in launch.arrays.values:
                part[...] = total.astype(part.dtype)
        else:
            phases = [f"PHASES={n}" for n in (1, 2, 4)] if launch.source.startswith("parallel/") else [""]
            for phase in phases:
                for rank, ops in enumerate(self.ranks):
                    one = launch_of(launch, rank)
                    ops.run(replace(one, defines=(*one.defines[:-1], phase)) if phase else one)

    def queue(self, batch: StepBatch, runs: Mapping[int, Callable[[], None]], graph: bool) -> Queue:
        return Immediate(batch, runs)
