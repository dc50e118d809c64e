"""One test for two devices: a kernel runs simulated on the CPU (`simt`) and, where there is one, on the GPU (`cuda`).

    @on_each_device
    def test_something(device, seed):
        kernel = device.compile(CASES / "some.cu", "some<128>", ["GROUP=32"])
        out = device.empty((4, 128), np.float32)
        kernel(grid, block, [device.array(x), out, np.int32(n)], shared=1024)
        assert_something(device.numpy(out))

`device.run(launch)` does the middle part for a `Launch` of minioscar.ops.launch. Scalars are NumPy scalars of the
kernel's own types. `empty` is filled with 0xFF: NaN, or a size that no array has. `arch` is the least compute
capability: the one that is simulated, while a card compiles for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minioscar.compilation.cubins import KERNELS
from minioscar.compilation.cubins import source as text_of
from minioscar.ops.launch import Launch, TensorMap, run
from minioscar.ops.launch import kernel as compiled_kernel

from . import simt
from .pairwise import Traits, covering, pairwise


class Device:
    """What both have in common."""

    def run(self, launch: Launch, arch: int = 80, seed: int = 0) -> None:
        """A launch of one of the package's kernels."""
        kernel = self.compile(KERNELS / launch.source, launch.name, launch.defines, arch)
        kernel(launch.grid, launch.block, launch.args, shared=launch.shared, seed=seed)


class SimtDevice(Device):
    """Kernels on the CPU, with every access to memory checked."""

    name = "simt"

    def run(self, launch: Launch, arch: int = 80, seed: int = 0) -> None:
        maps = (simt.tensor_map(a) if isinstance(a, TensorMap) else a for a in launch.args)
        super().run(replace(launch, args=tuple(maps)), arch, seed)

    array, empty, numpy = staticmethod(simt.array), staticmethod(simt.empty), staticmethod(simt.numpy)

    @staticmethod
    def compile(source: Path, name: str, defines: Sequence[str] = (), arch: int = 80) -> Callable[..., None]:
        return simt.compile_kernel(source, name, tuple(defines), arch)


class CudaDevice(Device):
    """The same on the GPU, through CuPy and NVRTC."""

    name = "cuda"

    def run(self, launch: Launch, arch: int = 80, seed: int = 0) -> None:
        """Behind all that was launched before: what may overlap depends on the launches of a step, and a test has
        others."""
        import cupy

        self.check(launch.source, arch)
        cupy.cuda.Device().synchronize()
        run(launch)

    @staticmethod
    def check(source: str, arch: int) -> None:
        """Skips the test on a card that cannot run this."""
        import cupy

        capability = int(cupy.cuda.Device().compute_capability)
        if capability < arch or Path(source).parent.name == "sm90" and capability != 90:
            pytest.skip(f"needs a card of compute capability {arch / 10}, this one has {capability / 10}")

    @staticmethod
    def compile(source: Path, name: str, defines: Sequence[str] = (), arch: int = 80) -> Callable[..., None]:
        CudaDevice.check(str(source), arch)
        if "<" in name:  # of a template
            import cupy

            options = ("-std=c++17", *(f"-D{d}" for d in defines))
            module = cupy.RawModule(code=text_of(str(source)), options=options, name_expressions=[name])
            kernel = module.get_function(name)
        else:
            kernel = compiled_kernel(str(source), name, tuple(defines))

        def launch(
            grid: Any, block: Any, args: Sequence[Any], shared: int = 0, seed: int = 0, checks: bool = True
        ) -> None:
            if shared > 48 * 1024:
                kernel.max_dynamic_shared_size_bytes = shared
            three = [(n,) if isinstance(n, int) else tuple(n) for n in (grid, block)]
            kernel(*three, tuple(np.uintp(0) if a is None else a for a in args), shared_mem=shared)

        return launch

    @staticmethod
    def array(values: Any) -> Any:
        import cupy

        return cupy.asarray(values)

    @staticmethod
    def empty(shape: int | Sequence[int], dtype: Any) -> Any:
        import cupy

        out = cupy.empty(shape, dtype)
        out.view(np.uint8).fill(0xFF)
        return out

    @staticmethod
    def numpy(device_array: Any, allow_unwritten: bool = False) -> np.ndarray:
        return device_array.get()


def some_table(rng: np.random.Generator, rows: int, blocks: int) -> np.ndarray:
    """A table of blocks, int32 [rows, blocks], in which no row has neighbours."""
    return rng.permutation(rows * blocks).astype(np.int32).reshape(rows, blocks)


def of_row(blocks: np.ndarray, table: np.ndarray, row: int) -> np.ndarray:
    """Pages uint8 [blocks, kv_heads, 2, bytes] of a row in its order, [kv_heads, pages, bytes]."""
    x = blocks[table[row]].swapaxes(0, 1)
    return x.reshape(len(x), -1, x.shape[3])


def in_blocks(norms: np.ndarray, table: np.ndarray) -> np.ndarray:
    """float32 [rows, tokens] as [blocks, 128]; NaN beyond the tokens."""
    room = np.full((*table.shape, 128), np.nan, np.float32)
    room.reshape(len(table), -1)[:, : norms.shape[1]] = norms
    found = np.empty((table.size, 128), np.float32)
    found[table] = room
    return found


_no_simt = simt.missing()
SIMT = pytest.param(SimtDevice(), id="simt", marks=pytest.mark.skipif(_no_simt is not None, reason=str(_no_simt)))
CUDA = pytest.param(CudaDevice(), id="cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", [SIMT, CUDA])
on_the_card = pytest.mark.parametrize("device", [CUDA])
on_simt = pytest.mark.parametrize("device", [SIMT])


def on_each_device_over(
    possible: Callable[..., bool] = lambda *_: True, traits: Mapping[str, Traits] | None = None, **axes: Sequence[Any]
) -> pytest.MarkDecorator:
    """As `on_each_device` over a grid of parameters: simulated at the points where every pair is met (`pairwise`), on
    the card at all of them.

    axes: values by the parameter's name. traits: of an axis, what of a value counts instead of itself. possible: takes
    a value of each axis.
    """
    grid = list(axes.values())
    some = pairwise(grid, [(traits or {}).get(name) for name in axes], possible)
    return _parametrize(list(axes), some, [point for point in product(*grid) if possible(*point)])


def on_each_device_of(
    names: Sequence[str], points: Sequence[tuple], traits: Callable[..., Iterable[Hashable]]
) -> pytest.MarkDecorator:
    """As `on_each_device` over points of several parameters: simulated at those that show every trait (`covering`), on
    the card at all of them.

    traits: takes the values of a point.
    """
    return _parametrize(names, covering(points, lambda point: traits(*point)), points)


def _parametrize(names: Sequence[str], some: Sequence[tuple], every: Sequence[tuple]) -> pytest.MarkDecorator:
    """Over `some` simulated and over `every` on the card."""
    parameters = [
        pytest.param(*device.values, *point, id="-".join(map(_label, (device.id, *point))), marks=device.marks)
        for device, points in ((SIMT, some), (CUDA, every))
        for point in points
    ]
    return pytest.mark.parametrize(("device", *names), parameters)


def _label(value: Any) -> str:
    if isinstance(value, dict):  # of switches
        return "+".join(value) or "plain"
    return "-".join(map(_label, value)) if isinstance(value, tuple) else str(getattr(value, "name", value))
