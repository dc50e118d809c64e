"""`bench.py memory` and `throughput`: what a cache takes, and how many sequences a budget holds; measured where
memory is handed out.

On a card that is CuPy's memory pool, whose limit enforces the budget. On a CPU sizes come from NumPy's allocations
(tracemalloc), and an attempt at a batch runs in a forked process that the kernel gives no more data than the budget
leaves (RLIMIT_DATA).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import timed
from benchmarks.models import cards_of, filled, gpus_of, stepping, weight_bytes
from minioscar.cache import Cache, cache_bytes
from minioscar.engine import Engine
from minioscar.errors import Failure, UserError
from minioscar.memory import needed
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES, WINDOW

UNITS = {"GB": 10**9, "MB": 10**6}
STATUS = Path("/proc/self/status")
Work = Callable[[], dict]


# --- memory


def memory(e: Engine, name: str, batch: int, context: int) -> dict:
    """A cache of `batch` rows of `context` tokens, and the most that it and a decode step, or a prompt of so many
    tokens for one row, take together.

    predicted_peak_bytes and predicted_prefill_peak_bytes are what `minioscar.memory` would have said. ratio_to_bf16
    counts everything; ratio_of_codes counts codes, steps and minima alone, as papers do: 5.33 for `oscar`.
    """
    scheme, room = e.scheme, context + 1

    def full() -> Cache:
        return filled(e.config, scheme, e.ops, batch, context, weights=e.model.weights)

    def step(cache: Cache) -> None:
        stepping(e, cache)[0]()

    def read(cache: Cache, tokens: int = context) -> None:
        ids = np.random.default_rng(1).integers(0, e.config.vocab_size, tokens)
        e.model.forward(ids, cache, cache.batch_for([0], [tokens]))

    step(full())  # makes what stays: tables, kernels
    read(Cache(e.config, scheme, 1, WINDOW, e.ops), WINDOW)
    measure = pooled if e.ops.name == "cuda" else traced
    cache, peak = measure(e.ops, full, step)
    _, prefill_peak = measure(e.ops, lambda: Cache(e.config, scheme, batch, room, e.ops), read)
    predicted, bf16 = (cache_bytes(e.config, s, batch, room) for s in (scheme, SCHEMES["bf16"]))
    sizes = {"cache_bytes": cache, "predicted_bytes": predicted, "bf16_bytes": bf16}
    for kind, most, tokens in (("peak", peak, batch), ("prefill_peak", prefill_peak, context)):
        sizes[f"{kind}_bytes"] = most
        sizes[f"predicted_{kind}_bytes"] = needed(e.config, scheme, e.ops, batch, room, tokens).total
    ratios = {"ratio_to_bf16": bf16 / cache, "ratio_of_codes": 16 / scheme.bits_per_element(e.config.head_dim)}
    return {"model": name, "kv": scheme.name, "batch": batch, "context": context, **sizes, **ratios}


def traced(ops: Reference, make: Callable[[], Cache], use: Callable[[Cache], None]) -> tuple[int, int]:
    """Bytes of the arrays of a cache (what counts its tokens, on the host on every back end, and its table aside), and
    the most that it and its use held."""
    tracemalloc.start()
    try:
        cache = make()
        arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        use(cache)
        size = sum(trace.size for trace in arrays.traces) - 3 * cache.lengths.nbytes  # cuts and shifts, too
        size -= max(cache.table.nbytes, 1)  # NumPy takes a byte for an empty array
        return size, size + tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def pooled(ops: Reference, make: Callable[[], Cache], use: Callable[[Cache], None]) -> tuple[int, int]:
    """The same on a card. The pool rounds every array up to 512 bytes, and its growth during a use is that use's
    high-water mark."""
    pool = ops.xp.get_default_memory_pool()
    ops.release()
    before = pool.used_bytes()
    cache = make()
    size = pool.used_bytes() - before - -(-cache.table.nbytes // 512) * 512
    ops.release()
    held = pool.total_bytes()
    use(cache)
    return size, size + pool.total_bytes() - held


# --- throughput


def budgets(text: str) -> list[int]:
    """The sizes of --budget, in bytes. Raises UserError."""
    found = [re.fullmatch(r"(\d+(?:\.\d+)?)(GB|MB)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise UserError(f"--budget {text!r} is not a list of sizes; write --budget 24GB,48GB or 500MB")
    return [round(float(size[1]) * UNITS[size[2]]) for size in found]


def enforceable(device: str) -> None:
    """Raises UserError where a budget would only be assumed."""
    if device == "cpu" and not (STATUS.exists() and hasattr(ctypes.CDLL(None), "mallinfo2")):
        raise UserError(
            "throughput enforces its budget with what Linux and glibc 2.33 have, and this system has not; use a GPU"
        )


def throughput(e: Engine, name: str, budget: int, context: int, steps: int) -> dict:
    """Decode steps of the largest batch that runs in `budget` bytes, weights included: with one sequence more, memory
    runs out.

    A batch runs if its cache can be made, filled with random tokens, and stepped; `tried` says which were, and
    whether they ran. On a card all that is outside the pool (CUDA's own memory, other programs) is taken off the
    budget; on a CPU the interpreter and its libraries are not counted.
    """
    gpus = len(cards_of(e.ops))  # each has its share of both
    weights, row = weight_bytes(e.model.weights) // gpus, e.ops.cache_bytes(e.config, e.scheme, 1, context + 1) // gpus
    tried = dict[int, bool]()
    attempt, outside = limited(e, budget, weights)

    def run(batch: int, count: int) -> dict | None:
        found = attempt(partial(steps_of, e, batch, context, count))
        tried[batch] = found is not None
        return found

    batch, found = largest(lambda n: run(n, 1) is not None, max(budget - weights - outside, 0) // row), None
    while batch and (found := run(batch, steps)) is None:
        batch -= 1
    sizes = {
        "weight_bytes": weights,
        "outside_bytes": outside,
        "cache_bytes": batch * row,
        "tried": dict(sorted(tried.items())),
    }
    times = found or {"ms": None, "spread": None, "tokens_per_s": 0.0}
    return {
        "model": name,
        "budget_gb": budget / 1e9,
        "kv": e.scheme.name,
        "context": context,
        "batch": batch,
        **gpus_of(e),
        **times,
        **sizes,
    }


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n of 0 ... most that fits, where all smaller ones do and no larger one does; 0 is not asked."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def steps_of(e: Engine, batch: int, context: int, steps: int) -> dict:
    run, count = stepping(e, filled(e.config, e.scheme, e.ops, batch, context, weights=e.model.weights))
    seconds, spread = timed(e.ops, run, steps, 1)
    return {"ms": seconds / count * 1e3, "spread": spread, "tokens_per_s": batch * count / seconds}


def limited(e: Engine, budget: int, weights: int) -> tuple[Callable[[Work], dict | None], int]:
    """What runs work under the budget, and gives None where memory does not suffice; and the bytes outside of its
    control."""
    gc.collect()
    e.ops.release()  # or what is made now would lie in large blocks that are free, and keep them
    first, _ = stepping(e, filled(e.config, e.scheme, e.ops, 1, 128, weights=e.model.weights))
    gc.collect()  # what it would free during an attempt would be a present to it
    first()  # what is made once is there before the limit is: kernels, tables, cuBLAS's workspace
    if e.ops.name == "cpu":
        return partial(in_process, budget - weights, first), 0
    e.ops.release()
    outside = 0
    for one, on in cards_of(e.ops):
        with on:
            free, total = one.xp.cuda.runtime.memGetInfo()
            outside = max(outside, total - free - one.xp.get_default_memory_pool().total_bytes())
    return partial(in_pool, e.ops, budget - outside), outside


def in_pool(ops, limit: int, work: Work) -> dict | None:
    ops.release()
    set_limit(ops, limit)
    try:
        return work()
    except MemoryError:
        return None
    finally:
        set_limit(ops, 0)


def set_limit(ops, limit: int) -> None:
    """Of the memory pool of each card."""
    for one, on in cards_of(ops):
        with on:
            one.xp.get_default_memory_pool().set_limit(size=limit)


def in_process(room: int, first: Callable[[], None], work: Work) -> dict | None:
    """work() in a forked process that may take `room` bytes more than it has after `first`.

    A process of its own because BLAS ends the process, without an exception, where its own memory runs out. Raises
    Failure for any other error.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(_limited_child(room, first, work)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(said) if said else {}
    if "error" in answer:
        raise Failure(f"an attempt under the budget failed: {answer['error']}")
    return answer.get("result")


def _limited_child(room: int, first: Callable[[], None], work: Work) -> dict:
    import resource

    libc, (soft, hard) = ctypes.CDLL(None), resource.getrlimit(resource.RLIMIT_DATA)
    try:
        # OpenBLAS's own exit handler would wait for threads that the fork has left behind.
        libc.__cxa_atexit(libc._exit, 1, None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where OpenBLAS would say that its memory has run out
        square = np.ones((1024, 1024), np.float32)
        square @ square, square @ square[0]  # BLAS's threads and buffers, which a fork takes away
        del square
        first()
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + room, hard))
        return {"result": work()}
    except MemoryError:
        return {}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class Mallinfo2(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def data_bytes() -> int:
    """What counts against RLIMIT_DATA: the heap and private writable mappings. What malloc has been given back is not
    in use: it hands that out again without asking the kernel. (RLIMIT_AS would count, and so give away, what malloc's
    arenas only reserve.)"""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    kib = next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmData:"))
    return kib * 1024 - libc.mallinfo2().fordblks
