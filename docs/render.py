"""Fills the tables of README.md and the pages of docs/ from docs/results/*.json: `make results`. A figure is never typed by hand.

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`; NAME is a function below.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


PAGES = ("README.md", "docs/fidelity.md", "docs/kernels.md")


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


KERNELS = "kernels-h200"


def kernels() -> list[dict]:
    """bench.py kernel --peers --json, with the fastest BF16 kernel of the same run beside every cache of its shape."""
    rows = load(KERNELS)["kernel"]
    shape = ("batch", "context", "q_heads", "kv_heads", "head_dim")
    best: dict[tuple, tuple[float, str]] = {}
    for row in rows:
        if row["op"] == "decode_attention" and row["kv"] == "bf16":
            times = {"ours": row["us"], **{name: us for name, us in row.get("peers", {}).items() if isinstance(us, float)}}
            best[tuple(row[key] for key in shape)] = min((us, name) for name, us in times.items())
    return [{**row, "best_bf16": best.get(tuple(row[key] for key in shape))} for row in rows]


def kernel_table(rows: list[dict]) -> list[str]:
    lines = ["| `--kv` | sequences x tokens | q / kv heads, head_dim | µs | MB | of the copy rate | fastest BF16 |"]
    lines.append("| --- |" + " --- |" * 6)
    for row in rows:
        other = row["best_bf16"]
        beside = "" if other is None or row["kv"] == "bf16" else f"{other[0]:.1f} µs ({PEERS[other[1]]}): {other[0] / row['us']:.1f}x"
        shape = "{batch} x {context:,} | {q_heads} / {kv_heads}, {head_dim}".format(**row)
        size = f"{row['us']:.1f} | {row['bytes'] / 1e6:.1f} | {row['fraction_of_copy']:.0%}"
        lines.append(f"| `{row['kv']}` | {shape} | {size} | {beside} |")
    return lines


PEERS = {"ours": "ours", "sdpa_fa2": "FlashAttention-2", "sdpa_cudnn": "cuDNN"}


def kernel_note() -> str:
    report = load(KERNELS)
    meta, copy = report["meta"], report["ceilings"]["copy_tb_s"]
    spread = max(row["us_spread"] for row in report["kernel"] if row["op"] == "decode_attention")
    return (
        f"{meta['card']}, driver {meta['driver']}, torch {meta['versions']['torch']} for the peers; 20 launches in one replayed graph on "
        f"caches that no L2 holds, median of 25 replays, which spread by at most {spread:.1%}. The copy rate is {copy:.2f} TB/s, read and "
        "written, over the bytes of the cache that a step must read; every window is half full."
    )


def peers_of(row: dict) -> str:
    return ", ".join(f"{PEERS[name]} " + (f"{us:.1f} µs" if isinstance(us, float) else us) for name, us in row["peers"].items())


def gpu() -> str:
    """The README's choice of `decode_kernels`."""
    rows = [row for row in kernels() if row["op"] == "decode_attention" and any(row["best_bf16"] or ())]
    return "\n".join([*kernel_table(rows), "", "Decode attention alone. " + kernel_note()])


def decode_kernels() -> str:
    rows = [row for row in kernels() if row["op"] == "decode_attention"]
    peers = "; ".join(f"{row['batch']} x {row['context']:,}: {peers_of(row)}" for row in rows if "peers" in row)
    return "\n".join([*kernel_table(rows), "", kernel_note(), "", f"BF16 in torch, in the same run: {peers}."])


def other_kernels() -> str:
    lines = ["| | `--kv` | tokens | µs | MB in and out | of the copy rate |", "| --- |" + " --- |" * 5]
    names = {
        "rotate_scale_append": "rotate_scale, the new token in its place",
        "rotate_scale_append_pack": "the same, and pack finding nothing full",
        "schedule": "schedule (once a step)", "pack_bulk": "pack of a prompt",
    }
    for row in kernels():
        if row["op"] in names:
            moved = f"{row['bytes'] / 1e6:.1f} | {row['fraction_of_copy']:.0%}" if row["op"] == "pack_bulk" else "- | latency"
            tokens = f"{row['context']:,}" if row["op"] == "pack_bulk" else "1"
            lines.append(f"| {names[row['op']]} | `{row['kv']}` | {tokens} | {row['us']:.2f} | {moved} |")
    return "\n".join([*lines, "", "32 q heads, 8 kv heads, head_dim 128, one sequence; a layer."])


def resources() -> str:
    """tests/test_compile.py's record: on a card of compute capability 9.0 all kernels, on the others the range."""
    rows = json.loads((RESULTS / "resources.json").read_text())
    lines = ["| kernel, cache, head_dim, q heads a kv head | threads | registers (9.0) | (8.0 to 12.0) | shared memory, bytes (9.0) |"]
    lines.append("| --- |" + " --- |" * 4)
    for row in rows:
        if row["arch"] == 90:
            same = [other["registers"] for other in rows if other["kernel"] == row["kernel"]]
            every = f"{min(same)} to {max(same)}" if len(same) > 1 else ""
            shared = row["static_shared"] + row["dynamic_shared"]
            lines.append(f"| `{row['kernel']}` | {row['threads']} | {row['registers']} | {every} | {shared:,} |")
    return "\n".join(lines)


TABLES = {"decode_kernels": decode_kernels, "other_kernels": other_kernels, "resources": resources, "gpu": gpu}
TABLES |= {"fidelity": fidelity, "cpu": cpu, "size": size, "models": models, "ideas": ideas, "drift": drift, "needle": needle}


def rendered(text: str) -> str:
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + "\n" + block[3], text)


if __name__ == "__main__":
    import pareto

    for page in (ROOT / name for name in PAGES):
        page.write_text(rendered(page.read_text()))
    pareto.draw(RESULTS / "pareto.svg")
