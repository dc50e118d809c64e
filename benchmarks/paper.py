"""The paper's benchmarks of pictures and sound, for who has the data: `python -m benchmarks.paper ocrbench|mmau-pro
MODEL --data FOLDER [--kv bf16,int2,oscar] [--out DIR]`.

Each scheme's answers go to a file of their own in --out, with which a run that broke off goes on; the table has them
beside what the paper reports. docs/benchmarks.md says where the data is and what is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import minioscar.evaluation.baselines  # noqa: F401  registers its schemes
from minioscar.app import cli
from minioscar.arguments import scheme_named
from minioscar.engine import load
from minioscar.errors import UserError
from minioscar.storage.files import replacing
from minioscar.tables import markdown
from minioscar.version import __version__

from . import mmau_pro, ocrbench
from .questions import ask, some

# README.md of github.com/ZunhaiSu/OScaR-KV-Quant, the code of arXiv 2605.19660. Rows: a method, and ours of its name
METHODS = {"bf16": "16 bit", "quarot": "QuaRot", "kivi": "KIVI", "ott": "OTT", "oscar": "OScaR"}
REPORTED: dict[str, tuple[tuple[str, ...], dict[str, tuple[float, ...]]]] = {
    "ocrbench": (("LLaVA-v1.6-7B", "Qwen3-VL-8B", "Qwen3-VL-4B"), {
        "16 bit": (536, 858, 852), "QuaRot": (481, 722, 773), "RotateKV": (473, 754, 638), "KIVI": (488, 851, 813),
        "OTT": (513, 850, 831), "TurboQuant+ (2.5 bit)": (501, 847, 828), "OScaR": (519, 856, 838),
    }),
    "mmau-pro": (("open-ended", "good rate", "AIF"), {
        "16 bit": (66.2, 27.8, 87.4), "KIVI": (65.8, 27.0, 78.2), "OTT": (65.8, 26.9, 83.9),
        "TurboQuant+ (2.5 bit)": (66.6, 27.0, 79.3), "OScaR": (67.4, 29.8, 88.5),
    }),
}  # fmt: skip
MARKS = ("open", "good", "aif")  # of mmau_pro.scored, in the order of the paper's columns


def parsed(argv: list[str]) -> argparse.Namespace:
    """Raises UserError for what cannot be, before anything is read."""
    parser = cli.Parser(prog="benchmarks.paper", description=__doc__.partition("\n\n")[0])
    parser.add_argument("benchmark", choices=REPORTED, metavar="|".join(REPORTED))
    parser.add_argument("model", metavar="MODEL", help="as `minioscar generate` takes it")
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="the data set's own files")
    parser.add_argument("--kv", default="bf16,int2,oscar,kivi", help="schemes, with commas (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("paper"), help="a folder for answers, results (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="so many questions, evenly; no score of the benchmark")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (100; mmau-pro: 1024)")
    parser.add_argument("--all", action="store_true", help="mmau-pro: questions with choices, too, for their script")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--debug", action="store_true", help="a traceback where something fails")
    args = parser.parse_args(argv)
    args.kv = [scheme_named(name).name for name in args.kv.split(",")]
    for name in ("limit", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; it must be at least 1")
    if args.all and args.benchmark != "mmau-pro":
        raise UserError("--all is of mmau-pro; leave it out")
    if not args.data.is_dir():
        raise UserError(f"--data {args.data} is no folder; name the one with the data set's files")
    return args


def run(argv: list[str]) -> None:
    args = parsed(argv)
    if args.benchmark == "ocrbench":
        rows, most = ocrbench.rows(args.data), ocrbench.MAX_TOKENS
    else:
        rows, most = mmau_pro.rows(args.data, *([()] if args.all else [])), mmau_pro.MAX_TOKENS
    total, rows = len(rows), some(rows, args.limit)
    about = {"benchmark": args.benchmark, "model": args.model, "max_tokens": args.max_tokens or most}
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for kv in args.kv:
        stem = str(args.out / f"{args.benchmark}-{Path(args.model).name}-{kv}")
        engine = load(args.model, kv, args.device, progress=sys.stderr.isatty())
        answers = ask(engine, [row.asked for row in rows], Path(f"{stem}.jsonl"), about)
        results[kv] = _scored(args, rows, answers, stem) | {"of": total, "device": engine.ops.name}
        del engine  # its memory is the next one's
        with replacing(f"{stem}.json") as path:
            path.write_text(json.dumps({**about, "kv": kv, "version": __version__, **results[kv]}, indent=1) + "\n")
    print(*table(args.benchmark, args.model, results), sep="\n")


def _scored(args: argparse.Namespace, rows: Sequence[Any], answers: Mapping[int, str], stem: str) -> dict[str, Any]:
    if args.benchmark == "ocrbench":
        return ocrbench.scored(rows, answers)
    out = Path(f"{stem}.parquet")
    is_same = mmau_pro.write(args.data, rows, answers, out)
    found = mmau_pro.scored(rows, answers, out if is_same else None)
    if found["open"] is None:
        print(f"[open answers are not judged: run MMAU-Pro's own script on {out}, then this again]", file=sys.stderr)
    return found


def table(benchmark: str, model: str, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: the paper's methods, ours of the same name beside them, and our other schemes below."""
    columns, reported = REPORTED[benchmark]
    name = Path(model).name
    ours = [f"{name} here"] if benchmark == "ocrbench" else [f"{name} here: {column}" for column in columns]
    cells = {METHODS.get(kv, f"`{kv}`"): _cells(benchmark, result) for kv, result in results.items()}
    rows = [
        [method, *cells.get(method, [""] * len(ours)), *(f"{x:g}" for x in reported.get(method, ())),
         *[""] * (0 if method in reported else len(columns))]
        for method in dict.fromkeys([*reported, *cells])
    ]  # fmt: skip
    lines = markdown(["method", *ours, *(f"paper: {column}" for column in columns)], rows)
    asked, of = next((result["questions"], result["of"]) for result in results.values())
    part = f"{asked} of its {of} questions: no score of the benchmark" if asked < of else f"{asked} questions"
    whole = ocrbench.QUESTIONS if benchmark == "ocrbench" else None
    if whole and asked == of != whole:
        part = f"{asked} questions, not the {whole} of the benchmark"
    return [*lines, "", f"{benchmark}: {part}. The paper's numbers are its README's; its prompts are not published."]


def _cells(benchmark: str, result: Mapping[str, Any]) -> list[str]:
    if benchmark == "ocrbench":
        return [str(result["score"])]
    return ["–" if result[mark] is None else f"{100 * result[mark]:.1f}" for mark in MARKS]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as `minioscar` does."""
    return cli.run("benchmarks.paper", run, argv, cli.explained)


if __name__ == "__main__":
    raise SystemExit(main())
