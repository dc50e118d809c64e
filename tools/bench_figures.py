"""Figures of what bench.py measured: one set per committed JSON, of what it holds, and the memory of a cache by arithmetic.

Dashed lines and outlines are limits: what the bytes that must be read take at the copy rate measured in the same run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from minioscar.cache import array_cache
from minioscar.config import Config
from minioscar.oscar import SCHEMES
from tools.canvas import BLUE, GREEN, INK, RED, Canvas
from tools.committed import NAMES, QWEN3_8B, attention_rows, benches, fastest_bf16, measured, on_gpu, shape_of

MUTED, GRID, PALE, GREY = "#5b6270", "#e4e4e4", "#9db7da", "#7d8492"
PEER_COLORS = {"sdpa_fa2": "#b8862b", "sdpa_cudnn": "#7a5ea8", "triton": "#2b8a8a", "flashinfer": "#8a5a3c", "transformers": "#7a5ea8"}
KV_COLORS = {"bf16": RED, "int2": BLUE, "int2-compact": GREEN}
ROOFLINE = "Dashed: the bytes that must be read, at the copy rate of the same run. Both axes are logarithmic."
SPEEDUPS = ("int2", "int2-compact", "oscar", "int4")


def drawn() -> dict[str, Canvas]:
    """Name -> figure, of all that is committed."""
    found = {"memory": memory()}
    for name, report in benches().items():
        found |= drawn_from(name, report)
    return found


def drawn_from(name: str, report: dict) -> dict[str, Canvas]:
    """Those that one report has the rows for; `name` begins theirs."""
    kernels = [*speedups(report), *attention_times(report)] if on_gpu(report) else []  # elsewhere they are NumPy's, at small shapes
    return {f"{name}-{what}": canvas for what, canvas in [*kernels, *step_times(report), *throughputs(report)]}


# --- lines over the context or the budget


class Line(NamedTuple):
    label: str
    color: str
    points: list[tuple[float, float]]
    limit: bool = False


def chart(title: str, x_label: str, y_label: str, lines: list[Line], tick: Callable[[float], str], note: str) -> Canvas:
    """Logarithmic axes; every line is named at its right end, with its last value."""
    c, left, right, top, bottom = Canvas(860, 430, title), 70, 620, 64, 350
    places = sorted({x for line in lines for x, _ in line.points})
    values = [y for line in lines for _, y in line.points]
    low, high = min(values) / 1.3, max(values) * 1.2

    def at(x: float) -> float:
        return left + (right - left) * math.log(x / places[0]) / math.log(places[-1] / places[0])

    def up(y: float) -> float:
        return bottom - (bottom - top) * math.log(y / low) / math.log(high / low)

    c.text(left - 40, 28, title, 14)
    c.text(left - 40, 48, y_label, 12, fill=MUTED)
    digits = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    for value in (digit * 10.0**power for power in range(-3, 7) for digit in digits):
        if low <= value <= high:
            c.line([(left, up(value)), (right, up(value))], GRID, 1)
            c.text(left - 8, up(value) + 4, f"{value:g}", 12, "end", MUTED)
    for x in places:
        c.line([(at(x), bottom), (at(x), bottom + 5)], MUTED, 1)
        c.text(at(x), bottom + 20, tick(x), 12, "middle", MUTED)
    c.text((left + right) / 2, bottom + 42, x_label, 12, "middle", MUTED)
    c.text(left - 40, bottom + 68, note, 12, fill=MUTED)
    for line, place in zip(lines, apart([up(line.points[-1][1]) for line in lines], 17), strict=True):
        last, value = line.points[-1]
        c.line([(at(x), up(y)) for x, y in line.points], line.color, 1.2 if line.limit else 2.2, "5 4" if line.limit else "")
        for x, y in line.points if not line.limit else ():
            c.rect(at(x) - 3, up(y) - 3, 6, 6, line.color)
        c.line([(at(last) + 6, up(value)), (right + 22, place)], line.color, 0.8)
        c.text(right + 26, place + 4, f"{line.label} " + (f"{value:,.0f}" if value >= 100 else f"{value:.3g}"), 12, fill=line.color)
    return c


def apart(wanted: list[float], gap: float) -> list[float]:
    """Places as near to the wanted ones as they can be at least `gap` apart, in the same order."""
    clusters: list[tuple[list[int], float]] = []  # indices from top to bottom, and the middle
    for i in sorted(range(len(wanted)), key=wanted.__getitem__):
        members, middle = [i], wanted[i]
        while clusters and middle - clusters[-1][1] < gap * (len(members) + len(clusters[-1][0])) / 2:
            members = clusters.pop()[0] + members
            middle = sum(wanted[j] for j in members) / len(members)
        clusters.append((members, middle))
    found = [0.0] * len(wanted)
    for members, middle in clusters:
        for n, i in enumerate(members):
            found[i] = middle + gap * (n - (len(members) - 1) / 2)
    return found


def context_tick(tokens: float) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


def groups(rows: Iterable[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """BF16 and int2 rows with equal keys together, where they reach over more than one context, by context."""
    found: dict[tuple, list[dict]] = {}
    for row in (row for row in rows if row["kv"] in ("bf16", "int2")):
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    several = [(key, same) for key, same in found.items() if len({row["context"] for row in same}) > 1]
    return [(key, sorted(same, key=lambda row: row["context"])) for key, same in several]


def kv_lines(rows: list[dict], value: str, fraction: str) -> list[Line]:
    """Both caches with their limits, and the peers."""
    lines: dict[str, Line] = {}
    for row in rows:
        kv, x, y = row["kv"], row["context"], row[value]
        lines.setdefault(kv, Line(f"{kv}, ours:", KV_COLORS[kv], [])).points.append((x, y))
        limit = Line(f"limit of {kv}:", KV_COLORS[kv], [], limit=True)
        lines.setdefault(f"limit {kv}", limit).points.append((x, y * row[fraction]))
        for name, peer in measured(row).items():
            if name in PEER_COLORS:
                lines.setdefault(name, Line(f"{NAMES[name]}:", PEER_COLORS[name], [])).points.append((x, peer))
    return list(lines.values())


def attention_times(report: dict) -> Iterable[tuple[str, Canvas]]:
    card = report["meta"]["card"]
    once: dict[tuple, dict] = {}  # a sweep comes by some cases again
    for row in attention_rows(report, "kernel", "sweep"):
        once.setdefault((row["kv"], shape_of(row)), row)
    for (batch, q_heads, kv_heads, dim), rows in groups(once.values(), "batch", "q_heads", "kv_heads", "head_dim"):
        if len({row["context"] for row in rows}) < 3:  # two make no line
            continue
        shape = f"batch {batch}, {q_heads} q and {kv_heads} kv heads of {dim}"
        title = f"Decode attention of one layer, {shape}, {card}"
        lines = kv_lines(rows, "us", "fraction_of_copy")
        yield f"time-b{batch}-{q_heads}-{kv_heads}-{dim}", chart(title, "tokens in the cache", "µs", lines, context_tick, ROOFLINE)


def step_times(report: dict) -> Iterable[tuple[str, Canvas]]:
    card = report["meta"]["card"]
    for (model, batch), rows in groups(report["decode"], "model", "batch"):
        title = f"A decode step of {model}, batch {batch}; {card}"
        lines = kv_lines(rows, "ms", "fraction_of_limit")
        yield f"step-{slug(model)}-b{batch}", chart(title, "tokens in the cache", "ms", lines, context_tick, ROOFLINE)


def throughputs(report: dict) -> Iterable[tuple[str, Canvas]]:
    """The most tokens/s that each cache reaches in a budget of memory, where there is more than one budget."""
    best: dict[tuple, dict[tuple, float]] = {}
    for row in report.get("throughput", ()):
        if not row["tokens_per_s"]:  # not one sequence fits
            continue
        rates = best.setdefault((row["model"], row["context"]), {})
        key = row["kv"], row["budget_gb"]
        rates[key] = max(row["tokens_per_s"], rates.get(key, 0))
    for (model, context), rates in best.items():
        lines: dict[str, Line] = {}
        for (kv, budget), rate in sorted(rates.items()):
            lines.setdefault(kv, Line(f"{kv}:", KV_COLORS.get(kv, MUTED), [])).points.append((budget, rate))
        if len({budget for _, budget in rates}) > 1:
            title = f"Tokens per second of {model} at {context:,} tokens, {report['meta']['card']}"
            axes, note = ("memory for weights and cache, GB", "tokens/s"), "Each cache with as many sequences as it is fastest with."
            yield f"throughput-{slug(model)}-{context}", chart(title, *axes, list(lines.values()), "{:g}".format, note)


def slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


# --- bars


def speedups(report: dict) -> Iterable[tuple[str, Canvas]]:
    """Of decode attention, over the fastest BF16 kernel of the same run; nothing where no shape has both."""
    best, rows = fastest_bf16(report), attention_rows(report)
    whole = {shape_of(row): row["bytes"] for row in rows if row["kv"] == "bf16"}
    shown = {(shape_of(row), row["kv"]): row for row in rows if row["kv"] in SPEEDUPS and shape_of(row) in best}
    shapes = list(dict.fromkeys(shape for shape, _ in shown))
    if not shapes:
        return
    title = f"Decode attention: times as fast as the fastest BF16 kernel of the same run, {report['meta']['card']}"
    height = 70 + 44 * len(shapes) + 24 * len(shown) + 40
    c, left, unit = Canvas(860, height, title), 130, 74
    bottom = height - 50
    c.text(30, 28, title, 14)
    for n in range(8):
        c.line([(left + n * unit, 48), (left + n * unit, bottom)], MUTED if n == 1 else GRID, 1)
        c.text(left + n * unit, bottom + 18, f"{n}x", 12, "middle", MUTED)
    c.text(left, bottom + 38, "speed-up; dashed: what the bytes allow, those of BF16 over those that are read", 12, fill=MUTED)
    y = 64
    for shape in shapes:
        us, name = best[shape]
        batch, context, q_heads, kv_heads, dim = shape
        c.rect(30, y - 6, 800, 24, "white")
        c.text(30, y + 10, f"{batch} x {context:,} tokens, {q_heads} / {kv_heads} heads of {dim}", 12.5)
        c.text(830, y + 10, f"fastest BF16: {NAMES[name]}, {us:.1f} µs", 12, "end", RED)
        y += 26
        for kv in SPEEDUPS:
            if (shape, kv) in shown:
                row = shown[shape, kv]
                gain, limit = us / row["us"], whole[shape] / row["bytes"]
                color = KV_COLORS.get(kv, GREY)
                c.text(left - 8, y + 13, kv, 12, "end", color)
                c.rect(left, y, gain * unit, 18, color)
                edge = left + limit * unit
                c.line([(left + gain * unit, y), (edge, y), (edge, y + 18), (left + gain * unit, y + 18)], color, 1, "3 3")
                c.text(left + gain * unit - 6, y + 13, f"{gain:.1f}x", 12, "end", "white")
                c.text(edge + 8, y + 13, f"{row['us']:.1f} µs; the bytes allow {limit:.1f}x", 12, fill=MUTED)
                y += 24
        y += 18
    yield "speedup", c


MEMORY_SHOWN = ("bf16", "int4", "oscar", "int2", "int2-compact")
PARTS = (("BF16 keys and values (all, or window and first tokens)", RED), ("codes", BLUE), ("steps and minima", PALE), ("norms", GREEN))


def memory() -> Canvas:
    """Bytes of an allocated cache of the Qwen3-8B shape by what they are; arithmetic of minioscar/cache.py."""
    title = "Memory of the cache of a Qwen3-8B shape, everything counted: arithmetic of the code, not measured"
    config, c, left, width = Config.from_dict(QWEN3_8B), Canvas(860, 440, title), 130, 480
    c.text(30, 28, title, 14)
    x = 30.0
    for name, color in PARTS:
        c.rect(x, 42, 12, 12, color)
        c.text(x + 18, 53, name, 12, fill=MUTED)
        x += 44 + 6.3 * len(name)
    cases = ((1, 131072), (48, 4096))
    most = max(sum(parts(config, "bf16", *case)) for case in cases)
    y = 78
    for batch, context in cases:
        c.text(30, y + 12, f"{batch} sequence{'s' * (batch > 1)} of {context:,} tokens", 12.5)
        y += 24
        whole = sum(parts(config, "bf16", batch, context))
        for kv in MEMORY_SHOWN:
            c.text(left - 8, y + 14, kv, 12, "end", INK)
            x, sizes = float(left), parts(config, kv, batch, context)
            for size, (_, color) in zip(sizes, PARTS, strict=True):
                c.rect(x, y, width * size / most, 20, color)
                x += width * size / most
            smaller = "" if kv == "bf16" else f", {whole / sum(sizes):.1f}x smaller"
            c.text(x + 8, y + 14, f"{sum(sizes) / 1e9:.2f} GB{smaller}", 12, fill=INK)
            y += 26
        y += 18
    return c


def parts(config: Config, kv: str, batch: int, context: int) -> list[int]:
    """Bytes in the order of PARTS."""
    found = [0] * len(PARTS)
    for name, (shape, dtype) in array_cache(SCHEMES[kv]).layout(config, SCHEMES[kv], batch, context).items():
        kind = 1 if name.endswith("codes") else 2 if name.endswith(("step", "min")) else 3 if name == "norms" else 0
        found[kind] += config.num_layers * math.prod(shape) * dtype.itemsize
    return found
