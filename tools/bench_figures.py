"""Figures of what bench.py measured: one set per committed JSON, of what it holds, and the memory of a cache by
arithmetic.

Dashed lines and outlines are limits: what the bytes that must be read take at the copy rate measured in the same run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from matplotlib.figure import Figure

from minioscar.cache import array_cache, blocks_of_row
from minioscar.config import Config
from minioscar.oscar import SCHEMES
from tools.committed import NAMES, QWEN3_8B, attention_rows, benches, fastest_bf16, measured, on_gpu, shape_of
from tools.plot import BLUE, GREEN, GREY, GRID, INK, MUTED, PALE, RED, figure, styled

PEER_COLORS = {
    "sdpa_fa2": "#b8862b",
    "sdpa_cudnn": "#7a5ea8",
    "triton": "#2b8a8a",
    "flashinfer": "#8a5a3c",
    "transformers": "#7a5ea8",
}
KV_COLORS = {"bf16": RED, "int2": BLUE, "int2-compact": GREEN}
ROOFLINE = "Dashed: the bytes that must be read, at the copy rate of the same run. Both axes are logarithmic."
SPEEDUPS = ("int2", "int2-compact", "oscar", "int4")


def drawn() -> dict[str, Figure]:
    """Name -> figure, of all that is committed."""
    found = {"memory": memory()}
    for name, report in benches().items():
        found |= drawn_from(name, report)
    return found


@styled
def drawn_from(name: str, report: dict) -> dict[str, Figure]:
    """Those that one report has the rows for; `name` begins theirs."""
    # Without a card the kernels are NumPy's, at small shapes.
    kernels = [*speedups(report), *attention_times(report)] if on_gpu(report) else []
    return {f"{name}-{what}": made for what, made in [*kernels, *step_times(report), *throughputs(report)]}


# --- lines over the context or the budget


class Line(NamedTuple):
    label: str
    color: str
    points: list[tuple[float, float]]
    limit: bool = False


def chart(title: str, x_label: str, y_label: str, lines: list[Line], tick: Callable[[float], str], note: str) -> Figure:
    """Logarithmic axes; every line is named at its right end, with its last value."""
    drawn, height = Figure(figsize=(860 / 96, 430 / 96), label=title), 286
    axes = drawn.add_axes((70 / 860, 80 / 430, 550 / 860, height / 430), xscale="log", yscale="log", xlabel=x_label)
    places = sorted({x for line in lines for x, _ in line.points})
    values = [y for line in lines for _, y in line.points]
    low, high = min(values) / 1.3, max(values) * 1.2
    digits = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [value for power in range(-3, 7) for digit in digits if low <= (value := digit * 10.0**power) <= high]
    axes.set_xticks(places, map(tick, places))
    axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.set(xlim=(places[0], places[-1]), ylim=(low, high))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, x=-40 / 550, pad=24)
    axes.text(-40 / 550, 1 + 16 / height, y_label, color=MUTED, transform=axes.transAxes)
    axes.text(-40 / 550, -68 / height, note, color=MUTED, transform=axes.transAxes)
    ends = [height * math.log(line.points[-1][1] / low) / math.log(high / low) for line in lines]
    for line, place in zip(lines, apart(ends, 17), strict=True):
        last, value = line.points[-1]
        style = {"lw": 1, "ls": (0, (5, 4))} if line.limit else {"lw": 1.8, "marker": "s", "ms": 4}
        axes.plot(*zip(*line.points, strict=True), color=line.color, clip_on=False, **style)
        text = f"{line.label} " + (f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
        leader = {"arrowstyle": "-", "color": line.color, "lw": 0.6, "shrinkA": 2, "shrinkB": 4, "relpos": (0, 0.5)}
        where = {"xytext": (1 + 26 / 550, place / height), "textcoords": "axes fraction", "arrowprops": leader}
        axes.annotate(text, (last, value), **where, color=line.color, va="center", annotation_clip=False)
    return drawn


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


def attention_times(report: dict) -> Iterable[tuple[str, Figure]]:
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
        yield (
            f"time-b{batch}-{q_heads}-{kv_heads}-{dim}",
            chart(title, "tokens in the cache", "µs", lines, context_tick, ROOFLINE),
        )


def step_times(report: dict) -> Iterable[tuple[str, Figure]]:
    card = report["meta"]["card"]
    for (model, batch), rows in groups(report["decode"], "model", "batch"):
        title = f"A decode step of {model}, batch {batch}; {card}"
        lines = kv_lines(rows, "ms", "fraction_of_limit")
        yield f"step-{slug(model)}-b{batch}", chart(title, "tokens in the cache", "ms", lines, context_tick, ROOFLINE)


def throughputs(report: dict) -> Iterable[tuple[str, Figure]]:
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
            axes, note = (
                ("memory for weights and cache, GB", "tokens/s"),
                "Each cache with as many sequences as it is fastest with.",
            )
            yield f"throughput-{slug(model)}-{context}", chart(title, *axes, list(lines.values()), "{:g}".format, note)


def slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


# --- bars


def speedups(report: dict) -> Iterable[tuple[str, Figure]]:
    """Of decode attention, over the fastest BF16 kernel of the same run; nothing where no shape has both."""
    best, rows = fastest_bf16(report), attention_rows(report)
    whole = {shape_of(row): row["bytes"] for row in rows if row["kv"] == "bf16"}
    shown = {(shape_of(row), row["kv"]): row for row in rows if row["kv"] in SPEEDUPS and shape_of(row) in best}
    shapes = list(dict.fromkeys(shape for shape, _ in shown))
    if not shapes:
        return
    title = f"Decode attention: times as fast as the fastest BF16 kernel of the same run, {report['meta']['card']}"
    drawn = figure(860, 110 + 44 * len(shapes) + 24 * len(shown), title)
    axes, y, kinds = drawn.subplots(), 0.0, {}
    for shape in shapes:
        us, name = best[shape]
        batch, context, q_heads, kv_heads, dim = shape
        heading = f"{batch} x {context:,} tokens, {q_heads} / {kv_heads} heads of {dim}"
        axes.text(-1.2, y, heading, va="center", weight="bold")
        axes.text(8.4, y, f"fastest BF16: {NAMES[name]}, {us:.1f} µs", ha="right", va="center", color=RED)
        for kv in filter(lambda kv: (shape, kv) in shown, SPEEDUPS):
            row, y = shown[shape, kv], y + 1
            gain, limit, color = us / row["us"], whole[shape] / row["bytes"], KV_COLORS.get(kv, GREY)
            kinds[y] = kv, color
            axes.barh(y, limit, 0.75, color="none", edgecolor=color, ls=(0, (3, 3)), lw=0.8)
            axes.barh(y, gain, 0.75, color=color)
            axes.text(gain - 0.08, y, f"{gain:.1f}x", ha="right", va="center", color="white")
            axes.text(
                max(gain, limit) + 0.1, y, f"{row['us']:.1f} µs; the bytes allow {limit:.1f}x", va="center", color=MUTED
            )
        y += 1.6
    axes.axvline(1, color=MUTED, lw=0.8, zorder=0.6)
    axes.set_yticks(list(kinds), [kv for kv, _ in kinds.values()])
    for label, (_, color) in zip(axes.get_yticklabels(), kinds.values(), strict=True):
        label.set_color(color)
    axes.set_xticks(range(8), [f"{n}x" for n in range(8)])
    axes.set(xlim=(0, 8.4), ylim=(y - 1, -0.7), title=title)
    axes.set_xlabel("speed-up; dashed: what the bytes allow, those of BF16 over those that are read", loc="left")
    axes.grid(axis="x", color=GRID)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    yield "speedup", drawn


MEMORY_SHOWN = ("bf16", "int4", "oscar", "int2", "int2-compact")
PARTS = (
    ("BF16 keys and values (all, or window and first tokens)", RED),
    ("codes", BLUE),
    ("steps and minima", PALE),
    ("norms", GREEN),
)


@styled
def memory() -> Figure:
    """Bytes of an allocated cache of the Qwen3-8B shape by what they are; arithmetic of minioscar/cache.py."""
    title = "Memory of the cache of a Qwen3-8B shape, everything counted: arithmetic of the code, not measured"
    config, drawn = Config.from_dict(QWEN3_8B), figure(860, 440, title)
    axes, y, names = drawn.subplots(), 0.0, {}
    for batch, context in ((1, 131072), (48, 4096)):
        axes.text(-2.8, y, f"{batch} sequence{'s' * (batch > 1)} of {context:,} tokens", va="center", weight="bold")
        whole = sum(parts(config, "bf16", batch, context)) / 1e9
        for kv in MEMORY_SHOWN:
            sizes, y, x = [size / 1e9 for size in parts(config, kv, batch, context)], y + 1, 0.0
            names[y] = kv
            for size, (name, color) in zip(sizes, PARTS, strict=True):
                axes.barh(y, size, 0.78, x, color=color, label=name if len(names) == 1 else None)
                x += size
            smaller = "" if kv == "bf16" else f", {whole / x:.1f}x smaller"
            axes.text(x + 0.3, y, f"{x:.2f} GB{smaller}", va="center")
        y += 1.6
    axes.set_yticks(list(names), names.values(), color=INK)
    axes.set(xticks=[], xlim=(0, 34), ylim=(y - 1, -0.7))
    axes.set_title(title, pad=24)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=len(PARTS), handlelength=0.9, columnspacing=1.4, borderpad=0
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return drawn


def parts(config: Config, kv: str, batch: int, context: int) -> list[int]:
    """Bytes in the order of PARTS."""
    found, scheme = [0] * len(PARTS), SCHEMES[kv]
    layout = array_cache(scheme).layout(config, scheme, batch, context, batch * blocks_of_row(scheme, context))
    for name, (shape, dtype) in layout.items():
        kind = 1 if name.endswith("codes") else 2 if name.endswith(("step", "min")) else 3 if name == "norms" else 0
        found[kind] += config.num_layers * math.prod(shape) * dtype.itemsize
    return found
