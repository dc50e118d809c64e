"""`bench.py decode --breakdown`: the kernels that a decode step consists of, each kind timed by itself in a graph of its launches.

Their sum is more than the step where launches overlap, and less where a kernel finds in L2 what it must read in a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from benchmarks.measure import copies_of, graph_time
from benchmarks.models import filled
from minioscar.cache import Cache
from minioscar.engine import Engine
from minioscar.ops.decode import StepDecoder
from minioscar.ops.launch import Launch, run
from minioscar.sampling import RowSampling

CACHE = ("decode_attention", "decode_attention_bf16")


def kernels_of(e: Engine, batch: int, context: int, copy_rate: float) -> Iterator[dict]:
    cache = filled(e.config, e.scheme, e.ops, batch, context, 2, e.model.weights)
    decoder = StepDecoder(e.model, cache, [RowSampling()] * batch, replay="launches")
    lengths = decoder.batch.lengths
    lengths.fill(context)
    decoder.replay()  # every input of every kernel is there
    lengths.fill(context)
    kinds: dict[str, list[Launch]] = defaultdict(list)
    for launch in decoder.recorded.launches:
        kinds[label(launch)].append(launch)
    for kind, launches in kinds.items():
        size = bytes_of(launches[0], cache)
        count = copies_of(size) if size > 1 << 20 else 2
        few = launches[: count + count % 2]  # an even number: those of attention take turns, and must find the workspace empty
        us, spread = graph_time([lambda launch=launch: run(launch) for launch in few])
        row = {"kv": e.scheme.name, "batch": batch, "context": context, "kernel": kind, "launches": len(launches), "us": us}
        row |= {"us_spread": spread, "us_a_step": us * len(launches)}
        yield row | {"bytes": size, "fraction_of_limit": size / (us * 1e-6) / copy_rate}
        lengths.fill(context)


def label(launch: Launch) -> str:
    weight = weight_of(launch)
    return launch.name if weight is None else f"{launch.name} {weight.shape[1]} to {weight.shape[0]}"


def weight_of(launch: Launch) -> object:
    """The matrix of a product: the largest of its arguments."""
    if not launch.name.startswith("linear"):
        return None
    return max((a for a in launch.args if getattr(a, "ndim", 0) == 2), key=lambda a: a.nbytes)


def bytes_of(launch: Launch, cache: Cache) -> int:
    """What a launch must read at least: the matrix of a product, a layer's cache, or all its arguments that are small."""
    if launch.name in CACHE:
        return cache.nbytes // len(cache.layers)
    weight = weight_of(launch)
    if weight is not None:
        return weight.nbytes
    own = {id(array) for layer_cache in cache.layers for array in layer_cache.arrays.values()}
    small = [a for a in launch.args if isinstance(getattr(a, "nbytes", None), int) and not isinstance(a, np.generic) and id(a) not in own]
    return sum(a.nbytes for a in small if a.nbytes < 1 << 20)
