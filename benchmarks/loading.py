"""`bench.py memory`, its last row: a checkpoint from files that the system holds in memory to where the model is
computed. Over several cards by itself:

    python -m benchmarks.loading qwen3-8b --weights awq --gpus 2
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks import presets, quantized
from benchmarks.measure import host_copy_bandwidth, median_and_spread
from minioscar import tables, weights, work_bytes
from minioscar.app import cli
from minioscar.cache import BF16
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.ops import backend
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES
from minioscar.parallel import cards
from minioscar.parallel.backend import Split
from minioscar.parallel.loading import load_parts
from minioscar.storage import checkpoint

MAX_BYTES, MAX_BYTES_CPU = 4 * 10**9, 64 * 10**6  # bytes of the files
COPIED = 256 << 20  # at a time, by the copy that is the limit


def loading(config: Config, name: str, ops: Reference, repeats: int) -> dict:
    """Two shards of BF16 or of the config's format, the model's own shapes, as many layers as MAX_BYTES holds. The
    limit is one copy of the same bytes out of pinned memory, or on a CPU from memory to memory. The first load, which
    also pins its buffers, is `first_s`."""
    config = shortened(config, MAX_BYTES if ops.name == "cuda" else MAX_BYTES_CPU)
    size, free = file_bytes(config), shutil.disk_usage(tempfile.gettempdir()).free
    if size > free:
        raise UserError(
            f"memory writes a checkpoint of {tables.size(size)} to {tempfile.gettempdir()}, which has "
            f"{tables.size(free)} free"
        )
    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder), config)
        seconds = [once(Path(folder), config, ops) for _ in range(1 + repeats)]
    (median, spread), copy = median_and_spread(seconds[1:]), copy_rate(ops.first)
    times = {"s": median, "spread": spread, "first_s": seconds[0], "gb_s": written / median / 1e9}
    return {"model": name, "layers": config.num_layers, "bytes": written, **times, "copy_gb_s": copy / 1e9,
            "fraction_of_copy": written / median / copy}  # fmt: skip


def file_bytes(config: Config) -> int:
    """Of the numbers of a checkpoint, about: without the tensors of a format that are small."""
    return work_bytes.of_weights(replace(config, weights=None), 2)


def shortened(config: Config, most: int) -> Config:
    """With as many layers as `most` bytes of files hold, but at least one."""
    one, two = (file_bytes(replace(config, num_layers=n)) for n in (1, 2))
    return replace(config, num_layers=min(config.num_layers, 1 + max(most - one, 0) // (two - one)))


def write(folder: Path, config: Config) -> int:
    """The bytes of the tensors in two shards, which are on the disk when it returns: what is still to be written
    would slow a load. BF16, or the tensors of the config's format with random codes."""
    rng, made = np.random.default_rng(0), dict[str, np.ndarray]()
    block = rng.standard_normal(1 << 20, np.float32).astype(BF16)
    for tensor, shape in weights.expected(config).items():
        if config.quantization is not None and tensor in weights.matrices(config) and "head" not in tensor:
            for last, array in quantized.tensors(config.quantization, *shape, rng).items():
                made[tensor.removesuffix("weight") + last] = array
        else:
            made[tensor] = np.resize(block, shape)
    total, at, places = sum(array.nbytes for array in made.values()), 0, {}
    for tensor, array in made.items():
        places[tensor] = f"model-{1 + 2 * at // total}.safetensors"
        at += array.nbytes
    for file in sorted(set(places.values())):
        save_file({tensor: made[tensor] for tensor, place in places.items() if place == file}, folder / file)
        with open(folder / file, "rb+") as written:
            os.fsync(written)
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": places}))
    return total


def once(folder: Path, config: Config, ops: Reference) -> float:
    """Seconds of a load, the memory for it included: it is given back before."""
    ops.release()
    before = time.perf_counter()
    loaded = load_parts(folder, config, ops) if isinstance(ops, Split) else weights.load(folder, config, ops)
    seconds = time.perf_counter() - before
    del loaded
    ops.release()
    return seconds


def copy_rate(ops: Reference) -> float:
    """Bytes per second, counted once; the best of eight."""
    if ops.name != "cuda":
        return host_copy_bandwidth(ops, COPIED // 4) / 2
    return COPIED / min(_pinned_copies(ops))


def _pinned_copies(ops: Reference) -> Iterator[float]:
    from minioscar.storage.upload import pinned

    source, there = pinned((COPIED,), np.uint8), ops.xp.empty(COPIED, np.uint8)
    source.fill(1)
    for _ in range(8):
        start, end = ops.xp.cuda.Event(), ops.xp.cuda.Event()
        start.record()
        there.set(source, stream=ops.xp.cuda.get_current_stream())
        end.record()
        end.synchronize()
        yield ops.xp.cuda.get_elapsed_time(start, end) * 1e-3


def run(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m benchmarks.loading")
    parser.add_argument("preset")
    parser.add_argument("--weights", choices=quantized.NAMES)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    config, ops = quantized.config_with(presets.config_of(args.preset), args.weights), backend(args.device)
    ops = cards.over(args.gpus, ops, config, SCHEMES["bf16"])
    print(json.dumps(loading(config, args.preset, ops, 5) | {"weights": args.weights, "gpus": args.gpus}))


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.loading", run, None, cli.explained))
