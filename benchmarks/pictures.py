"""A picture or a sound through a tower, and its tokens through the model: `python -m benchmarks.pictures [PRESET]
[HxW or SECONDSs ...]`, such as 1024x1024 and 30s.

One line of JSON a size: its tokens, milliseconds of the tower (median of five, after one that compiles), seconds of the
first one, bytes that the tower took beside the weights and what `work_bytes` said, milliseconds of the prefill.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import presets
from minioscar.cache import Cache
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.towers.media import Medium
from minioscar.towers.sound import RATE

SIZES = ("256x256", "1024x1024", "2464x1568")  # the last: an A4 page at 190 dots an inch, 3,773 tokens


def timed(work: Callable[[], Any], xp: Any) -> float:
    """Milliseconds until the device is done."""
    before = time.perf_counter()
    work()
    if xp is not np:
        xp.cuda.Device().synchronize()
    return (time.perf_counter() - before) * 1e3


def medium_of(config: Config, asked: str) -> Medium:
    """Noise of a size "HxW", or of so many seconds, "Ns"."""
    rng = np.random.default_rng(0)
    if asked.endswith("s"):
        samples = rng.uniform(-0.1, 0.1, round(float(asked[:-1]) * RATE)).astype(np.float32)
        return config.towers["audio"].prepare(samples, asked)
    return config.towers["image"].prepare(rng.integers(0, 256, (*map(int, asked.split("x")), 3), np.uint8), asked)


def measure(engine: Engine, asked: str) -> dict[str, Any]:
    config, ops, xp = engine.config, engine.ops, engine.ops.xp
    medium = medium_of(config, asked)
    tower, weights = config.towers[medium.kind], engine.model.weights.towers[medium.kind]
    first = timed(lambda: tower.encode(medium, weights, ops), xp)
    took = None
    if xp is not np:
        pool = xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
    times = [timed(lambda: tower.encode(medium, weights, ops), xp) for _ in range(5)]
    if xp is not np:
        took = pool.total_bytes() - before
    ids, cache = [1, *medium.ids, 2], Cache(config, engine.scheme, 1, medium.tokens + 2, ops)

    def prefill() -> None:
        cache.reset(0)
        batch = cache.batch_for([0], [len(ids)]).reading([ids], [medium])
        engine.model.forward(np.array(ids), cache, batch)

    prefill()  # and the features are kept
    read = [timed(prefill, xp) for _ in range(3)]
    return {
        "size": asked, "tokens": medium.tokens, "tower_ms": statistics.median(times), "first_ms": first,
        "tower_bytes": took, "predicted_bytes": tower.work_bytes(medium.tokens, ops), "prefill_ms": min(read),
        "device": ops.name,
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    preset, *sizes = arguments or ["qwen3-vl-8b"]
    engine = presets.load(presets.config_of(preset), "int2", "auto")
    for size in sizes or SIZES:
        print(json.dumps(measure(engine, size)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
