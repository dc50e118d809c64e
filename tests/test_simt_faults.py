"""Planted faults are caught in every order of threads that is tried, each with its thread and line; without them the
same kernels pass."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.ops import linear

from . import simt
from .kernel_device import on_each_device, on_simt
from .simt.backend import Simt

SOURCE = Path(__file__).parent / "simt" / "cases" / "faults.cu"
ORDERS = range(6)

# kernel: grid, block, dynamic shared bytes, n, what the output should be
KERNELS = {
    "shift_left": (2, 64, 0, 100, lambda x: np.append(x[1:100], x[99])),
    "rotate": (1, 64, 256, 64, lambda x: np.roll(x[:64], -1)),
    "average": (1, 32, 0, 32, lambda x: np.repeat((x[:32:2] + x[1:32:2]) / 2, 2)),
    "stream": (1, 32, 0, 5, lambda x: x[: 5 * 128]),
    "vectors": (1, 32, 0, 0, lambda x: x[:128]),
    "sum_of_blocks": (5, 64, 0, 320, lambda x: x[:320].sum(dtype=np.float64)),
    "words": (5, 32, 0, 160, lambda x: x[:160].sum(dtype=np.float64)),
    "pipeline": (1, 64, 2 * 1024, 5, lambda x: x[: 5 * 256]),
}


def run(device, name: str, fault: int, seed: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    grid, block, shared, n, expected = KERNELS[name]
    x = np.random.default_rng(seed).integers(-1000, 1000, 2048).astype(np.float32)
    y = expected(x)
    x = x[: 100 if name == "shift_left" else x.size]
    out = device.empty(np.shape(y) or 1, np.float32)
    args = [device.array(x), out, np.int32(n), np.int32(fault)]
    if name in ("sum_of_blocks", "words"):
        args = [*args[:2], device.empty(320, np.float32), device.array(np.zeros(1, np.int32)), *args[2:]]
    source, arch = (SOURCE.with_name("pipeline.cu"), 90) if name == "pipeline" else (SOURCE, 80)
    device.compile(source, name, arch=arch)(grid, block, args, shared=shared, seed=order)
    return device.numpy(out).ravel(), np.ravel(y)


@on_each_device
@pytest.mark.parametrize("name", KERNELS)
def test_without_a_fault_nothing_is_reported(device, name, seed):
    for order in ORDERS:
        got, expected = run(device, name, 0, seed, order)
        assert np.array_equal(got, expected)


@on_simt
@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        (
            "shift_left",
            1,
            r"\(35,0,0\): out of bounds: read of 4 bytes of global memory at argument 0, float32\[100\] \+ 400 of 400",
        ),
        (
            "rotate",
            1,
            r"thread \(63,0,0\): out of bounds: write of 4 bytes of shared memory at dynamic shared memory \+ 256 of "
            r"256 bytes",
        ),
        ("rotate", 2, r"race: .* is not ordered after|read of unwritten shared memory"),
        ("rotate", 3, r"thread \(63,0,0\): out of bounds: read of 4 bytes of shared memory"),
        (
            "rotate",
            4,
            r"divergent barrier: __syncthreads at line 16 while others wait in the one at line 15|line 15 while .* "
            r"line 16",
        ),
        (
            "rotate",
            5,
            r"race: (read|write) of 4 bytes at dynamic shared memory .* is not ordered after the (read|write) by "
            r"thread",
        ),
        (
            "average",
            1,
            r"thread \(31,0,0\): out of bounds: write of 4 bytes of shared memory at shared second \+ 128 of 128 bytes",
        ),
        ("average", 2, r"read of unwritten shared memory: 4 bytes at shared first \+ 0 of 128"),
        ("average", 3, r"race: .* is not ordered after|read of unwritten shared memory"),
        ("average", 4, r"a shuffle at line \d+"),
        ("stream", 1, r"a cp.async in flight will write: its wait is missing"),
        ("stream", 2, r"race: .* is not ordered after the write|cp.async in flight will write|unwritten shared memory"),
        ("stream", 3, r"race: .* is not ordered after|that a cp.async in flight will write"),
        (
            "words",
            1,
            r"race: relaxed read of 8 bytes at argument 2, .* is not ordered after the write by thread .* of block",
        ),
        ("words", 2, r"race: read of 4 bytes at argument 2, .* is not ordered after the atomic by thread .* of block"),
        ("words", 3, r"out of bounds: relaxed read of 4 bytes of global memory at argument 3"),
        ("vectors", 1, r"misaligned"),
        ("vectors", 2, r"out of bounds: index 4 of an array of fixed size"),
        ("vectors", 3, r"shift by 32"),
        (
            "sum_of_blocks",
            1,
            r"race: write of 4 bytes at argument 2, .* is not ordered after the write by thread \(\d+,0,0\) of block",
        ),
        ("sum_of_blocks", 2, r"race: read .* is not ordered after the write by thread \(\d+,0,0\) of block"),
        (
            "sum_of_blocks",
            3,
            r"race: read .* is not ordered after the write by thread \(\d+,0,0\)|read of unwritten global memory",
        ),
        ("sum_of_blocks", 4, r"was never written"),
        (
            "pipeline",
            1,
            r"a bulk copy in flight will write: nobody has waited for its mbarrier|read of unwritten shared memory",
        ),
        ("pipeline", 2, r"race: read .* is not ordered after a bulk copy whose mbarrier it has not waited for"),
        ("pipeline", 3, r"race: write .* is not ordered after the read by thread|a bulk copy in flight will write"),
        ("pipeline", 4, r"no thread can go on \(divergent barrier\?\): thread \(\d+,0,0\) waits for an mbarrier"),
        ("pipeline", 5, r"race: write .* is not ordered after the read by thread"),
    ],
)
def test_a_planted_fault_is_reported_with_its_thread_and_line(device, name, fault, message, seed):
    for order in ORDERS:
        with pytest.raises(simt.Fault, match=message) as caught:
            run(device, name, fault, seed, order)
        text = str(caught.value)
        print(text)
        assert "never written" in text or re.match(
            rf"{name}( at \w+\.cu:\d+)?, block \(\d+,0,0\) thread \(\d+,0,0\): ", text
        ), text


@on_simt
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "wgmma without a wgmma.fence since the last wait"),
        (2, "the sums of a wgmma in flight were written"),
        (3, r"race: (read|write) .* is not ordered after the (read|write) by thread"),
        (4, "wgmma whose pattern of swizzling does not begin at a multiple of 1024 bytes"),
        (5, "the block ended with a wgmma in flight"),
        (6, "operand a of a wgmma in flight was written"),
    ],
)
def test_a_fault_with_a_wgmma_is_reported(device, fault, message, seed):
    b = device.array(np.zeros((128, 64), np.uint16))
    a, c = device.array(np.zeros((128, 4), np.uint32)), device.array(np.zeros((128, 64), np.float32))
    kernel = device.compile(SOURCE.parent / "sm90" / "warpgroups.cu", "registers_rows", arch=90)
    for order in ORDERS:
        out = device.empty((128, 64), np.float32)
        with pytest.raises(simt.Fault, match=message):
            kernel(1, 128, [a, b, c, out, np.int32(fault)], shared=16384, seed=order)


@on_simt
def test_an_argument_of_the_wrong_type_is_refused(device):
    kernel = device.compile(SOURCE, "rotate")
    x, out = device.array(np.zeros(64, np.float32)), device.empty(64, np.float32)
    with pytest.raises(TypeError, match="argument 2 of rotate is float32, the kernel takes i0004"):
        kernel(1, 64, [x, out, np.float32(64), np.int32(0)], shared=256)
    with pytest.raises(TypeError, match="takes 4 arguments, not 3"):
        kernel(1, 64, [x, out, np.int32(64)], shared=256)


@on_simt
def test_without_checks_a_kernel_still_runs(device, seed):
    x, out = device.array(np.arange(64, dtype=np.float32)), device.empty(64, np.float32)
    device.compile(SOURCE, "rotate")(1, 64, [x, out, np.int32(64), np.int32(0)], shared=256, checks=False)
    assert np.array_equal(device.numpy(out, allow_unwritten=True), np.roll(np.arange(64), -1))


@pytest.mark.skipif(simt.missing() is not None, reason=str(simt.missing()))
def test_an_array_that_lies_column_by_column_is_refused_by_a_launch():
    """It keeps its order on the way to a card, as CuPy's do."""
    ops, columns = Simt(), np.zeros((64, 16), np.float32).T.astype(BF16)
    x = ops.xp.asarray(columns)
    assert x.strides == columns.strides
    with pytest.raises(simt.Fault, match=r"silu_mul .* argument 0, bfloat16\[16, 64\], has strides \(2, 32\)"):
        ops.run(linear.silu_mul(x, ops.xp.empty((16, 32), BF16)))
