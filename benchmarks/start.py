"""`bench.py start`: from the start of `python -m minioscar generate` to the first text on its stdout, which whoever
types that waits for.

Every start is a process of its own. The first one may read files from the disk; it does not count. On a GPU two more
begin with an empty cache of kernels: what the first start after the installation takes longer is what compiling
takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import minioscar
from benchmarks.measure import median_and_spread
from minioscar.app import cli
from minioscar.errors import Failure
from minioscar.ops import backend
from minioscar.storage.hub import resolve

PROMPT = "The sea is"


def missing(model: str, random_weights: str | None) -> str | None:
    """Why there is nothing to start, or None. Raises UserError for a model that there is not at all."""
    if random_weights:
        return "start needs the files of a model; give --model in place of --random-weights"
    if not (resolve(model) / "tokenizer.json").exists():
        return f"start needs a tokenizer, and {model} has none; give another --model"
    return None


def start(model: str, kv: str, device: str, repeats: int) -> dict:
    """Seconds. Raises Failure where a process fails."""
    command = [
        sys.executable,
        "-m",
        "minioscar",
        "generate",
        model,
        PROMPT,
        "--kv",
        kv,
        "--device",
        device,
        "--max-tokens",
        "2",
    ]
    first, *seconds = (first_text(command) for _ in range(1 + repeats))
    median, spread = median_and_spread(seconds)
    row = {"model": model, "kv": kv, "starts": repeats, "s": median, "spread": spread, "first_s": first}
    if device != "cuda":
        return row
    fresh = [first_text_of_a_fresh_card(command) for _ in range(2)]
    return row | {"fresh_s": min(fresh), "compile_s": min(fresh) - median}


def first_text_of_a_fresh_card(command: Sequence[str]) -> float:
    """With the kernels still to be compiled."""
    with TemporaryDirectory() as folder:
        return first_text(command, CUPY_CACHE_DIR=folder, CUDA_CACHE_DISABLE="1")


def environment(**changes: str) -> dict[str, str]:
    """Of a process that is to find this minioscar, wherever it starts."""
    places = [str(Path(minioscar.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), **changes}


def first_text(command: Sequence[str], **changes: str) -> float:
    before, pipe = time.perf_counter(), subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment(**changes)) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - before
        _, said = process.communicate()
    if process.returncode:
        reason = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise Failure(f"a start ended with exit code {process.returncode}: {reason[-1]}")
    return seconds


def first_answers(preset: str, kv: str = "int2", tokens: int = 20) -> dict[str, float]:
    """Seconds of a first answer and of a second one, in this process. What it says of compiling goes to stderr."""
    from benchmarks import presets

    engine = presets.load(presets.config_of(preset), kv, "cuda")
    engine.progress = True
    seconds = []
    for _ in range(2):
        engine.ops.xp.cuda.Device().synchronize()
        before = time.perf_counter()
        engine.generate(list(range(tokens)), max_tokens=3)
        seconds.append(time.perf_counter() - before)
    return {"first_s": seconds[0], "again_s": seconds[1]}


def run(argv: list[str]) -> None:
    preset = argv[0] if argv else "qwen3-8b"
    backend("cuda")  # says in one line what is missing
    code = f"import json; from benchmarks.start import first_answers; print(json.dumps(first_answers({preset!r})))"
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "CUPY_CACHE_DIR": folder, "CUDA_CACHE_DISABLE": "1"}
        fresh, second = (answers([sys.executable, "-c", code], environment) for _ in range(2))
    result = {"model": preset, "fresh_s": fresh["first_s"], "second_process_s": second["first_s"]}
    print(json.dumps(result | {"again_s": second["again_s"], "compile_s": fresh["first_s"] - second["first_s"]}))


def answers(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """What a process of its own measures. Raises Failure where it ends badly."""
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE)
    if ended.returncode:
        raise Failure(f"the process that answers ended with exit code {ended.returncode}; what it says stands above")
    return json.loads(ended.stdout)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.start", run, None, cli.explained))
