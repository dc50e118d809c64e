"""The committed measurements that tables and figures are made of."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.presets import PRESETS
from minioscar.oscar import SCHEMES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"

QWEN3_8B = {**PRESETS["qwen3-8b"], "max_position_embeddings": 131072}  # as long as what is measured
NAMES = {
    "ours": "ours", "sdpa_fa2": "FlashAttention-2", "sdpa_cudnn": "cuDNN", "triton": "Triton",
    "flashinfer": "FlashInfer",
    "transformers": "transformers", "transformers_hqq2": "transformers, 2-bit cache of HQQ",
    "transformers_quanto2": "transformers, 2-bit cache of quanto",
}  # fmt: skip


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def benches() -> dict[str, dict]:
    """Name -> what bench.py --json wrote, for every such file; those of a GPU first."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    mine = {name: report for name, report in found.items() if "meta" in report and "ceilings" in report}
    return dict(sorted(mine.items(), key=lambda item: not on_gpu(item[1])))


def on_gpu(report: dict) -> bool:
    return report["meta"]["driver"] is not None


def attention_rows(report: dict, *parts: str) -> list[dict]:
    """Decode attention with the group size that is the scheme's own (a sweep also tries others), of some parts of a
    report."""
    rows = [row for part in parts or ("kernel",) for row in report.get(part, ()) if row["op"] == "decode_attention"]
    return [row for row in rows if not foreign_group(row)]


def foreign_group(row: dict) -> bool:
    return row.get("group") not in (None, SCHEMES[row["kv"]].group)


def fastest_bf16(report: dict, part: str = "kernel") -> dict[tuple, tuple[float, str]]:
    """Shape of decode attention -> the fastest BF16 kernel of the same run: microseconds, name ("ours" or a peer's)."""
    best = {}
    for row in attention_rows(report, part):
        if row["kv"] == "bf16":
            best[shape_of(row)] = min((us, name) for name, us in {"ours": row["us"], **measured(row)}.items())
    return best


def shape_of(row: dict) -> tuple:
    return tuple(row[key] for key in ("batch", "context", "q_heads", "kv_heads", "head_dim"))


def measured(row: dict) -> dict[str, float]:
    """The peers of a row that have a figure; the others have the reason why not."""
    return {name: value for name, value in row.get("peers", {}).items() if not isinstance(value, str)}
