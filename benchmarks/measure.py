"""Times and the limits they are held against. On a card: many launches in one replayed graph, on data that no cache
holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from minioscar.ops.reference import Reference

LAUNCHES = 20  # in one graph, at least
MEASURED = 20e3  # microseconds of replays, or 16 times as many of them as asked for
WARM_UP = 3  # replays that do not count
REST = 2  # pause after two replays, in units of their time: keeps the card below its power limit, its clock steady
SUSTAINED = 2.0  # seconds without a rest
L2_BYTES = 64 << 20  # of the largest card so far, rounded up


def copies_of(size: int) -> int:
    """How many sets of buffers of `size` bytes to rotate through, so that L2 holds none when it is used again."""
    return max(2, -(-4 * L2_BYTES // size))


@contextmanager
def own_pool(xp: Any) -> Iterator[Callable[[], int]]:
    """Arrays come from a pool that is empty at first; what it has taken from the card is asked for by a call."""
    pool = xp.cuda.MemoryPool()
    with xp.cuda.using_allocator(pool.malloc):
        yield pool.total_bytes


def median_and_spread(times: Sequence[float]) -> tuple[float, float]:
    """The spread is (max - min) / median."""
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def enough(times: Sequence[float], launches: int, replays: int) -> bool:
    """Whether these times of a launch, one from each replay of `launches`, suffice for a median."""
    if len(times) < replays:
        return False
    return sum(times) * launches >= MEASURED or len(times) >= 16 * replays


def replayed(once: Callable[[], float], launches: int, replays: int) -> list[float]:
    """Microseconds of a launch, `enough` of them, a rest after each. once: times a replay of `launches` of them."""
    times: list[float] = []
    while not enough(times[WARM_UP:], launches, replays):
        times.append(once())
        time.sleep(REST * 2 * launches * times[-1] * 1e-6)
    return times[WARM_UP:]


def sustained(once: Callable[[], float]) -> list[float]:
    """The same without rests, in the second half of SUSTAINED seconds: as fast as the card's power limit allows."""
    times, start = [], time.perf_counter()
    while (since := time.perf_counter() - start) < SUSTAINED:
        times.append((since, once()))
    return [us for since, us in times if since > SUSTAINED / 2]


def graph_time(launches: Sequence[Callable[[], None]], replays: int = 25, rest: bool = True) -> tuple[float, float]:
    """Microseconds of one launch, the median of `replayed` or without rests of `sustained`, and their spread.

    Launch i of max(LAUNCHES, len(launches)) in the captured graph is launches[i % len]; each is called once before,
    which excludes compilation. A replay is timed right behind another one, which excludes the host's time to launch a
    graph.
    """
    import cupy

    count = max(LAUNCHES, len(launches))
    cupy.cuda.Device().synchronize()  # what filled the buffers may still run on another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for launch in launches:
            launch()
        stream.synchronize()
        stream.begin_capture()
        for i in range(count):
            launches[i % len(launches)]()
        graph = stream.end_capture()

        def once() -> float:
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            graph.launch(stream)
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            return cupy.cuda.get_elapsed_time(start, end) * 1e3 / count

        return median_and_spread(replayed(once, count, replays) if rest else sustained(once))


def timed(ops: Reference, run: Callable[[], Any], repeats: int, warm_up: int = 2) -> tuple[float, float]:
    """Seconds of a call (median) and their spread. The device has finished when a call counts as done."""
    seconds = []
    for i in range(warm_up + repeats):
        start = time.perf_counter()
        run()
        if ops.name == "cuda":
            ops.xp.cuda.Device().synchronize()
        if i >= warm_up:
            seconds.append(time.perf_counter() - start)
    return median_and_spread(seconds)


def ceilings(ops: Reference, quick: bool = False) -> dict[str, float]:
    """The machine's limits: copy bandwidth (read + written) and the matrix rate in the dtype of the weights, the best
    of several.

    quick: on a CPU over less data, so that the result is rougher.
    """
    if ops.name == "cuda":
        n, copy = 8192, copy_bandwidth()
    else:
        n, copy = 1024 if quick else 4096, host_copy_bandwidth(ops, 2**26 if quick else 2**28)
    rng = np.random.default_rng(0)
    x, y = (ops.array(rng.standard_normal((n, n), np.float32)) for _ in range(2))
    product = min(timed(ops, lambda: x @ y.T, 1, 1)[0] for _ in range(4))
    return {"copy_tb_s": copy / 1e12, "matmul_tflop_s": 2 * n**3 / product / 1e12}


def host_copy_bandwidth(ops: Reference, size: int) -> float:
    """Bytes per second, read and written bytes counted; the best of eight."""
    a = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    b = np.empty_like(a)
    return 2 * size / min(timed(ops, lambda: np.copyto(b, a), 1, 1)[0] for _ in range(8))


def copy_bandwidth(size: int = 1 << 32) -> float:
    """Bytes per second of a device copy, read and written bytes counted; the best of ten. size: less where the card
    has less room."""
    import cupy

    size = min(size, cupy.cuda.runtime.memGetInfo()[0] // 4)
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


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares y = slope * x + intercept, and the largest |error| / y of a point. Raises ValueError for one x
    only."""
    if len(set(x)) < 2:
        raise ValueError("a line needs two points")
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(xs, ys, 1)
    return float(slope), float(intercept), float((np.abs(slope * xs + intercept - ys) / ys).max())
