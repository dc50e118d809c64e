"""`bench.py decode --breakdown`: the kernels of a decode step, each kind timed by itself in a graph of its launches.

Their sum is more than the step where launches overlap, and less where a kernel finds in L2 what a step reads from
memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import cards
from benchmarks.measure import copies_of, graph_time
from benchmarks.models import experts_taken, filled, gpus_of, step_tokens
from minioscar.cache import Cache
from minioscar.engine import Engine
from minioscar.ops.launch import Address, Launch, TensorMap, run
from minioscar.parallel.collectives import Gather, Sum
from minioscar.parallel.cuda import SplitCuda, launch_of
from minioscar.parallel.ranks import of_rank
from minioscar.quantized import ROWS
from minioscar.sampling import RowSampling

CACHE = ("decode_attention", "decode_attention_bf16")
QUANTIZED = ("quantized/linear", "sm90/quantized", "experts/quantized")  # sources of products with quantized weights
SMALL = 1 << 20  # bytes; larger arguments are tables and workspaces, of which a launch reads a part


def kernels_of(e: Engine, batch: int, context: int, copy_rate: float) -> Iterator[dict]:
    """share: of the kernels' times together, so that of several cards it says what their sums take."""
    rows = list(timed_kinds(e, batch, context, copy_rate))
    together = sum(row["us_a_step"] for row in rows)
    yield from (row | {"share": row["us_a_step"] / together} for row in rows)


def timed_kinds(e: Engine, batch: int, context: int, copy_rate: float) -> Iterator[dict]:
    cache = filled(e.config, e.scheme, e.ops, batch, context, 2, e.model.weights)
    decoder = e.ops.decoder(e.model, cache, [RowSampling()] * batch, replay="launches")
    lengths, taken = decoder.batch.lengths, experts_taken(e, batch)
    lengths.fill(context)
    decoder.batch.tokens[:] = e.ops.xp.asarray(step_tokens(e.config, batch), np.int32)
    recorded = decoder.work.recorded.launches
    kinds: dict[str, list[int]] = defaultdict(list)
    for i, launch in enumerate(recorded):
        kinds[label(first_of(launch))].append(i)
    for kind, numbers in kinds.items():
        # Inputs as the step makes them: activations share memory, where later launches leave what may be no numbers.
        lengths.fill(context)
        for launch in recorded[: numbers[0]]:
            e.ops.run(launch)
        launches = [recorded[i] for i in numbers]
        size = bytes_of(first_of(launches[0]), cache, taken)
        count = copies_of(size) if size > SMALL else 2
        timed = launches[: count + count % 2]  # attention alternates two workspaces and must find the next one empty
        is_collective = not isinstance(timed[0], Launch) or timed[0].source.startswith("parallel/")
        if isinstance(e.ops, SplitCuda) and is_collective:
            us, spread = cards.graph_time(e.ops, [lambda launch=launch: e.ops.run(launch) for launch in timed])
        else:
            us, spread = graph_time([lambda launch=launch: run(first_of(launch)) for launch in timed])
        row = {"kv": e.scheme.name, "batch": batch, "context": context, "kernel": kind, "launches": len(launches)}
        row |= gpus_of(e)
        row |= {"us": us, "us_spread": spread, "us_a_step": us * len(launches)}
        yield row | {"bytes": size, "fraction_of_limit": size / (us * 1e-6) / copy_rate}


def first_of(launch: Launch | Sum | Gather) -> Launch | Sum | Gather:
    """What the first of several cards launches."""
    return launch_of(launch, 0) if isinstance(launch, Launch) else launch.map(lambda x: x.values[0])


def label(launch: Launch | Sum | Gather) -> str:
    """Its kernel; of a product also the numbers in and out of a token, and the kind of quantized weights."""
    if not isinstance(launch, Launch):
        return launch.name
    if launch.source.startswith(QUANTIZED):
        _, size, rows = [int(a) for a in launch.args if isinstance(a, np.int32)][:3]
        kind = next(define for define in launch.defines if define.startswith("KIND="))
        return f"{launch.name} {size} to {rows} {kind[5:].lower()}"
    weight = weight_of(launch)
    return launch.name if weight is None else f"{launch.name} {weight.shape[-1]} to {weight.shape[-2]}"


def arrays_of(launch: Launch) -> list[Any]:
    """Its arguments but for scalars; of recorded ones from the step's pool an `Address`."""
    args = (a.array if isinstance(a, TensorMap) else a for a in launch.args)
    return [a for a in args if isinstance(a, Address) or getattr(a, "shape", ())]


def weight_of(launch: Launch) -> Any | None:
    """The matrix of a product, which is the second one among its arguments: x [tokens, in], weight [out, in]; of
    experts their matrices [experts, out, in]."""
    if launch.name == "experts":
        return next(a for a in arrays_of(launch) if a.ndim == 3)
    if not launch.name.startswith("linear"):
        return None
    return [a for a in arrays_of(launch) if a.ndim == 2][1]


def bytes_of(launch: Launch, cache: Cache, taken: float = 0.0) -> int:
    """What a launch must move at least: a layer's cache, the matrix of a product, of experts the matrices of those that
    are taken, else its small arguments that are not the cache's."""
    if not isinstance(launch, Launch):
        return launch.arrays.nbytes
    if launch.name in CACHE:
        own = of_rank(cache.arrays, 0)
        return sum(array.nbytes for name, array in own.items() if name != "table") // len(cache.layers)
    if launch.source.startswith(QUANTIZED):
        arrays = arrays_of(launch)
        codes = next(i for i, a in enumerate(arrays) if a.ndim > 3)
        once = {id(a): a for a in arrays[codes:]}  # some are there as boxes, too
        size = sum(a.nbytes for a in list(once.values())[:3])  # and scales, and those of rows
        if launch.name != "experts":
            return size
        rows = [int(a) for a in launch.args if isinstance(a, np.int32)][2]  # of an expert
        return round(size * taken * rows / (ROWS * len(arrays[codes])))
    if (weight := weight_of(launch)) is not None:
        return round(weight.nbytes * (taken / len(weight) if weight.ndim == 3 else 1))
    arrays = [cache.arrays, *(layer_cache.arrays for layer_cache in cache.layers)]  # of all layers (pack_step), of one
    own = {id(array) for of_layer in arrays for array in of_rank(of_layer, 0).values()}
    return sum(a.nbytes for a in arrays_of(launch) if a.nbytes < SMALL and id(a) not in own)
