"""A picture, a sound or a video through a tower, and its tokens through the model: `python -m benchmarks.pictures
[PRESET] [HxW, SECONDSs or FRAMESfHxW ...]`, such as 1024x1024, 30s and 120f720x1280, a minute at two frames a second.

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
from benchmarks.measure import own_pool
from minioscar.app import cli
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


def media_for(config: Config, asked: str) -> list[Medium]:
    """Noise of a size "HxW", of so many seconds, "Ns", or of so many frames, "NfHxW"."""
    rng = np.random.default_rng(0)
    if "f" in asked:
        count, _, size = asked.partition("f")
        tower = config.towers["video"]
        frames = rng.integers(0, 256, (int(count), *map(int, size.split("x")), 3), np.uint8)
        made = tower.prepare({"frames": frames, "fps": tower.rate}, asked)
        return [medium for medium in made if isinstance(medium, Medium)]
    if asked.endswith("s"):
        samples = rng.uniform(-0.1, 0.1, round(float(asked[:-1]) * RATE)).astype(np.float32)
        return [config.towers["audio"].prepare(samples, asked)]
    return [config.towers["image"].prepare(rng.integers(0, 256, (*map(int, asked.split("x")), 3), np.uint8), asked)]


def measure(engine: Engine, asked: str) -> dict[str, Any]:
    config, ops, xp = engine.config, engine.ops, engine.ops.xp
    media = media_for(config, asked)
    tower = config.towers[media[0].kind]
    weights = engine.model.weights.towers[tower.weights_of]

    def encode() -> None:
        for medium in media:
            tower.encode(medium, weights, ops)

    first = timed(encode, xp)
    took = None
    if xp is not np:
        with own_pool(xp) as taken:
            encode()
            took = taken()
    times = [timed(encode, xp) for _ in range(5)]
    tokens = sum(medium.tokens for medium in media)
    ids = [1, *(i for medium in media for i in medium.ids), 2]
    cache = Cache(config, engine.scheme, 1, len(ids), ops)

    def prefill() -> None:
        cache.reset(0)
        batch = cache.batch_for([0], [len(ids)]).reading([ids], media)
        engine.model.forward(np.array(ids), cache, batch)

    prefill()  # and the features are kept
    read = [timed(prefill, xp) for _ in range(3)]
    return {
        "size": asked, "tokens": tokens, "tower_ms": statistics.median(times), "first_ms": first,
        "tower_bytes": took, "predicted_bytes": tower.work_bytes(media[0].tokens, ops), "prefill_ms": min(read),
        "device": ops.name,
    }  # fmt: skip


def run(arguments: list[str]) -> None:
    preset, *sizes = arguments or ["qwen3-vl-8b"]
    engine = presets.load(presets.config_of(preset), "int2", "auto")
    for size in sizes or SIZES:
        print(json.dumps(measure(engine, size)), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.pictures", run, None, cli.explained))
