"""Fills the tables of README.md from docs/results/*.json: `make results`. A figure in the README is never typed by hand.

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`; NAME is a function below.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def fidelity() -> str:
    """eval --json of SmolLM2-135M."""
    report = load("eval-smollm2-135m")
    lines = ["| `--kv` | bits/element | KL to BF16 | ΔNLL | same top token |", "| --- | --- | --- | --- | --- |"]
    for row in report["results"]:
        lines.append("| `{kv}` | {bits_per_element:.3f} | {kl:.4f} | {dnll:+.4f} | {top1:.1%} |".format(**row))
    lines.append("")
    where = f"({report['device']}), one window of the default text"
    lines.append(f"{report['prefill']} tokens prefilled, then {report['decode']} decoded teacher-forced {where}.")
    return "\n".join(lines)


def cpu() -> str:
    """bench.py all --json on a machine with no GPU."""
    report = load("cpu")
    limits = report["ceilings"]
    lines = ["| | `--kv` | tokens | tokens/s | of the limit |", "| --- | --- | --- | --- | --- |"]
    for kind, size in (("decode", "context"), ("prefill", "tokens")):
        for row in report[kind]:
            rate, share = f"{row['tokens_per_s']:.1f}", f"{row['fraction_of_limit']:.0%}"
            lines.append(f"| {kind} | `{row['kv']}` | {row[size]:,} | {rate} | {share} |")
    lines.append("")
    lines.append(
        f"SmolLM2-135M, batch 1, {report['meta']['card']}, NumPy {report['meta']['versions']['numpy']}. Limits: decode reads weights and "
        f"cache once at the measured copy bandwidth ({limits['copy_tb_s'] * 1e3:.1f} GB/s); prefill multiplies at the measured matrix "
        f"rate ({limits['matmul_tflop_s'] * 1e3:.0f} GFLOP/s)."
    )
    return "\n".join(lines)


def size() -> str:
    """du -sm of site-packages after pip install into an empty environment."""
    report = load("installed-size")
    lines = ["| installed with | MB |", "| --- | --- |"]
    lines += [f"| `{row['command']}` | {row['mb']:,} |" for row in report["rows"]]
    lines.append("")
    lines.append(report["note"])
    return "\n".join(lines)


TABLES = {"fidelity": fidelity, "cpu": cpu, "size": size}


def rendered(text: str) -> str:
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + "\n" + block[3], text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text()))
