"""How long a prefill and a decode step take, and what fraction of the machine's limit that is.

    python bench.py decode --model smollm2-135m --kv bf16,int2 --context 512,2048 --json docs/results/cpu.json

The limit of a decode step is the bytes it must read (weights once, the cache once) over the measured copy bandwidth; that of a
prefill is its multiply-adds over the measured matrix rate. Medians after a warm-up; the spread is (max - min) / median.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from minioscar import engine
from minioscar.cache import Cache, cache_bytes
from minioscar.errors import UserError
from minioscar.ops import backend
from minioscar.weights import arrays

COMMANDS = ("kernel", "decode", "prefill", "all")


def timed(ops, run: Callable[[], object], repeats: int, warm_up: int = 2) -> tuple[float, float]:
    """Median seconds of a call and the spread of the calls. The device has finished when a call counts as done."""
    seconds = []
    for i in range(warm_up + repeats):
        start = time.perf_counter()
        run()
        if ops.name == "cuda":
            ops.xp.cuda.Device().synchronize()
        if i >= warm_up:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return median, (max(seconds) - min(seconds)) / median


def ceilings(ops) -> dict[str, float]:
    """Copy bandwidth (read + written) and the matrix rate in the dtype of the weights: the best of several, on data no cache holds."""
    rng = np.random.default_rng(0)
    if ops.name == "cuda":
        from minioscar.measure import copy_bandwidth

        n, copy = 8192, copy_bandwidth()
    else:
        n, a = 4096, rng.integers(0, 255, 2**28, dtype=np.uint8)
        b = np.empty_like(a)
        copy = 2 * a.nbytes / min(timed(ops, lambda: np.copyto(b, a), 1, 1)[0] for _ in range(8))
    x, y = (ops.array(rng.standard_normal((n, n), np.float32)) for _ in range(2))
    product = min(timed(ops, lambda: x @ y.T, 1, 1)[0] for _ in range(4))
    return {"copy_tb_s": copy / 1e12, "matmul_tflop_s": 2 * n**3 / product / 1e12}


def prefilled(e: engine.Engine, tokens: int, room: int) -> Cache:
    cache = Cache(e.config, e.scheme, 1, tokens + room, e.ops)
    ids = np.random.default_rng(1).integers(0, e.config.vocab_size, tokens)
    e.model.forward(ids, cache, cache.place([0], [tokens]))
    return cache


def decode(e: engine.Engine, name: str, context: int, limits: dict[str, float], steps: int) -> dict:
    """Steps at `context` tokens: every step is taken at the same length, whatever it appends."""
    cache = prefilled(e, context, 1)
    step = np.array([7])

    def run() -> None:
        e.model.forward(step, cache, cache.place([0], [1]))
        cache.lengths[0] = context  # of context 128 * n, so no block is ever flushed and nothing that is read changes

    seconds, spread = timed(e.ops, run, steps)
    size = sum(array.nbytes for array in arrays(e.model.weights)) + cache_bytes(e.config, e.scheme, 1, context)
    return {
        "model": name, "kv": e.scheme.name, "batch": 1, "context": context, "ms": seconds * 1e3, "spread": spread,
        "tokens_per_s": 1 / seconds, "bytes": size, "fraction_of_limit": size / (limits["copy_tb_s"] * 1e12) / seconds,
    }


def prefill(e: engine.Engine, name: str, tokens: int, limits: dict[str, float]) -> dict:
    """One prompt, logits of its last token."""
    seconds, spread = timed(e.ops, lambda: prefilled(e, tokens, 0), 3, 1)
    c = e.config
    embedding = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    flops = 2 * tokens * (c.parameters() - embedding) + 2 * tokens**2 * c.q_size * c.num_layers  # causal: half of 4 * n^2
    return {
        "model": name, "kv": e.scheme.name, "tokens": tokens, "s": seconds, "spread": spread, "tokens_per_s": tokens / seconds,
        "flops": flops, "fraction_of_limit": flops / (limits["matmul_tflop_s"] * 1e12) / seconds,
    }


def meta(ops) -> dict[str, object]:
    """What the figures were measured on."""
    found = {}
    for package in ("numpy", "cupy-cuda13x", "cupy-cuda12x", "ml_dtypes", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    about = {"versions": {"python": platform.python_version(), **found}, "commit": commit, "date": datetime.date.today().isoformat()}
    if ops.name == "cuda":
        properties = ops.xp.cuda.runtime.getDeviceProperties(0)
        runtime = ops.xp.cuda.runtime
        return {"card": properties["name"].decode(), "driver": driver(), "cuda": runtime.runtimeGetVersion(), **about}
    cores = len(os.sched_getaffinity(0))
    return {"card": f"no GPU: {cores} CPU cores, {cpu_name()}, {platform.machine()}", "driver": None, "cuda": None, **about}


def driver() -> str:
    """Version of the card's driver, as nvidia-smi says it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown: nvidia-smi did not say"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


def show(what: str, tokens: int, took: str, row: dict) -> None:
    rate, share = row["tokens_per_s"], row["fraction_of_limit"]
    print(f"{what:8}{row['kv']:13} {tokens:7} tokens {took} {rate:8.1f} tokens/s {share:6.1%} of the limit")


def show_kernel(row: dict) -> None:
    heads = f"{row['q_heads']}/{row['kv_heads']} d{row['head_dim']}"
    print(
        f"{row['op']:26}{row['kv']:13} {row['batch']:3} x {row['context']:6}  {heads:11} {row['us']:9.2f} us  "
        f"{row['fraction_of_copy']:6.1%} of copy over {row['bytes'] / 1e6:.1f} MB  {row.get('peers', '')}", flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", default="bf16,int2", help="schemes (bf16,int2)")
    parser.add_argument("--context", default="512,2048", help="tokens in the cache before the step (512,2048); multiples of 128")
    parser.add_argument("--tokens", default="512,2048", help="prompt lengths of prefill (512,2048)")
    parser.add_argument("--steps", type=int, default=20, help="decode steps timed (20)")
    parser.add_argument("--quick", action="store_true", help="kernel: two cases only")
    parser.add_argument("--peers", action="store_true", help="kernel: torch's attention kernels in the same run")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--json", metavar="F", help="write the result to a file")
    args = parser.parse_args(argv)
    try:
        contexts, prompts = ([int(n) for n in text.split(",")] for text in (args.context, args.tokens))
        ops = backend(args.device)
        if args.what == "kernel" and ops.name != "cuda":
            raise UserError("kernel needs a GPU; decode and prefill run anywhere")
        names = args.kv.split(",") if args.what != "kernel" else []
        engines = [engine.load(args.model, kv, args.device, tokenizer=False) for kv in names]
    except (UserError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    limits = ceilings(ops)
    report: dict = {"meta": meta(ops), "ceilings": limits, "kernel": [], "decode": [], "prefill": []}
    print(f"{report['meta']['card']}: copy {limits['copy_tb_s']:.4g} TB/s, matrix product {limits['matmul_tflop_s']:.4g} TFLOP/s")
    if ops.name == "cuda" and args.what in ("kernel", "all"):
        import bench_kernels

        report["kernel"] = bench_kernels.measure(limits["copy_tb_s"] * 1e12, args.quick, args.peers, show_kernel)
    for e in engines:
        for context in contexts if args.what in ("decode", "all") else ():
            row = decode(e, args.model, context, limits, args.steps)
            report["decode"].append(row)
            show("decode", context, f"{row['ms']:9.2f} ms", row)
    for tokens in prompts if args.what in ("prefill", "all") else ():
        row = prefill(engines[-1], args.model, tokens, limits)
        report["prefill"].append(row)
        show("prefill", tokens, f"{row['s']:9.2f} s ", row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
