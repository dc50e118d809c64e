"""Fidelity on texts that repeat themselves: `python -m tools.texts MODEL > docs/results/texts-NAME.json`.

Machines write much of what models read: logs, tables, code, encoded bytes. Equal tokens have equal rounding errors,
which do not average out unless values are dithered; the extreme is one token, over and over. All of these texts are the
same in every run (the code is Python's own argparse, so it is that of the Python that runs this).
"""

from __future__ import annotations

import argparse
import base64
import inspect
import json
from dataclasses import replace

import numpy as np

from minioscar.app.commands import known_schemes
from minioscar.arguments import scheme_named
from minioscar.config import Config
from minioscar.evaluation import fidelity
from minioscar.ops import backend
from minioscar.oscar import SCHEMES
from minioscar.storage import hub
from minioscar.tokenizer import Tokenizer
from minioscar.weights import load

LINES = 400  # of a log, a table, an encoded file: at least 4 windows of 3,073 tokens
WORDS = " the", "0", "\n", "="  # one a window, each a token of its own
UNDITHERED = replace(SCHEMES["int2"], name="int2 without dither", dithered=False)
BEFORE = 64  # tokens of English before a repeated one, where it has some


def log(rng: np.random.Generator) -> str:
    """Lines that differ in a few digits."""
    return "".join(
        f"2026-03-01T12:{i // 60 % 60:02d}:{i % 60:02d}.{rng.integers(1000):03d} INFO worker[{rng.integers(4)}] "
        f"request id={48000 + i} GET /v1/items/{rng.integers(1000)} status={rng.choice([200, 200, 200, 404])} "
        f"bytes={rng.integers(100, 9999)} duration_ms={rng.integers(1, 400) / 10}\n"
        for i in range(LINES)
    )


def csv(rng: np.random.Generator) -> str:
    header = "id,date,station,temperature,humidity,pressure,status\n"
    return header + "".join(
        f"{i},2026-03-{1 + i // 48 % 31:02d},{rng.choice(['north', 'south', 'harbour'])},{rng.normal(8, 4):.1f},"
        f"{rng.integers(40, 100)},{rng.normal(1010, 9):.1f},{rng.choice(['ok', 'ok', 'ok', 'late'])}\n"
        for i in range(LINES)
    )


def encoded(rng: np.random.Generator) -> str:
    """Bytes in base64, lines of 76 characters as MIME has them."""
    return base64.encodebytes(rng.bytes(57 * LINES)).decode()


def source(rng: np.random.Generator) -> str:
    return inspect.getsource(argparse)


def english(rng: np.random.Generator) -> str:
    return fidelity.default_text()


DEFAULT = "default text"
WRITTEN = {DEFAULT: english, "log": log, "csv": csv, "source": source, "base64": encoded}
REPEATED = "one token", "one token after text"
TEXTS = (*WRITTEN, *REPEATED)


def stretches(name: str, tokenizer: Tokenizer, size: int, windows: int) -> list[list[int]]:
    """`windows` stretches of `size` tokens of one of TEXTS, at most one for each of WORDS where a token is repeated."""
    if name in WRITTEN:
        ids = tokenizer.encode(WRITTEN[name](np.random.default_rng(0)))
        return [ids[start : start + size] for start in range(0, windows * size, size)]
    before = tokenizer.encode(fidelity.default_text()[:2000])[:BEFORE] if name == "one token after text" else []
    return [(before + tokenizer.encode(word) * size)[:size] for word in WORDS[:windows]]


def measured(model: str, schemes: list[str], asked: fidelity.Lengths) -> dict:
    """The rows of `eval` for each of TEXTS, and of UNDITHERED."""
    names = [fidelity.BASELINE, *schemes]
    ops, folder = backend("auto"), hub.resolve(model)
    config, tokenizer = Config.from_folder(folder), Tokenizer(folder)
    asked.check(config)
    known_schemes()
    wanted = [*(scheme_named(name) for name in names), UNDITHERED]
    engines = fidelity.engines_for(wanted, load(folder, config, ops), [config], tokenizer, ops)
    report = {"model": folder.name, "device": ops.name} | {
        name: getattr(asked, name) for name in ("prefill", "decode", "windows")
    }
    report["texts"] = {
        name: fidelity.fidelity(
            engines, stretches(name, tokenizer, asked.window, asked.windows), asked.prefill, lambda tokens: None
        )
        for name in TEXTS
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kv", default="kivi,oscar,int2,int2-compact,k4v2")
    for name, default in (("prefill", 1024), ("decode", 512), ("windows", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    lengths = fidelity.Lengths(args.prefill, args.decode, args.windows)
    print(json.dumps(measured(args.model, args.kv.split(","), lengths), indent=1))


if __name__ == "__main__":
    main()
