"""Times of launches in which several cards take part: one graph a card, launched together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.measure import LAUNCHES, median_and_spread, replayed
from minioscar.parallel.cuda import SplitCuda, captured, on_streams


def graph_time(ops: SplitCuda, launches: Sequence[Callable[[], None]], replays: int = 25) -> tuple[float, float]:
    """`measure.graph_time` of calls that launch on every card; timed on the first, behind a replay of all."""
    import cupy

    count, streams = max(LAUNCHES, len(launches)), ops.new_streams(ops.cards)

    def synchronize() -> None:
        ops.each(lambda _: cupy.cuda.Device().synchronize())

    with on_streams(ops, streams):
        for launch in launches:
            launch()
    synchronize()
    graphs = captured(ops, streams, lambda: [launches[i % len(launches)]() for i in range(count)])

    def once() -> float:
        with ops.on(0):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
        for event in (start, end):
            for rank, (graph, stream) in enumerate(zip(graphs, streams, strict=True)):
                with ops.on(rank):
                    graph.launch(stream)
                    if rank == 0:
                        event.record(stream)
        synchronize()
        return cupy.cuda.get_elapsed_time(start, end) * 1e3 / count

    return median_and_spread(replayed(once, count, replays))
