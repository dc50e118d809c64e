"""What a prompt cache saves, measured: python -m tools.prompt_cache [--tokens N] writes docs/results/prompt-cache.json.

A document is read and saved; then the file is loaded and a question behind it answered with one token, as `generate
--cache` does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minioscar import load
from minioscar.evaluation.fidelity import default_text
from minioscar.storage.files import replacing

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "prompt-cache.json"
QUESTION = "What is this text about?"


def measure(model: str, kv: str, tokens: int, device: str) -> dict:
    """Sizes in bytes, times in seconds of processor time, which other work on the machine does not blur."""
    engine = load(model, kv, device)
    document = engine.tokenizer.decode(engine.encode(default_text(), chat=False)[:tokens])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.kv.safetensors"
        engine.weights_sha256  # noqa: B018  once a process, and not what is measured
        seconds, cache = timed(lambda: engine.prefill(document))
        row = {"kv": kv, "tokens": len(cache), "read_s": seconds}
        row["save_s"], _ = timed(lambda: cache.save(file))
        row["load_s"], loaded = timed(lambda: engine.load_cache(file))
        row["file_bytes"] = file.stat().st_size
    row["first_token_from_cache_s"], answer = timed(lambda: engine.generate(QUESTION, cache=loaded, max_tokens=1))
    row["first_token_without_s"], _ = timed(lambda: engine.generate(f"{document}\n\n{QUESTION}", max_tokens=1))
    return row | {"question_tokens": answer.prefilled_tokens}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = [measure(args.model, kv, args.tokens, args.device) for kv in ("bf16", "int2", "int2-compact")]
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    meta = {
        "model": args.model,
        "device": args.device,
        "cpu": platform.machine(),
        "threads": int(threads),
        "numpy": np.__version__,
    }
    with replacing(RESULTS) as partial:
        partial.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
