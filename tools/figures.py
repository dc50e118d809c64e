"""The figures of docs/reading.md and docs/method.md: drawn from docs/results/figures.json and from the code itself.

python -m tools.figures              draws them, those of bench_figures.py, pareto.svg (part of `make results`)
python -m tools.figures --measure    first measures the numbers again, on SmolLM2-135M
"""

from __future__ import annotations

import json
import sys

from matplotlib.figure import Figure

from minioscar.storage.files import replacing
from tools import bench_figures, pareto, scale_tables
from tools.committed import QWEN3_8B, RESULTS, ROOT
from tools.plot import BLUE, FAINT, GREEN, GRID, INK, MUTED, RED, SAND, arrow, box, figure, page, save, styled, words

OUT, NUMBERS = ROOT / "docs" / "figures", RESULTS / "figures.json"
FED = "#dfe8f5"


# --- the path of a token


def path(numbers: dict) -> Figure:
    """Files from top to bottom, what each hands to the next, and what the cache is to them."""
    drawn, axes = page(820, 560, "The path of a token through the files of minioscar")
    stations = [
        ("app/cli.py", "reads the command", '"The capital of France is"'),
        ("engine.py", "checks everything, allocates the cache", "[504, 3575, 282, 4649, 314]"),
        ("generation.py", "prefill, then step by step", "ids of this pass, and the rows of the cache they go to"),
        ("model.py", "the transformer, layer by layer", "x  [tokens, 576]"),
        ("ops/reference.py or ops/cuda.py", "what every operation means", "q, k, v  [tokens, heads, 64]"),
        ("oscar.py / kernels/*.cu", "the method; the same, on the card", ""),
    ]
    for i, (name, does, hands) in enumerate(stations):
        y = 30 + 80 * i
        box(axes, 60, y, 340, 50, SAND, FAINT)
        words(axes, 72, y + 20, name, 14)
        words(axes, 72, y + 40, does, 12, color=MUTED)
        if hands:
            arrow(axes, [(230, y + 50), (230, y + 79)])
            words(axes, 242, y + 69, hands, 12, color=BLUE, family="monospace")
    box(axes, 500, 112, 240, 50, SAND, FAINT)
    words(axes, 512, 132, "tokenizer.py", 14)
    words(axes, 512, 152, "text → ids, and back", 12, color=MUTED)
    arrow(axes, [(400, 129), (499, 129)])
    arrow(axes, [(500, 146), (401, 146)])
    box(axes, 560, 270, 200, 130, "white", BLUE)
    words(axes, 572, 292, "cache.py", 14, color=BLUE)
    for n, line in enumerate(
        ("one row a sequence:", "sinks, packed blocks,", "window; allocated once,", "never grows")
    ):
        words(axes, 572, 318 + 20 * n, line, 12)
    for y, what in ((300, "rows, lengths"), (375, "append and read")):
        arrow(axes, [(400, y), (559, y)], BLUE)
        words(axes, 410, y - 8, what, 12, color=BLUE)
    arrow(axes, [(60, 295), (36, 295), (36, 215), (59, 215)])
    words(axes, 24, 255, "new token", 12, color=MUTED, rotation=90, ha="center", va="center")
    words(
        axes,
        60,
        525,
        "Each file imports only what stands below it. Two back ends, one list of operations.",
        12,
        color=MUTED,
    )
    return drawn


# --- a row of the cache


def row(numbers: dict) -> Figure:
    """What is kept of 300 tokens, with the bytes of a token of SmolLM2 in one kv head of one layer."""
    drawn, axes = page(860, 330, "One row of the cache: sinks, packed blocks and the window")
    left, scale = 40, 2.35
    spans = [
        (0, 32, RED, "sinks"),
        (32, 128, BLUE, "block 0"),
        (128, 256, BLUE, "block 1"),
        (256, 300, GREEN, "window"),
    ]
    words(axes, left, 32, "300 tokens of one sequence, one layer, one kv head (scheme int2, head_dim 64)", 14)
    for begin, end, color, name in spans:
        box(axes, left + begin * scale, 60, (end - begin) * scale, 46, color, "white")
        words(axes, left + (begin + end) / 2 * scale, 88, name, 13, ha="center", color="white")
    for token in (0, 32, 128, 256, 300):
        axes.plot([left + token * scale] * 2, [106, 114], color=INK, lw=1)
        words(axes, left + token * scale, 128, str(token), 12, ha="center")
    words(axes, left + 300 * scale + 10, 88, "next token →", 12, color=MUTED)
    size = numbers["row_bytes"]
    sinks = f"BF16: 64 keys and 64 values of 2 B = {size['bf16']} B a token; their packed slots lie unused"
    codes = "codes 16 + 16 B, key steps and minima 2 x 64 x 2 B / 32, value steps 2 x 2 B"
    window = f"BF16, {size['bf16']} B a token; when it holds 128, all of it becomes one block"
    rows = [
        (RED, "sinks: the first 32 tokens", sinks),
        (BLUE, "packed: whole blocks of 128", f"{codes} = {size['int2']} B a token"),
        (GREEN, "window: the newest, 0 … 127", window),
        (FAINT, "norms: every token", f"one float32 a token, over all {size['kv_heads']} kv heads of the layer"),
    ]
    for n, (color, what, cost) in enumerate(rows):
        y = 165 + 38 * n
        box(axes, left, y - 11, 14, 14, color)
        words(axes, left + 24, y, what, 13)
        words(axes, left + 24, y + 16, cost, 12, color=MUTED)
    return drawn


# --- one group


def group(numbers: dict) -> Figure:
    """32 real numbers of one channel become 2-bit codes: levels of the whole range, and of the narrowed one."""
    data = numbers["group"]
    drawn = figure(860, 400, "A group of 32 tokens of one channel and its four levels")
    axes, int2 = drawn.subplots(), data["int2"]
    where = f"channel {data['channel']} of kv head {data['head']}, layer {data['layer']}"
    axes.set_title(f"One key group: {where}, tokens {data['first']} … {data['first'] + 31}")
    for level in range(4):
        for name, color, style in (("oscar", FAINT, ":"), ("int2", BLUE, "-")):
            axes.plot([-0.6, 31.6], [data[name]["min"] + level * data[name]["step"]] * 2, style, color=color, lw=1)
        axes.text(32, int2["min"] + level * int2["step"], f"code {level}", color=BLUE, va="center")
    for token, (value, code) in enumerate(zip(data["values"], int2["codes"], strict=True)):
        axes.plot([token] * 2, [value, int2["min"] + code * int2["step"]], color=FAINT, lw=0.8)
    axes.plot(range(32), data["values"], "s", color=INK, ms=4.5)
    axes.set_xticks(range(32), map(str, int2["codes"]), family="monospace", color=BLUE)
    axes.tick_params(length=0)
    axes.set(yticks=[], xlim=(-0.7, 34.5))
    axes.spines[:].set_visible(False)
    packed = " ".join(f"{byte:02x}" for byte in int2["bytes"])
    fields = f"step {int2['step']:.5f}, min {int2['min']:+.5f} in fp16"
    legend = (
        f"the codes, 2 bits each; as 8 bytes: {packed}, and {fields}: 12 bytes for 64\n"
        "squares: the numbers; solid lines: levels of int2, whose range is narrowed to 0.9; dotted: those of "
        "oscar (the whole range)"
    )
    axes.set_xlabel(legend, loc="left", linespacing=1.6)
    return drawn


# --- why rotate, why scale


def rotation(numbers: dict) -> Figure:
    data = numbers["rotation"]
    drawn = figure(860, 280, "Channels of keys before and after the rotation")
    kinds = (("before", "keys", RED), ("after", "the same, times H", BLUE))
    for axes, (name, title, color) in zip(drawn.subplots(1, 2, sharey=True), kinds, strict=True):
        ratio = max(data[name]) / (sum(data[name]) / len(data[name]))
        axes.bar(range(len(data[name])), data[name], 0.85, color=color)
        axes.set(title=f"{title}: largest channel {ratio:.1f} x the mean", xlabel="channel", xmargin=0.01)
    where = f"SmolLM2-135M, layer {data['layer']}, kv head {data['head']}, {data['tokens']} tokens of English"
    drawn.axes[0].set_ylabel("mean |k|")
    drawn.supxlabel(where, fontsize=9, color=MUTED)
    return drawn


def norms(numbers: dict) -> Figure:
    data = numbers["norms"]
    drawn = figure(860, 270, "Norms of tokens, and the error of keys by token")
    titles = {
        "norms": ("norm of a token's keys", INK),
        "kivi": ("relative error: kivi", RED),
        "oscar": ("relative error: oscar", BLUE),
    }
    for axes, (name, (title, color)) in zip(drawn.subplots(1, 3), titles.items(), strict=True):
        first, *others = data[name]
        axes.bar(range(len(data[name])), data[name], 0.85, color=color)
        mean = sum(others) / len(others)
        axes.set(title=title, xlabel=f"token 0: {first:.2f}; mean of 1 … {len(others)}: {mean:.2f}", xmargin=0.01)
        axes.set_ylim(0, max(data["norms" if name == "norms" else "kivi"]) * 1.05)
    where = f"SmolLM2-135M, layer {data['layer']}, all kv heads, tokens 0 … {len(data['norms']) - 1}"
    drawn.supxlabel(
        f"{where}. Token 0 is an attention sink: a small norm, and much attention.", fontsize=9, color=MUTED
    )
    return drawn


# --- what a decode step reads


def step(numbers: dict) -> Figure:
    data = numbers["step"]
    drawn = figure(860, 420, "Bytes that a decode step reads")
    axes, contexts, weights = drawn.subplots(), data["contexts"], data["weights"] / 1e9
    axes.fill_between([0, contexts[-1]], weights, color=SAND, lw=0)
    axes.text(contexts[-1] / 50, weights / 2, f"weights, {weights:.1f} GB in BF16")
    for name, color, offset in (("bf16", RED, 0), ("oscar", FAINT, 3), ("int2", BLUE, -6)):
        sizes = [size / 1e9 for size in data[name]]
        axes.plot(contexts, [size + weights for size in sizes], color=color, lw=2)
        place = {"xytext": (6, offset), "textcoords": "offset points", "va": "center", "color": color}
        axes.annotate(f"{name} {sizes[-1]:.1f}", (contexts[-1], sizes[-1] + weights), **place, annotation_clip=False)
    axes.set_title(f"Bytes that one decode step of {data['model']} reads (batch 1), in GB")
    axes.set_xlabel("tokens in the cache. Above the weights: keys and values, steps, minima and norms.")
    axes.set_xticks(contexts[::2], [bench_figures.context_tick(tokens) for tokens in contexts[::2]])
    axes.set(xlim=(0, contexts[-1]), ylim=(0, None))
    axes.grid(axis="y", color=GRID)
    return drawn


# --- what a turn of a chat feeds


def turns(numbers: dict) -> Figure:
    """The cache between two turns of a chat: what it holds, what is fed, and where it may be cut."""
    drawn, axes = page(860, 300, "The cache between the turns of a chat")
    left, scale = 40, 1.55
    strips = [
        ("after the answer, the cache holds", [(128, BLUE, "block"), (128, BLUE, "block"), (70, GREEN, "window")]),
        (
            "the next turn renders to the same tokens and goes on: only the new ones are fed",
            [(326, FED, "as it is"), (60, INK, "fed")],
        ),
        ("it parts from them within the window: the window is cut there", [(290, FED, "as it is"), (96, INK, "fed")]),
        (
            "it parts from them within a block: that block is fed again, the ones before it stay",
            [(128, FED, "as it is"), (72, FAINT, "fed again"), (186, INK, "fed")],
        ),
    ]
    for n, (text, pieces) in enumerate(strips):
        x, y = float(left), 28 + 70 * n
        words(axes, x, y, text, 13)
        for tokens, color, label in pieces:
            box(axes, x, y + 10, tokens * scale, 30, color, "white")
            ink = INK if color == FED else "white"
            words(axes, x + tokens * scale / 2, y + 25, label, 11, ha="center", va="center", color=ink)
            x += tokens * scale
    return drawn


DRAWN = {"path": path, "row": row, "group": group, "rotation": rotation, "norms": norms, "step": step, "turns": turns}
DRAWN |= {"scale": scale_tables.drawn}


def draw() -> None:
    for name, drawn in all_drawn().items():
        save(drawn, OUT / f"{name}.svg")
    save(pareto.drawn(), RESULTS / "pareto.svg")


@styled
def all_drawn() -> dict[str, Figure]:
    numbers = json.loads(NUMBERS.read_text())
    return {name: make(numbers) for name, make in DRAWN.items()} | bench_figures.drawn()


# --- the numbers


def measure() -> None:
    """From SmolLM2-135M (one layer's keys over real text), and from the arithmetic of the cache."""
    import numpy as np

    from minioscar import attention_inputs, load, oscar, rows
    from minioscar.cache import cache_bytes
    from minioscar.config import Config
    from minioscar.evaluation.fidelity import default_text
    from minioscar.oscar import SCHEMES

    layer, head, tokens, channel, first = 15, 0, 256, 12, 64
    engine = load("smollm2-135m", "kivi", "cpu")  # keys as they are, not rotated
    found: list[np.ndarray] = []
    engine.model = attention_inputs.observed(engine.model, lambda q, new: found.append(np.array(new.k)))
    engine.logits(engine.encode(default_text()[:4000], chat=False)[:tokens])
    keys = found[layer]  # [tokens, kv_heads, d]
    rotated, norm = oscar.rotate(keys), oscar.token_norms(oscar.rotate(keys))
    part = (rotated / norm[:, None, None])[first : first + 32, head, channel].astype(np.float32)
    group = {"layer": layer, "head": head, "channel": channel, "first": first, "values": part.tolist()}
    for name in ("oscar", "int2"):
        codes, step, low = oscar.quantize(part[:, None], -2, 32, 2, SCHEMES[name].shrink)
        packed = oscar.pack(codes[:, 0], 2)
        group[name] = {
            "codes": codes[:, 0].tolist(),
            "step": float(step[0, 0]),
            "min": float(low[0, 0]),
            "bytes": packed.tolist(),
        }
    errors = {}
    for name in ("kivi", "oscar"):
        scheme, x = SCHEMES[name], (rotated if SCHEMES[name].rotate else keys).swapaxes(0, 1)
        back = oscar.dequantize_keys(*oscar.quantize_keys(x, norm, scheme), norm, scheme)
        errors[name] = (np.linalg.norm(back - x, axis=(0, 2)) / norm)[:48].round(4).tolist()
    config, contexts = Config.from_dict(QWEN3_8B), [n * 16384 for n in range(9)]
    read = {
        name: [cache_bytes(config, SCHEMES[name], 1, n) if n else 0 for n in contexts]
        for name in ("bf16", "oscar", "int2")
    }
    per_head = {**QWEN3_8B, "head_dim": 64, "num_key_value_heads": 1, "num_attention_heads": 1, "num_hidden_layers": 1}
    one = {}
    for name in ("bf16", "int2"):
        arrays = rows.row_layout(Config.from_dict(per_head), SCHEMES[name], 12800)
        arrays = {n: of for n, of in arrays.items() if not n.startswith(("sink", "norms"))}
        one[name] = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays.values()) // 12800
    weights = 2 * (config.parameters() - config.vocab_size * config.hidden_size)  # of the embedding one row is read
    numbers = {
        "rotation": {
            "layer": layer,
            "head": head,
            "tokens": tokens,
            "before": np.abs(keys[:, head]).mean(0).round(4).tolist(),
            "after": np.abs(rotated[:, head]).mean(0).round(4).tolist(),
        },
        "norms": {"layer": layer, "norms": norm[:48].round(3).tolist(), **errors},
        "group": group,
        "step": {"model": "the Qwen3-8B shape", "contexts": contexts, "weights": weights, **read},
        "row_bytes": {**one, "kv_heads": 3},
    }
    with replacing(NUMBERS) as partial:
        partial.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure()
    draw()
