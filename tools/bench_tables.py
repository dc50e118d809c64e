"""The tables of what bench.py measured: for README.md, docs/kernels.md and docs/results/README.md. Rendered by
tools/render.py."""

from __future__ import annotations

import json
from collections.abc import Iterator

from minioscar.cache import cache_bytes
from minioscar.config import Config
from minioscar.oscar import SCHEMES
from minioscar.tables import markdown
from tools import bench_figures
from tools.committed import (
    NAMES,
    QWEN3_8B,
    RESULTS,
    attention_rows,
    benches,
    fastest_bf16,
    foreign_group,
    load,
    measured,
    on_gpu,
    shape_of,
)

KERNELS, CPU = "h200", "cpu"  # what README.md and docs/kernels.md show
OURS = ("python", "numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x")  # the other versions are the peers'
OPS = {
    "decode_attention": "decode attention",
    "rotate_scale_append": "rotate_scale, the new token in its place",
    "rotate_scale_append_pack": "the same, and pack finding nothing full",
    "schedule": "schedule (once a step)",
    "pack_bulk": "pack of a prompt",
    "pack_step_full": "pack of full windows, in 36 layers",
}


# --- README.md, docs/kernels.md


def cpu() -> str:
    """bench.py all --json on a machine with no GPU."""
    report = load(CPU)
    limits = report["ceilings"]
    rows = [
        (kind, f"`{row['kv']}`", f"{row[size]:,}", f"{row['tokens_per_s']:.1f}", f"{row['fraction_of_limit']:.0%}")
        for kind, size in (("decode", "context"), ("prefill", "tokens"))
        for row in report[kind]
    ]
    note = (
        f"SmolLM2-135M, batch 1, {report['meta']['card']}, NumPy {report['meta']['versions']['numpy']}. Limits: "
        "decode reads weights and "
        f"cache once at the measured copy bandwidth ({limits['copy_tb_s'] * 1e3:.1f} GB/s); prefill multiplies "
        "at the measured matrix "
        f"rate ({limits['matmul_tflop_s'] * 1e3:.0f} GFLOP/s)."
    )
    return "\n".join([*markdown(["", "`--kv`", "tokens", "tokens/s", "of the limit"], rows), "", note])


def attention_table(rows: list[dict], best: dict[tuple, tuple[float, str]]) -> list[str]:
    """With the fastest BF16 kernel of the same run beside every cache of its shape."""
    head = ["`--kv`", "sequences x tokens", "q / kv heads, head_dim", "µs", "MB", "of the copy rate", "fastest BF16"]

    def cells(row: dict) -> Iterator[str]:
        yield f"`{row['kv']}`"
        yield "{batch} x {context:,}".format(**row)
        yield "{q_heads} / {kv_heads}, {head_dim}".format(**row)
        yield from (f"{row['us']:.1f}", f"{row['bytes'] / 1e6:.1f}", f"{row['fraction_of_copy']:.0%}")
        us, name = best.get(shape_of(row), (0, ""))
        yield "" if not us or row["kv"] == "bf16" else f"{us:.1f} µs ({NAMES[name]}): {us / row['us']:.1f}x"

    return markdown(head, (list(cells(row)) for row in rows))


def kernel_note() -> str:
    report = load(KERNELS)
    meta, copy = report["meta"], report["ceilings"]["copy_tb_s"]
    spread = max(row["us_spread"] for row in attention_rows(report))
    peers = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if name not in OURS)
    return (
        f"{meta['card']}, driver {meta['driver']}, {peers} for the peers, kernels of commit "
        f"`{meta['commit']}`; 20 launches in one replayed graph on "
        "caches that no L2 holds, median of 25 replays or more, each after a rest twice as long, which spread "
        f"by at most {spread:.1%}. "
        f"The copy rate is {copy:.2f} TB/s, "
        "read and written, over the bytes of the cache that a step must read; every window is half full."
        + (f" Of these rows, {meta['note']}." if "note" in meta else "")
    )


def gpu() -> str:
    """The README's choice of `decode_kernels`."""
    report = load(KERNELS)
    best = fastest_bf16(report)
    rows = [row for row in attention_rows(report) if shape_of(row) in best]
    return "\n".join([*attention_table(rows, best), "", "Decode attention alone. " + kernel_note()])


def decode_kernels() -> str:
    report = load(KERNELS)
    rows = attention_rows(report)
    peers = "; ".join(f"{row['batch']} x {row['context']:,}: {peers_of(row)}" for row in rows if "peers" in row)
    lines = attention_table(rows, fastest_bf16(report))
    return "\n".join([*lines, "", kernel_note(), "", f"Other BF16 kernels, in the same run: {peers}."])


def sustained() -> str:
    """The same without rests: what the card's power limit leaves."""
    report = load(KERNELS)
    return "\n".join(attention_table(attention_rows(report, "sustained"), fastest_bf16(report, "sustained")))


def peers_of(row: dict) -> str:
    return ", ".join(
        f"{NAMES[name]} " + (us if isinstance(us, str) else f"{us:.1f} µs") for name, us in row["peers"].items()
    )


def other_kernels() -> str:
    rows = []
    for row in load(KERNELS)["kernel"]:
        if row["op"] in OPS and row["op"] != "decode_attention":
            whole, tokens = row["op"].startswith("pack_"), f"{row['batch']} x {row['context']:,}"
            moved = (f"{row['bytes'] / 1e6:.1f}", f"{row['fraction_of_copy']:.0%}") if whole else ("-", "latency")
            rows.append(
                (OPS[row["op"]], f"`{row['kv']}`", tokens if whole else "1", f"{row['us']:.2f}", *moved)
            )
    lines = markdown(["", "`--kv`", "tokens", "µs", "MB in and out", "of the copy rate"], rows)
    note = "32 q heads, 8 kv heads, head_dim 128; one sequence and a layer where nothing else is said."
    return "\n".join([*lines, "", note])


def resources() -> str:
    """tests/test_compile.py's record: on a card of compute capability 9.0 all kernels, on the others the range."""
    found, rows = json.loads((RESULTS / "resources.json").read_text()), []
    for row in found:
        if row["arch"] == 90:
            same = [other["registers"] for other in found if other["kernel"] == row["kernel"]]
            every = f"{min(same)} to {max(same)}" if len(same) > 1 else ""
            shared = row["static_shared"] + row["dynamic_shared"]
            rows.append((f"`{row['kernel']}`", f"{row['threads']}", f"{row['registers']}", every, f"{shared:,}"))
    head = [
        "kernel, cache, head_dim, q heads a kv head",
        "threads",
        "registers (9.0)",
        "(8.0 to 12.0)",
        "shared memory, bytes (9.0)",
    ]
    return "\n".join(markdown(head, rows))


# --- the paper's three numbers beside ours

NOT_YET = "not measured yet"


def headlines() -> str:
    """arXiv 2605.19660 states: up to 3.0x, 5.3x and 4.1x, on an H20, against BF16 FlashDecoding-v2."""
    reports = [report for report in benches().values() if on_gpu(report)]
    rows = [
        ("decoding, 1 x 131,072 tokens", "up to 3.0x", f"decode attention alone: {attention_gain(reports)}"),
        ("", "", f"a whole decode step: {decode_gain(reports)}"),
        ("memory", "5.3x", memory_gain()),
        ("throughput at 4,096 tokens", "4.1x", throughput_gain(reports)),
    ]
    head = ["", "the paper, on an H20, against BF16 FlashDecoding-v2", "minioscar, `--kv int2`"]
    return "\n".join(markdown(head, rows))


def attention_gain(reports: list[dict]) -> str:
    for report in reports:
        if found := int2_beside_bf16(report, "kernel"):
            ours, us, name = found
            run = f"the fastest BF16 kernel in the same run ({NAMES[name]})"
            text = f"{us / ours:.1f}x, {ours:.1f} µs against the {us:.1f} µs of {run}"
            text += f", {report['meta']['card']}"
            if found := int2_beside_bf16(report, "sustained"):
                text += f"; {found[1] / found[0]:.1f}x without rests, at the card's power limit"
            return text
    return NOT_YET


def int2_beside_bf16(report: dict, part: str) -> tuple[float, float, str] | None:
    """Over one long sequence: microseconds of ours with int2, of the fastest BF16 kernel, and whose that is."""
    best = fastest_bf16(report, part)
    for row in attention_rows(report, part):
        if row["kv"] == "int2" and (row["batch"], row["context"]) == (1, 131072) and shape_of(row) in best:
            return row["us"], *best[shape_of(row)]
    return None


def decode_gain(reports: list[dict]) -> str:
    for report in reports:
        rows = [row for row in report["decode"] if (row["batch"], row["context"]) == (1, 131072)]
        ms = {(row["model"], row["kv"]): row["ms"] for row in rows}
        for model, kv in ms:
            if kv == "int2" and (model, "bf16") in ms:
                ours, other = ms[model, "int2"], ms[model, "bf16"]
                against = f"{other:.2f} ms with our own BF16 cache, {model}, {report['meta']['card']}"
                return f"{other / ours:.1f}x, {ours:.2f} ms against {against}"
    return NOT_YET


def memory_gain() -> str:
    config, sizes = Config.from_dict(QWEN3_8B), []
    for batch, context in ((1, 131072), (48, 4096)):
        whole, ours = (cache_bytes(config, SCHEMES[kv], batch, context) for kv in ("bf16", "int2"))
        sizes.append(f"{whole / ours:.1f}x at {batch} x {context:,}")
    return f"{', '.join(sizes)}: arithmetic, all bytes of a Qwen3-8B cache counted, against a BF16 cache"


def throughput_gain(reports: list[dict]) -> str:
    for report in reports:
        rates: dict[tuple, float] = {}
        for row in report.get("throughput", ()):
            if row["context"] == 4096 and row["tokens_per_s"]:
                key = row["model"], row["budget_gb"], row["kv"]
                rates[key] = max(row["tokens_per_s"], rates.get(key, 0))
        for model, budget, kv in sorted(rates, key=str):
            if kv == "int2" and (model, budget, "bf16") in rates:
                ours, other = rates[model, budget, "int2"], rates[model, budget, "bf16"]
                against = f"{other:,.0f} with our own BF16 cache, {model} in {budget:g} GB, {report['meta']['card']}"
                return f"{ours / other:.1f}x, {ours:,.0f} tokens/s against {against}"
    return NOT_YET


# --- docs/results/README.md: everything that is committed


def bench_sections() -> str:
    sections = [line for name, report in benches().items() for line in section(name, report)]
    return "\n".join([*sections, *section_of_memory()])


def section(name: str, report: dict) -> Iterator[str]:
    meta, limits = report["meta"], report["ceilings"]
    where = meta["card"]
    if on_gpu(report):
        where += f", driver {meta['driver']}, CUDA {meta['cuda'] // 1000}.{meta['cuda'] % 1000 // 10}"
    versions = ", ".join(f"{package} {version}" for package, version in meta["versions"].items())
    rates = (
        f"copy {limits['copy_tb_s']:.4g} TB/s, read and written; matrix product {limits['matmul_tflop_s']:.4g} TFLOP/s"
    )
    yield from (
        f"## {name}.json",
        "",
        f"{where}; {versions}; commit `{meta['commit']}`, {meta['date']}. Measured limits: {rates}.",
        "",
    )
    if "note" in meta and on_gpu(report):
        yield from (f"{meta['note']}.", "")
    for name_of, figure in bench_figures.drawn_from(name, report).items():
        yield from (f"![{figure.get_label()}](../figures/{name_of}.svg)", "")
    for part, (head, cells) in PARTS.items():
        if report.get(part):
            yield from (*markdown(head, (list(cells(row)) for row in report[part])), "", *reasons(report[part]))


def repeats() -> str:
    """The kernels of the runs under again/: how far apart the medians are."""
    runs = [json.loads(path.read_text()) for path in sorted((RESULTS / "again").glob(f"{KERNELS}-*.json"))]
    rows, apart = [], []
    for same in zip(*(run["kernel"] for run in runs), strict=True):
        op, kv, shape, heads, *_ = kernel_cells(same[0])
        us = [row["us"] for row in same]
        apart.append(max(us) / min(us) - 1)
        rows.append(
            (
                op,
                kv,
                shape,
                heads,
                *(f"{x:.2f}" for x in us),
                f"{apart[-1]:.1%}",
                f"{max(row['us_spread'] for row in same):.0%}",
            )
        )
    head = ["kernel", *SHAPE, KERNEL[0], *("µs" for _ in runs), "apart", "widest spread in a run"]
    close = sum(x <= 0.03 for x in apart)
    commits = ", ".join(f"`{run['meta']['commit']}`" for run in runs)
    return "\n".join(
        [
            *markdown(head, rows),
            "",
            f"{close} of {len(apart)} within 3 %; {runs[0]['meta']['card']}, commits {commits}.",
        ]
    )


def section_of_memory() -> Iterator[str]:
    yield from (
        "## Memory",
        "",
        "Arithmetic of minioscar/cache.py, not measured: every byte that a cache of the shape allocates.",
        "",
    )
    yield f"![{bench_figures.memory().get_label()}](../figures/memory.svg)"


def kernel_cells(row: dict) -> Iterator[str]:
    yield OPS.get(row["op"], row["op"])
    yield f"`{row['kv']}`" + (f", groups of {row['group']}" if foreign_group(row) else "")
    yield "{batch} x {context:,}".format(**row)
    yield "{q_heads} / {kv_heads}, {head_dim}".format(**row)
    yield f"{row['us']:.2f} (spread {row['us_spread']:.1%})"
    yield f"{row['us'] * row['fraction_of_copy']:.2f}"
    yield f"{row['fraction_of_copy']:.0%}"
    yield peer_cell(row, 1)


def dense_cells(row: dict) -> Iterator[str]:
    yield from (
        OPS.get(row["op"], row["op"]),
        row["shape"],
        f"{row['tokens']:,}",
        f"{row['us']:.2f} (spread {row['us_spread']:.1%})",
    )
    yield from (f"{row['us'] * row['fraction_of_limit']:.2f}", f"{row['fraction_of_limit']:.0%}")


def growth_cells(row: dict) -> Iterator[str]:
    yield from (
        row["over"],
        f"`{row['kv']}`",
        f"{row['us_per_1000_tokens']:.3f}",
        f"{row['bytes_us_per_1000_tokens']:.3f}",
    )
    yield from (f"{1 / row['times_the_bytes']:.0%}", f"{row['us_at_0_tokens']:.2f}", f"{row['worst_error']:.0%}")


def skipped_cells(row: dict) -> Iterator[str]:
    yield from (OPS.get(row["op"], row["op"]), f"`{row['kv']}`", "{batch} x {context:,}".format(**row), row["skipped"])


def decode_cells(row: dict) -> Iterator[str]:
    yield from (
        row["model"],
        f"`{row['kv']}`",
        "{batch} x {context:,}".format(**row),
        f"{row['ms']:.2f}",
        f"{row['tokens_per_s']:,.1f}",
    )
    yield from (f"{row['ms'] * row['fraction_of_limit']:.2f}", f"{row['fraction_of_limit']:.0%}", peer_cell(row, 2))


def breakdown_cells(row: dict) -> Iterator[str]:
    yield from (
        row["kernel"],
        f"`{row['kv']}`",
        "{batch} x {context:,}".format(**row),
        f"{row['launches']}",
        f"{row['us']:.2f}",
    )
    yield from (f"{row['us_a_step']:,.0f}", f"{row['bytes'] / 1e6:,.2f}", f"{row['fraction_of_limit']:.0%}")


def prefill_cells(row: dict) -> Iterator[str]:
    yield from (row["model"], f"{row['tokens']:,}", f"{row['tokens_per_s']:,.0f}")
    yield from (
        f"{row['tokens_per_s'] / row['fraction_of_limit']:,.0f}",
        f"{row['fraction_of_limit']:.0%}",
        peer_cell(row, 0),
    )


def throughput_cells(row: dict) -> Iterator[str]:
    yield from (row["model"], f"{row['budget_gb']:g}", f"`{row['kv']}`")
    yield from (f"{row['context']:,}", f"{row['batch']}", f"{row['tokens_per_s']:,.0f}")


PROMPT_PEAK = "cache and most of a prompt, MB", "predicted, MB"


def memory_cells(row: dict) -> Iterator[str]:
    yield from (
        row["model"],
        f"`{row['kv']}`",
        "{batch} x {context:,}".format(**row),
        f"{row['cache_bytes'] / 1e6:,.1f}",
    )
    yield from (f"{row['predicted_bytes'] / 1e6:,.1f}", f"{row['ratio_to_bf16']:.2f}x")
    peaks = (row.get(f"{kind}prefill_peak_bytes") for kind in ("", "predicted_"))  # older files have none
    yield from ("" if peak is None else f"{peak / 1e6:,.1f}" for peak in peaks)


def load_cells(row: dict) -> Iterator[str]:
    yield from (
        row["model"],
        f"{row['layers']}",
        f"{row['bytes'] / 1e6:,.0f}",
        f"{row['s']:.3f}",
        f"{row['first_s']:.3f}",
    )
    yield from (f"{row['gb_s']:.1f}", f"{row['copy_gb_s']:.1f}", f"{row['fraction_of_copy']:.0%}")


def start_cells(row: dict) -> Iterator[str]:
    yield from (
        row["model"],
        f"`{row['kv']}`",
        f"{row['starts']}",
        f"{row['s']:.2f} (spread {row['spread']:.0%})",
        f"{row['first_s']:.2f}",
    )


def serve_cells(row: dict) -> Iterator[str]:
    yield from (row["load"], f"`{row['kv']}`", "" if row["clients"] is None else f"{row['clients']}")
    yield from (f"{row['requests']}", f"{row['prompt_tokens'] / row['requests']:,.0f}")
    for name in ("first", "between"):
        yield f"{row[f'{name}_p50_ms']:,.1f}, {row[f'{name}_p99_ms']:,.1f}"
    yield f"{row['tokens_per_s']:,.0f}"
    yield "" if row["times_one"] is None else f"{row['times_one']:.1f}x"
    yield "" if row["of_chain"] is None else f"{row['of_chain']:.0%}"
    yield f"{row['hit_tokens']:,}"
    yield f"{row['idle_share']:.0%}" if "idle_share" in row else ""


def server_loads() -> str:
    return "\n".join(markdown(PARTS["serve"][0], (list(serve_cells(row)) for row in load("h200-serve")["serve"])))


def peer_cell(row: dict, digits: int) -> str:
    return "; ".join(f"{NAMES[name]} {value:,.{digits}f}" for name, value in measured(row).items())


def reasons(rows: list[dict]) -> Iterator[str]:
    """Why peers have no figure, every reason once."""
    found = {(name, why): None for row in rows for name, why in row.get("peers", {}).items() if isinstance(why, str)}
    if found:
        yield from ("Not measured: " + "; ".join(f"{NAMES[name]} ({why})" for name, why in found) + ".", "")


SHAPE = ("`--kv`", "sequences x tokens")
KERNEL = ("q / kv heads, head_dim", "µs", "limit, µs", "of it", "peers, µs")
GROWTH = ("µs per 1,000 tokens", "limit, µs", "of it", "µs at none", "worst error of the line")
WAITS = "to the first token, ms: median, 99 of 100", "between tokens, ms: the same"
SERVE = "clients", "requests", "tokens of each", *WAITS, "tokens/s", "of one", "of chain"
SERVE = *SERVE, "tokens from the cache", "idle"
PARTS = {
    "kernel": (["kernel", *SHAPE, *KERNEL], kernel_cells),
    "sustained": (["without rests", *SHAPE, *KERNEL], kernel_cells),
    "dense": (["the rest of a step", "shape", "tokens", "µs", "limit, µs", "of it"], dense_cells),
    "sweep": (["sweep", *SHAPE, *KERNEL], kernel_cells),
    "growth": (["growth over", "`--kv`", *GROWTH], growth_cells),
    "skipped": (["not measured", *SHAPE, "why"], skipped_cells),
    "decode": (["decode", *SHAPE, "ms a step", "tokens/s", "limit, ms", "of it", "peers, ms"], decode_cells),
    "breakdown": (
        ["a step's", *SHAPE, "launches", "µs each", "µs a step", "MB each", "of the copy rate"],
        breakdown_cells,
    ),
    "prefill": (["prefill", "tokens", "tokens/s", "limit, tokens/s", "of it", "peers, tokens/s"], prefill_cells),
    "throughput": (["throughput", "budget, GB", "`--kv`", "tokens", "sequences", "tokens/s"], throughput_cells),
    "memory": (["memory", *SHAPE, "cache, MB", "predicted, MB", "smaller than BF16", *PROMPT_PEAK], memory_cells),
    "load": (["loading", "layers", "MB", "s", "the first time, s", "GB/s", "a pinned copy, GB/s", "of it"], load_cells),
    "serve": (["server", "`--kv`", *SERVE], serve_cells),
    "start": (["start to first text", "`--kv`", "starts", "s", "the first time, s"], start_cells),
}

TABLES = {
    "decode_kernels": decode_kernels,
    "other_kernels": other_kernels,
    "resources": resources,
    "gpu": gpu,
    "cpu": cpu,
}
TABLES |= {"sustained": sustained, "headlines": headlines, "benches": bench_sections, "repeats": repeats}
TABLES |= {"server_loads": server_loads}
