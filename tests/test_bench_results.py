"""Tables and figures of bench.py's JSON: parts that no committed file has yet, shown with made-up rows; and what the
tables promise."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools import bench_figures, bench_tables, committed, plot

GROWTH = {
    "us_per_1000_tokens": 0.2,
    "us_at_0_tokens": 8.0,
    "worst_error": 0.03,
    "bytes_us_per_1000_tokens": 0.1,
    "times_the_bytes": 2.0,
}
PART = {"us_a_step": 54.0, "bytes": 2e6, "fraction_of_limit": 0.333}
SERVED = {"load": "closed", "kv": "int2", "clients": 8, "requests": 24, "prompt_tokens": 2400, "tokens_per_s": 1200.0}
SERVED |= {"first_p50_ms": 20.0, "first_p99_ms": 1300.0, "between_p50_ms": 4.0, "between_p99_ms": 5.5}
SERVED |= {"times_one": 5.0, "of_chain": 0.8, "hit_tokens": 1000, "idle_share": 0.12}
MEMORY = {"cache_bytes": 3e6, "predicted_bytes": 3e6, "ratio_to_bf16": 4.5}
MEMORY |= {"prefill_peak_bytes": 5e6, "predicted_prefill_peak_bytes": 5.5e6}
LOAD = {"gb_s": 45.0, "copy_gb_s": 50.0, "fraction_of_copy": 0.9}
META = {
    "card": "Card",
    "driver": "1.2",
    "cuda": 13020,
    "versions": {"numpy": "2"},
    "commit": "abc",
    "date": "2026-01-01",
}


def attention(kv: str, context: int, us: float, **more) -> dict:
    shape = {"batch": 1, "context": context, "q_heads": 32, "kv_heads": 8, "head_dim": 128}
    size = context * (4096 if kv == "bf16" else 704)
    return {
        "op": "decode_attention",
        "kv": kv,
        **shape,
        "us": us,
        "us_spread": 0.01,
        "bytes": size,
        "fraction_of_copy": 0.5,
        **more,
    }


def step(kv: str, context: int, ms: float, **more) -> dict:
    return {
        "model": "m",
        "kv": kv,
        "batch": 1,
        "context": context,
        "ms": ms,
        "tokens_per_s": 1e3 / ms,
        "fraction_of_limit": 0.8,
        **more,
    }


def rate(kv: str, budget: float, batch: int, tokens_per_s: float) -> dict:
    return {"model": "m", "budget_gb": budget, "kv": kv, "context": 4096, "batch": batch, "tokens_per_s": tokens_per_s}


@pytest.fixture
def report() -> dict:
    peers = {"sdpa_fa2": 150.0, "triton": 110.0, "flashinfer": "ModuleNotFoundError: No module named 'flashinfer'"}
    slow = {"transformers": 60.0, "transformers_hqq2": "OutOfMemoryError: no room"}
    return {
        "meta": META,
        "ceilings": {"copy_tb_s": 4.0, "matmul_tflop_s": 800.0},
        "kernel": [attention("bf16", 131072, 120.0, peers=peers), attention("int2", 131072, 27.5)],
        "sustained": [attention("bf16", 131072, 160.0, peers={"triton": 155.0}), attention("int2", 131072, 31.0)],
        "sweep": [
            attention("int2", 4096, 9.0, group=32),
            attention("int2", 32768, 14.0),
            attention("int2", 131072, 28.0),
        ]
        + [attention("int2", 131072, 26.0, group=64)],
        "dense": [
            {"op": "linear", "shape": "8 to 4", "tokens": 48, "us": 20.0, "us_spread": 0.01, "fraction_of_limit": 0.75}
        ],
        "growth": [{"over": "context", "kv": "int2", "points": 2, **GROWTH}],
        "skipped": [{"op": "decode_attention", "kv": "bf16", "batch": 9, "context": 4096, "skipped": "needs more"}],
        "decode": [step("bf16", 32768, 6.0, peers=slow), step("bf16", 131072, 9.0, peers=slow)]
        + [step("int2", 131072, 4.5)],
        "breakdown": [
            {"kv": "int2", "batch": 1, "context": 131072, "kernel": "pack", "launches": 36, "us": 1.5, **PART}
        ],
        "prefill": [
            {
                "model": "m",
                "tokens": 512,
                "tokens_per_s": 900.0,
                "fraction_of_limit": 0.9,
                "peers": {"transformers": 800.0},
            }
        ],
        "throughput": [rate("bf16", 16, 0, 0.0), rate("bf16", 40, 8, 100.0), rate("bf16", 80, 20, 250.0)]
        + [rate("int2", 80, 40, 500.0), rate("int2", 80, 90, 1000.0)],
        "serve": [SERVED],
        "memory": [{"model": "m", "kv": "int2", "batch": 2, "context": 512, **MEMORY}],
        "load": [{"model": "m", "layers": 3, "bytes": 3.6e9, "s": 0.08, "first_s": 0.1, **LOAD}],
        "start": [{"model": "m", "kv": "int2", "starts": 7, "s": 1.25, "spread": 0.1, "first_s": 3.0}],
    }


def test_every_part_of_a_report_has_a_table_with_the_limit_beside_the_figure(report):
    text = "\n".join(bench_tables.section("made-up", report))
    for line in (
        "## made-up.json",
        "| decode attention | `bf16` | 1 x 131,072 | 32 / 8, 128 | 120.00 (spread 1.0%) | 60.00 | 50% | "
        "FlashAttention-2 150.0; Triton 110.0 |",
        "| decode attention | `int2`, groups of 64 | 1 x 131,072 | 32 / 8, 128 | 26.00 (spread 1.0%) | 13.00 | 50% |  "
        "|",
        "| decode attention | `bf16` | 1 x 131,072 | 32 / 8, 128 | 160.00 (spread 1.0%) | 80.00 | 50% | Triton 155.0 |",
        "| linear | 8 to 4 | 48 | 20.00 (spread 1.0%) | 15.00 | 75% |",
        "| context | `int2` | 0.200 | 0.100 | 50% | 8.00 | 3% |",
        "| decode attention | `bf16` | 9 x 4,096 | needs more |",
        "Not measured: FlashInfer (ModuleNotFoundError: No module named 'flashinfer').",
        "| m | `bf16` | 1 x 131,072 | 9.00 | 111.1 | 7.20 | 80% | transformers 60.00 |",
        "| pack | `int2` | 1 x 131,072 | 36 | 1.50 | 54 | 2.00 | 33% |",
        "Not measured: transformers, 2-bit cache of HQQ (OutOfMemoryError: no room).",
        "| m | 512 | 900 | 1,000 | 90% | transformers 800 |",
        "| m | 80 | `int2` | 4,096 | 90 | 1,000 |",
        "| m | 16 | `bf16` | 4,096 | 0 | 0 |",
        "| closed | `int2` | 8 | 24 | 100 | 20.0, 1,300.0 | 4.0, 5.5 | 1,200 | 5.0x | 80% | 1,000 | 12% |",
        "| m | `int2` | 2 x 512 | 3.0 | 3.0 | 4.50x | 5.0 | 5.5 |",
        "| m | 3 | 3,600 | 0.080 | 0.100 | 45.0 | 50.0 | 90% |",
        "| m | `int2` | 7 | 1.25 (spread 10%) | 3.00 |",
    ):
        assert line in text.splitlines()
    assert "Card, driver 1.2, CUDA 13.2; numpy 2; commit `abc`, 2026-01-01" in text


def test_how_far_apart_repeated_runs_are_stands_beside_each_kernel(report, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_tables, "RESULTS", tmp_path)
    again = {**report, "meta": {**report["meta"], "commit": "abd"}}
    again["kernel"] = [attention("bf16", 131072, 123.0), attention("int2", 131072, 28.6)]
    (tmp_path / "again").mkdir()
    for i, run in enumerate((report, again)):
        (tmp_path / "again" / f"{bench_tables.KERNELS}-{i}.json").write_text(json.dumps(run))
    lines = bench_tables.repeats().splitlines()
    assert "| decode attention | `bf16` | 1 x 131,072 | 32 / 8, 128 | 120.00 | 123.00 | 2.5% | 1% |" in lines
    assert "| decode attention | `int2` | 1 x 131,072 | 32 / 8, 128 | 27.50 | 28.60 | 4.0% | 1% |" in lines
    assert lines[-1] == "1 of 2 within 3 %; Card, commits `abc`, `abd`."


def test_every_part_with_something_to_show_has_a_figure(report, tmp_path: Path):
    figures = bench_figures.drawn_from("made-up", report)
    shown = {
        "speedup": "4.0x",
        "time-b1-32-8-128": "int2, ours: 27.5",
        "step-m-b1": "limit of bf16: 7.2",
        "throughput-m-4096": "int2: 1,000",
    }
    assert set(figures) == {f"made-up-{name}" for name in shown}
    for name, words in shown.items():
        plot.save(figures[f"made-up-{name}"], tmp_path / "figure.svg")
        root = ElementTree.fromstring((tmp_path / "figure.svg").read_text())
        assert words in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    without_a_card = {**report, "meta": {**META, "driver": None, "cuda": None}}
    assert set(bench_figures.drawn_from("made-up", without_a_card)) == {
        "made-up-step-m-b1",
        "made-up-throughput-m-4096",
    }
    assert (
        bench_figures.drawn_from("empty", {**report, "kernel": [], "sweep": [], "decode": [], "throughput": []}) == {}
    )


def test_speed_is_compared_with_the_fastest_bf16_kernel_that_was_measured(report):
    (best,) = committed.fastest_bf16(report).values()
    assert best == (110.0, "triton")
    assert bench_tables.attention_gain([report]) == (
        "4.0x, 27.5 µs against the 110.0 µs of the fastest BF16 kernel in the same run (Triton), Card; 5.0x without "
        "rests, at the card's power limit"
    )
    without = {**report, "sustained": []}
    assert bench_tables.attention_gain([without]).endswith("(Triton), Card")
    assert bench_tables.decode_gain([report]).startswith(
        "2.0x, 4.50 ms against 9.00 ms with our own BF16 cache, m, Card"
    )
    assert bench_tables.throughput_gain([report]).startswith(
        "4.0x, 1,000 tokens/s against 250 with our own BF16 cache, m in 80 GB, Card"
    )
    for gain in (bench_tables.attention_gain, bench_tables.decode_gain, bench_tables.throughput_gain):
        assert gain([{**report, "kernel": [], "sweep": [], "decode": [], "throughput": []}]) == bench_tables.NOT_YET


def test_memory_by_kind_adds_up_to_the_cache():
    config = bench_figures.Config.from_dict(committed.QWEN3_8B)
    for kv in bench_figures.MEMORY_SHOWN:
        found = bench_figures.parts(config, kv, 48, 4096)
        assert sum(found) == bench_tables.cache_bytes(config, bench_tables.SCHEMES[kv], 48, 4096)
        assert (found[1] == 0) == (kv == "bf16")


def test_labels_stand_apart_and_as_near_as_they_can():
    assert bench_figures.apart([100, 10, 50], 17) == [100, 10, 50]
    assert bench_figures.apart([52, 50, 200], 10) == [56, 46, 200]
    assert bench_figures.apart([0, 9, 18], 10) == [-1, 9, 19]
