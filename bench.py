"""How fast and how small: kernels, decode steps, prefill, throughput and memory, each beside the machine's limit.

    python bench.py all --quick                           does everything run, and about how fast? Under a minute
    python bench.py decode --model smollm2-135m --kv bf16,int2 --context 512,2048 --json cpu.json
    python bench.py kernel --sweep --peers --json f.json  on a GPU: all shapes, how time grows, other kernels
    python bench.py throughput --random-weights qwen3-8b --budget 24GB,48GB
    python bench.py memory --random-weights qwen3-0.6b --kv bf16,oscar,int2
    python bench.py serve --random-weights qwen3-8b --kv int2 --slots 48 --clients 1,8,48

kernel      decode attention: bytes that must move, over the measured copy rate. On a GPU also the kernels that write
            the cache, linear layers, sampling and prefill attention, against bytes or operations
decode      a step of a whole model: weights and cache read once, over the copy rate; --breakdown: its kernels
prefill     one prompt: multiply-adds over the measured matrix rate
throughput  decode steps of the largest batch that runs in a budget of memory, weights included
memory      bytes allocated for a cache, and the peak of it and a step, or a prompt; how fast weights of these shapes
            are loaded, beside one copy of the same bytes
start       from the start of `python -m minioscar generate` to the first text of its answer; needs a model with files
serve       `minioscar serve` under load, over HTTP: time to the first token, between tokens, tokens/s; not among `all`

The limits are measured first. Times are medians after a warm-up; spread is (max - min) / median. On a GPU, kernels are
replayed from one graph over caches larger than L2, peers alike, with pauses that keep the card below its power limit;
"sustained" is without pauses. Without a GPU everything runs in NumPy, kernel at small shapes: that tests the bench and
says nothing about a GPU. Peers are PyTorch, Triton, FlashInfer and transformers with its DynamicCache and its 2-bit
caches (HQQ, quanto); one that is not installed has the reason in place of its time. Tables go to stdout, progress to
stderr, everything to --json.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import cases, loading, memory, models, peers, presets, quantized, serve, start
from benchmarks.measure import ceilings
from benchmarks.runs import Runs, asked_schemes, parse_runs
from benchmarks.table import line, table
from minioscar.app import cli
from minioscar.engine import Engine
from minioscar.errors import Failure, UserError
from minioscar.ops import backend
from minioscar.ops.decode import unsupported
from minioscar.ops.reference import Reference
from minioscar.storage import strict_json as json
from minioscar.storage.files import check_writable, descriptor, replacing

COMMANDS = ("kernel", "decode", "prefill", "throughput", "memory", "start")  # of `all`: a server wants the memory
SECTIONS = ("kernel", "sustained", "dense", "sweep", "growth", "skipped", "decode", "breakdown", "prefill")
SECTIONS += ("throughput", "memory", "load", "start", "serve")
PACKAGES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "ml_dtypes")
PACKAGES += ("torch", "triton", "transformers", "flashinfer-python", "hqq", "optimum-quanto")  # the peers'
Rows = Iterator[tuple[str, dict]]  # section and row, as they are measured


def parser() -> cli.Parser:
    found = cli.Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("what", choices=(*COMMANDS, "serve", "all"), help="what to measure (above)")
    model = found.add_mutually_exclusive_group()
    model.add_argument(
        "--model", default="smollm2-135m", help="folder, name under weights/, or Hugging Face id (smollm2-135m)"
    )
    shapes = f"{', '.join(presets.PRESETS)}, or the path of a config.json"
    model.add_argument(
        "--random-weights", metavar="PRESET", help=f"instead of --model, a shape without files: {shapes}"
    )
    found.add_argument(
        "--weights", choices=quantized.NAMES, help="quantized: int8 and int4 as minioscar makes them, awq (groups of "
        "128, head int8) and fp8 (blocks of 128 x 128) as files have them, random (no)",
    )
    found.add_argument(
        "--kv", help="schemes; prefill and start take the last (bf16,int2). kernel: decode attention of these alone"
    )
    found.add_argument(
        "--context",
        help="tokens in the cache, multiples of 128 (decode: 512,2048; else 4096; a CPU's throughput: 1024)",
    )
    found.add_argument("--batch", default="1", help="sequences of decode and memory (1)")
    found.add_argument("--tokens", help="prompt lengths of prefill (512,2048)")
    found.add_argument(
        "--budget", help="of throughput, weights included, such as 24GB,48GB (24GB; on a CPU the weights and 64MB)"
    )
    found.add_argument(
        "--gpus", type=int, default=1, help="decode, prefill, throughput: split the model over so many, beside the "
        "limit of them all; a budget is each one's (1)",
    )
    found.add_argument("--steps", type=int, help="decode steps timed (20)")
    found.add_argument(
        "--sweep",
        action="store_true",
        help="kernel: also contexts, batches, schemes and group sizes, and how time grows",
    )
    found.add_argument(
        "--breakdown", action="store_true", help="decode, on a GPU: also every kernel of a step by itself"
    )
    serve.add_options(found)
    found.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    found.add_argument(
        "--peers", action="store_true", help="other libraries in the same run: kernels, whole models; needs a GPU"
    )
    found.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: the GPU if there is one"
    )
    found.add_argument("--json", metavar="F", help="write everything to a file; - is stdout, tables go to stderr then")
    return found


def measured(
    args: argparse.Namespace, commands: tuple[str, ...], runs: Runs | None, ops: Reference, limits: dict[str, float]
) -> Rows:
    if "kernel" in commands:
        yield from kernel_rows(args, ops, limits)
    if "start" in commands:
        progress("start: a process each time")
        yield "start", start.start(args.model, runs.schemes[-1].name, ops.name, 2 if args.quick else 15)
    if set(commands) - {"kernel", "start"}:
        found = []
        for scheme in runs.schemes:  # one at a time: on a card two models may not fit
            of_all = {name: rate * args.gpus for name, rate in limits.items()}
            for section, row in whole_model(runs, runs.load(scheme), of_all, 2 if args.quick else 3, args.breakdown):
                found.append((section, row))
                yield section, row
            runs.ops.release()
        if "memory" in commands:
            yield "load", loading.loading(runs.config, runs.model, ops, 2 if args.quick else 15)
        if args.peers:
            progress("transformers, end to end")
            peers.beside(runs.config, found, runs.steps)


def kernel_rows(args: argparse.Namespace, ops: Reference, limits: dict[str, float]) -> Rows:
    copy_rate = limits["copy_tb_s"] * 1e12
    kvs = [scheme.name for scheme in asked_schemes(args.kv)] if args.kv else None
    cases.check_kernels(kvs or ())
    if ops.name == "cuda":
        from benchmarks import dense, experts, kernels

        headlines, swept = cases.cases(args.quick, kvs), cases.sweep(args.quick, kvs)
    else:
        headlines, swept = cases.small_cases(args.quick, kvs), cases.small_sweep(args.quick, kvs)

    def measure(wanted: list[cases.Case]) -> Iterator[dict]:
        if ops.name == "cuda":
            return kernels.measure(wanted, copy_rate, args.peers)
        return models.reference_kernel(wanted, ops, copy_rate, 3 if args.quick else 10)

    for row in measure(headlines):
        yield "skipped" if "skipped" in row else "kernel", row
    if ops.name == "cuda":
        if not args.quick:  # what is too large has been skipped above
            rows = kernels.measure(cases.sustained(kvs), copy_rate, args.peers, rest=False)
            yield from (("sustained", row) for row in rows if "skipped" not in row)
    if ops.name == "cuda" and not kvs:
        yield from (("kernel", row) for row in kernels.writing(copy_rate))
        yield from (("kernel", row) for row in kernels.flushing(copy_rate))
        for of in (dense, experts):
            yield from (("dense", row) for row in of.measure(copy_rate, limits["matmul_tflop_s"] * 1e12, args.quick))
    if args.sweep:
        found = []
        for row in measure(swept):
            found.append(row)
            yield "skipped" if "skipped" in row else "sweep", row
        yield from (("growth", row) for row in cases.growth([row for row in found if "skipped" not in row], copy_rate))


def whole_model(runs: Runs, e: Engine, limits: dict[str, float], prefills: int, breakdown: bool) -> Rows:
    if breakdown:
        from benchmarks.breakdown import kernels_of
    for context in runs.contexts.get("decode", ()):
        for batch in runs.batches:
            yield "decode", models.decode(e, runs.model, batch, context, limits, runs.steps)
            if breakdown and unsupported(e.config, e.scheme, batch) is None:
                yield from (("breakdown", row) for row in kernels_of(e, batch, context, limits["copy_tb_s"] * 1e12))
    for context in runs.contexts.get("memory", ()):
        for batch in runs.batches:
            yield "memory", memory.memory(e, runs.model, batch, context)
    for context in runs.contexts.get("throughput", ()):
        for budget in runs.budgets:
            yield "throughput", memory.throughput(e, runs.model, budget, context, runs.steps)
    if e.scheme is runs.schemes[-1]:  # a prompt is read at full precision: the schemes differ in little
        for tokens in runs.prompts:
            yield "prefill", models.prefill(e, runs.model, tokens, limits, prefills)


# --- what it was measured on


def meta(
    ops: Reference, args: argparse.Namespace, argv: list[str], program: str = "bench.py"
) -> dict[str, object]:
    about = {
        "device": ops.name,
        "quick": args.quick,
        "command": " ".join([program, *argv]),
        "versions": versions(),
        "commit": commit(),
    }
    about["date"] = datetime.date.today().isoformat()
    if ops.name == "cuda":
        runtime = ops.xp.cuda.runtime
        card = runtime.getDeviceProperties(0)["name"].decode()
        return {
            "card": card,
            "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": runtime.runtimeGetVersion(),
            **({"gpus": args.gpus, "links": links()} if args.gpus > 1 else {}),
            **about,
        }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about["note"] = "kernel is the NumPy reference at small shapes; nothing here says anything about a GPU"
    return {
        "card": f"no GPU: {cores} CPU cores, {cpu_name()}, {platform.machine()}",
        "driver": None,
        "cuda": None,
        **about,
    }


def links() -> list[str]:
    """How the GPUs of this machine reach each other: a line for each."""
    try:
        said_all = subprocess.run(("nvidia-smi", "topo", "-m"), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ["unknown: nvidia-smi did not say"]
    found = [" ".join(line.split()) for line in said_all.splitlines() if line.strip().startswith("GPU")]
    return [*found, *(f"{name}={os.environ[name]}" for name in ("NCCL_P2P_DISABLE",) if name in os.environ)]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    return said("git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty")


def said(*command: str) -> str:
    """The first line that a program prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"unknown: {command[0]} did not say"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


# --- what is shown


def progress(text: str = "") -> None:
    """A line on stderr, on a terminal in the place of the last one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    commands = COMMANDS if args.what == "all" else (args.what,)
    if args.json is not None:
        check_writable(args.json, inputs=filter(None, [args.random_weights]))
    ops = backend(args.device)
    if args.gpus != 1 and set(commands) - {"decode", "prefill", "throughput"}:
        raise UserError(f"--gpus {args.gpus} is for decode, prefill and throughput; ask for one of them")
    if ops.name != "cuda" and (args.peers or args.breakdown):
        what = (
            "--peers needs a GPU: the other libraries are" if args.peers else "--breakdown needs a GPU: its kernels are"
        )
        raise UserError(f"{what} measured on nothing else")
    if "start" in commands and (reason := start.missing(args.model, args.random_weights)):
        if args.what == "start":
            raise UserError(reason)
        commands = tuple(command for command in commands if command != "start")
        print(f"bench: {reason}", file=sys.stderr)
    served = serve.parse(args, ops) if args.what == "serve" else None
    runs = parse_runs(args, commands, ops) if set(commands) - {"kernel", "serve"} else None
    progress("measuring copy bandwidth and matrix rate")
    about, limits = meta(ops, args, argv), ceilings(ops, args.quick)
    ops.release()
    report: dict = {"meta": about, "ceilings": limits, **{section: [] for section in SECTIONS}}
    tables = sys.stderr if args.json is not None and descriptor(args.json) == 1 else sys.stdout
    rows = (("serve", row) for row in serve.measure(*served)) if served else measured(args, commands, runs, ops, limits)
    try:
        for section, row in rows:
            report[section].append(row)
            progress(f"{section}: {line(section, row)}")
        if args.json is not None:
            with replacing(args.json) as path:
                path.write_text(json.dumps(report, indent=1) + "\n")
    finally:  # what there is when something breaks off, too
        progress()
        rates = f"copy {limits['copy_tb_s']:.4g} TB/s, matrix product {limits['matmul_tflop_s']:.4g} TFLOP/s"
        print(f"{about['card']}: {rates}", file=tables)
        texts = (text for section in SECTIONS for text in table(section, report[section]))
        print(*filter(None, [about.get("note")]), *texts, sep="\n", file=tables)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 (failure), 2 (wrong use or input), 130 (Ctrl-C)."""
    return cli.run("bench", run, argv, explained)


def explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error; one that nobody foresaw is raised."""
    match error:
        case MemoryError():
            return 1, f"out of memory ({error}); give a shorter --context or a smaller --batch"
        case KeyboardInterrupt():
            return 130, "interrupted; --json is not written"
        case UserError() | Failure():
            return cli.explained(error)
    raise error


if __name__ == "__main__":
    raise SystemExit(main())
