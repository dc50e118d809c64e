"""Launches that wait for each other: all cards get theirs, or none.

A card that is launched alone waits in its sum for the others until it gives up, and whoever synchronizes it waits, too.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any


@contextmanager
def undivided() -> Iterator[None]:
    """Ctrl-C and garbage collection wait until the launches within it are made on all cards.

    What a collection frees may call cudaFree or ncclCommDestroy, and cudaFree waits for all that runs on a card and on
    those that reach its memory (github.com/pytorch/pytorch/issues/50925). Signals are the main thread's.
    """
    collects, is_main = gc.isenabled(), threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if is_main else None
    pressed: list[int] = []
    gc.disable()
    try:
        if callable(handler):  # else it is ignored, or ends the process
            signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
        yield
    finally:
        if callable(handler):
            signal.signal(signal.SIGINT, handler)
        if collects:
            gc.enable()
    if pressed:
        handler(pressed[0], None)


def launch_graphs(
    graphs: Sequence[Any], streams: Sequence[Any], on: Callable[[int], AbstractContextManager], threads: Executor
) -> None:
    """A graph on each card. The first is launched by this thread, the others by `threads` at the same time, since
    cudaGraphLaunch may wait for what is launched before it returns (NCCL user guide, Using NCCL with CUDA Graphs)."""

    def launch(rank: int) -> None:
        with on(rank):
            graphs[rank].launch(streams[rank])

    with undivided():
        others = [threads.submit(launch, rank) for rank in range(1, len(graphs))]
        try:
            launch(0)
        finally:
            wait(others)
        for other in others:
            other.result()
