"""Times of kernels on the card, as a captured decode step sees them: many launches in one replayed graph, on data that no cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import cupy

LAUNCHES = 20  # in one graph
L2_BYTES = 64 << 20  # of the largest card so far, rounded up


def copies_of(size: int) -> int:
    """How many sets of buffers of `size` bytes to rotate through, so that none is in L2 when its turn comes again."""
    return min(LAUNCHES, max(2, -(-4 * L2_BYTES // size)))


def graph_time(launches: Sequence[Callable[[], None]], replays: int = 25, warm_up: int = 3) -> tuple[float, float]:
    """Microseconds of one launch (median over the replays) and their spread, (max - min) / median.

    launches[i % len] is captured as launch i of LAUNCHES; each is called once before, so that compilation stays out.
    """
    cupy.cuda.Device().synchronize()  # what filled the buffers may still run on another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for launch in launches:
            launch()
        stream.synchronize()
        stream.begin_capture()
        for i in range(LAUNCHES):
            launches[i % len(launches)]()
        graph = stream.end_capture()
        times = []
        for i in range(warm_up + replays):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            if i >= warm_up:
                times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / LAUNCHES)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def copy_bandwidth(size: int = 1 << 32) -> float:
    """Bytes per second of a device copy, read and written bytes counted; the best of ten."""
    a, b = cupy.empty(size, cupy.uint8), cupy.empty(size, cupy.uint8)
    a.fill(1)
    best = float("inf")
    for _ in range(10):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        b.data.copy_from_device_async(a.data, size)
        end.record()
        end.synchronize()
        best = min(best, cupy.cuda.get_elapsed_time(start, end) * 1e-3)
    return 2 * size / best
