"""Fills the tables of README.md and docs/fidelity.md from docs/results/*.json: `make results`. A figure is never typed by hand.

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`; NAME is a function below.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


PAGES = ("README.md", "docs/fidelity.md")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def fidelity() -> str:
    """eval --json of SmolLM2-135M."""
    report = load("eval-smollm2-135m")
    lines = ["| `--kv` | bits/element | KL to BF16 | ΔNLL | same top token |", "| --- | --- | --- | --- | --- |"]
    for row in report["results"]:
        spread = "" if row["kv"] == "bf16" else " ± {kl_se:.4f}"
        lines.append(("| `{kv}` | {bits_per_element:.3f} | {kl:.4f}" + spread + " | {dnll:+.4f} | {top1:.1%} |").format(**row))
    lines.append("")
    where = f"({report['device']}); mean and standard error of {report['windows']} windows of the default text"
    lines.append(f"{report['prefill']} tokens prefilled, then {report['decode']} decoded teacher-forced {where}.")
    return "\n".join(lines)


def models() -> str:
    """The same for both models, and what an allocated cache takes, window and sinks included."""
    reports = [load("eval-smollm2-135m"), load("eval-smollm2-135m-key-biases")]
    lines = [
        "| `--kv` | bits/element | all of it | SmolLM2-135M: KL | of `oscar`'s | with key biases: KL | of `oscar`'s |",
        "| --- |" + " --- |" * 6,
    ]
    for rows in zip(*(report["results"] for report in reports), strict=True):
        name, cells = rows[0]["kv"], []
        for row, report in zip(rows, reports, strict=True):
            anchor = next(other["kl"] for other in report["results"] if other["kv"] == "oscar")
            cells += ["{kl:.4f} ± {kl_se:.4f}".format(**row), f"{row['kl'] / anchor:.2f}"] if name != "bf16" else ["0", "0"]
        whole = everything(name, reports[0]["prefill"] + reports[0]["decode"])
        lines.append(f"| `{name}` | {rows[0]['bits_per_element']:.3f} | {whole:.2f} | " + " | ".join(cells) + " |")
    first, second = (
        f"{r['prefill']:,} tokens prefilled and {r['decode']:,} decoded teacher-forced in {r['windows']} windows (NLL unquantized "
        f"{r['results'][0]['nll']:.3f})"
        for r in reports
    )
    lines += [
        "",
        f"SmolLM2: {first}; with key biases: {second}; mean and standard error. *All of it*: bits per element of the whole allocated cache "
        f"at {reports[0]['prefill'] + reports[0]['decode']:,} tokens, with norms, sinks and the window of 128 tokens in BF16, which weigh "
        "less the longer the context is.",
    ]
    return "\n".join(lines)


def everything(kv: str, context: int) -> float:
    """Bits per element of an allocated cache of SmolLM2-135M."""
    from minioscar.cache import cache_bytes
    from minioscar.config import Config
    from minioscar.oscar import SCHEMES

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = Config.from_dict({"model_type": "llama", "vocab_size": 49152, **shape})
    return 16 * cache_bytes(config, SCHEMES[kv], 1, context) / cache_bytes(config, SCHEMES["bf16"], 1, context)


def ideas() -> str:
    """docs/ideas.py on both models."""
    reports = [load("ideas-smollm2-135m"), load("ideas-smollm2-135m-key-biases")]
    lines = ["| idea | bits/element | SmolLM2-135M: KL | with key biases: KL |", "| --- | --- | --- | --- |"]
    for rows in zip(*(report["results"] for report in reports), strict=True):
        name = f"`{rows[0]['kv']}`" if rows[0]["kv"] in ("oscar", "int2") else rows[0]["kv"]
        cells = " | ".join("{kl:.4f} ± {kl_se:.4f}".format(**row) for row in rows)
        lines.append(f"| {name} | {rows[0]['bits_per_element']:.3f} | {cells} |")
    plain, biased = (f"{report['results'][0]['nll'] - report['results'][0]['dnll']:.3f}" for report in reports)
    size = f"{reports[0]['prefill']:,} tokens prefilled, {reports[0]['decode']:,} decoded; {reports[0]['windows']} windows"
    lines += ["", f"{size}, the same for both models, whose unquantized NLLs there are {plain} and {biased}."]
    return "\n".join(lines)


def drift() -> str:
    """eval --drift --json."""
    from minioscar import drift as part

    report = load("drift-smollm2-135m")
    where = f"After prompts of {report['prefill']:,} tokens, {report['windows']} windows of the default text, SmolLM2-135M."
    return f"{where} {part.table(report['drift'])}"


def needle() -> str:
    """eval --needle --json."""
    from minioscar import needle as part

    return part.table(load("needle-smollm2-135m")["needle"]) + "\n\nSmolLM2-135M; the haystack is the default text."


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


TABLES = {"fidelity": fidelity, "cpu": cpu, "size": size, "models": models, "ideas": ideas, "drift": drift, "needle": needle}


def rendered(text: str) -> str:
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + "\n" + block[3], text)


if __name__ == "__main__":
    import pareto

    for page in (ROOT / name for name in PAGES):
        page.write_text(rendered(page.read_text()))
    pareto.draw(RESULTS / "pareto.svg")
