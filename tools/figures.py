"""The figures of docs/reading.md and docs/method.md: drawn from docs/results/figures.json and from the code itself.

    python -m tools.figures              draws them and those of bench_figures.py (part of `make results`)
    python -m tools.figures --measure    first measures the numbers again, on SmolLM2-135M
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import bench_figures
from tools.canvas import BLUE, FAINT, GREEN, INK, RED, SAND, Canvas
from tools.committed import QWEN3_8B, RESULTS, ROOT

OUT, NUMBERS = ROOT / "docs" / "figures", RESULTS / "figures.json"


# --- the way of a token


def path(numbers: dict) -> Canvas:
    """Files from top to bottom, what each hands to the next, and what the cache is to them."""
    c = Canvas(820, 560, "The way of a token through the files of minioscar")
    stations = [
        ("cli.py", "reads the command", '"The capital of France is"'),
        ("engine.py", "checks everything, makes room", "[504, 3575, 282, 4649, 314]"),
        ("tokenizer.py", "text → ids, and back", ""),
        ("generation.py", "prefill, then step by step", "ids of this pass, and which row of the cache they go to"),
        ("model.py", "the transformer, layer by layer", "x  [tokens, 576]"),
        ("ops/reference.py or ops/cuda.py", "what every operation means", "q, k, v  [tokens, heads, 64]"),
        ("oscar.py / kernels/*.cu", "the method; the same, on the card", "codes, steps, minima, norms"),
    ]
    y = 30
    for i, (name, does, hands) in enumerate(stations):
        if name == "tokenizer.py":
            c.rect(500, y - 78, 240, 50, SAND, FAINT)
            c.text(512, y - 58, name, 14)
            c.text(512, y - 38, does, 12, fill=FAINT)
            c.line([(400, y - 61), (498, y - 61)], arrow=True)
            c.line([(500, y - 44), (402, y - 44)], arrow=True)
            continue
        c.rect(60, y, 340, 50, SAND, FAINT)
        c.text(72, y + 20, name, 14)
        c.text(72, y + 40, does, 12, fill=FAINT)
        if i < len(stations) - 1:
            c.line([(230, y + 50), (230, y + 76)], arrow=True)
            c.text(242, y + 68, hands, 12, fill=BLUE, mono=True)
        y += 80
    c.rect(560, 270, 200, 130, "white", BLUE)
    c.text(572, 292, "cache.py", 14, fill=BLUE)
    for n, line in enumerate(("one row a sequence:", "sinks, packed blocks,", "window; allocated once,", "never grows")):
        c.text(572, 318 + 20 * n, line, 12)
    c.line([(400, 300), (558, 300)], BLUE, arrow=True)
    c.text(410, 292, "room, lengths", 12, fill=BLUE)
    c.line([(400, 375), (558, 375)], BLUE, arrow=True)
    c.text(410, 367, "append and read", 12, fill=BLUE)
    c.line([(60, 295), (36, 295), (36, 215), (58, 215)], arrow=True)
    c.text(30, 255, "new token", 12, anchor="middle", fill=FAINT, upright=True)
    c.text(60, 545, "Each file imports only what stands below it. Two back ends, one list of operations.", 12, fill=FAINT)
    return c


# --- a row of the cache


def row(numbers: dict) -> Canvas:
    """What is kept of 300 tokens, with the bytes of a token of SmolLM2 in one kv head of one layer."""
    c = Canvas(860, 330, "One row of the cache: sinks, packed blocks and the window")
    left, scale = 40, 2.35
    spans = [(0, 32, RED, "sinks"), (32, 128, BLUE, "block 0"), (128, 256, BLUE, "block 1"), (256, 300, GREEN, "window")]
    c.text(left, 32, "300 tokens of one sequence, one layer, one kv head (scheme int2, head_dim 64)", 14)
    for a, b, color, name in spans:
        c.rect(left + a * scale, 60, (b - a) * scale, 46, color, "white")
        c.text(left + (a + b) / 2 * scale, 88, name, 13, "middle", "white")
    for t in (0, 32, 128, 256, 300):
        c.line([(left + t * scale, 106), (left + t * scale, 114)])
        c.text(left + t * scale, 128, str(t), 12, "middle")
    c.text(left + 300 * scale + 10, 88, "next token →", 12, fill=FAINT)
    per = numbers["row_bytes"]
    codes = "codes 16 + 16 B, key steps and minima 2 x 64 x 2 B / 32, value steps 2 x 2 B"
    rows = [
        (RED, "sinks: the first 32 tokens", f"BF16: 64 keys and 64 values of 2 B = {per['bf16']} B a token; their packed slots lie unused"),
        (BLUE, "packed: whole blocks of 128", f"{codes} = {per['int2']} B a token"),
        (GREEN, "window: the newest, 0 … 127", f"BF16, {per['bf16']} B a token; when it holds 128, all of it becomes one block"),
        (FAINT, "norms: every token", f"one float32 a token, over all {per['kv_heads']} kv heads of the layer"),
    ]
    for n, (color, what, cost) in enumerate(rows):
        y = 165 + 38 * n
        c.rect(left, y - 11, 14, 14, color)
        c.text(left + 24, y, what, 13)
        c.text(left + 24, y + 16, cost, 12, fill=FAINT)
    return c


# --- one group


def group(numbers: dict) -> Canvas:
    """32 real numbers of one channel become 2-bit codes: levels of the whole range, and of the narrowed one."""
    data = numbers["group"]
    values, low, high = data["values"], min(data["values"]), max(data["values"])
    c = Canvas(860, 400, "A group of 32 tokens of one channel and its four levels")
    where = f"channel {data['channel']} of kv head {data['head']}, layer {data['layer']}, tokens {data['first']} … {data['first'] + 31}"
    c.text(40, 30, f"One key group: {where}", 14)
    top, height = 60, 230

    def place(v: float) -> float:
        return top + height - (v - low) / (high - low) * height

    for name, x, color in (("oscar", 640, FAINT), ("int2", 640, BLUE)):
        for level in range(4):
            v = data[name]["min"] + level * data[name]["step"]
            c.line([(60, place(v)), (620, place(v))], color, 1, "2,4" if name == "oscar" else "")
            if name == "int2":
                c.text(x, place(v) + 4, f"code {level}", 12, fill=color)
    for t, v in enumerate(values):
        x, code = 70 + t * 17.3, data["int2"]["codes"][t]
        level = data["int2"]["min"] + code * data["int2"]["step"]
        c.line([(x, place(v)), (x, place(level))], FAINT, 1)
        c.rect(x - 3, place(v) - 3, 6, 6, INK)
        c.text(x, 318, str(code), 12, "middle", BLUE, mono=True)
    c.text(640, 318, "codes, 2 bits each", 12, fill=BLUE)
    packed = " ".join(f"{byte:02x}" for byte in data["int2"]["bytes"])
    fields = f"step {data['int2']['step']:.5f}, min {data['int2']['min']:+.5f} in fp16"
    c.text(70, 346, f"as 8 bytes: {packed}    and {fields}: 12 bytes for 64", 13, mono=True)
    legend = "squares: the numbers; solid lines: levels of int2, whose range is narrowed to 0.9; dotted: those of oscar (the whole range)"
    c.text(70, 376, legend, 12, fill=FAINT)
    return c


# --- why rotate, why scale


def bars(c: Canvas, x: float, y: float, w: float, h: float, values: Sequence[float], most: float, color: str) -> None:
    step = w / len(values)
    for i, v in enumerate(values):
        c.rect(x + i * step, y + h - v / most * h, step * 0.85, v / most * h, color)
    c.line([(x, y + h), (x + w, y + h)], FAINT, 1)


def rotation(numbers: dict) -> Canvas:
    data = numbers["rotation"]
    most = max(data["before"])
    c = Canvas(860, 260, "Channels of keys before and after the rotation")
    for n, (name, color) in enumerate((("before", RED), ("after", BLUE))):
        x = 40 + 415 * n
        ratio = max(data[name]) / (sum(data[name]) / len(data[name]))
        c.text(x, 30, f"{'keys' if n == 0 else 'the same, times H'}: largest channel {ratio:.1f} x the mean", 13)
        bars(c, x, 50, 380, 160, data[name], most, color)
        c.text(x, 232, "mean |k| of each of the 64 channels", 12, fill=FAINT)
    c.text(40, 252, f"SmolLM2-135M, layer {data['layer']}, kv head {data['head']}, {data['tokens']} tokens of English", 12, fill=FAINT)
    return c


def norms(numbers: dict) -> Canvas:
    data = numbers["norms"]
    c = Canvas(860, 240, "Norms of tokens, and the error of keys by token")
    titles = {"norms": ("norm of a token's keys", INK), "kivi": ("relative error: kivi", RED), "oscar": ("relative error: oscar", BLUE)}
    for n, (name, (title, color)) in enumerate(titles.items()):
        x, (first, *others) = 40 + 270 * n, data[name]
        c.text(x, 30, title, 13)
        bars(c, x, 50, 240, 130, data[name], max(data["norms"]) if n == 0 else max(data["kivi"]), color)
        c.text(x, 200, f"token 0: {first:.2f}; mean of 1 … {len(others)}: {sum(others) / len(others):.2f}", 12, fill=FAINT)
    where = f"SmolLM2-135M, layer {data['layer']}, all kv heads, tokens 0 … {len(data['norms']) - 1}"
    c.text(40, 228, f"{where}. Token 0 is an attention sink: a small norm, and much attention.", 12, fill=FAINT)
    return c


# --- what a decode step reads


def step(numbers: dict) -> Canvas:
    data = numbers["step"]
    c = Canvas(860, 420, "Bytes that a decode step reads")
    left, bottom, width, height = 90, 350, 640, 290
    contexts, most = data["contexts"], max(data["bf16"]) + data["weights"]
    c.text(40, 30, f"Bytes that one decode step of {data['model']} reads (batch 1), in GB", 14)

    def at(i: int) -> float:
        return left + width * contexts[i] / contexts[-1]

    def up(size: float) -> float:
        return bottom - height * size / most

    for tick in range(0, int(most / 1e9) + 1, 5):
        c.line([(left, up(tick * 1e9)), (left + width, up(tick * 1e9))], "#e4e4e4", 1)
        c.text(left - 8, up(tick * 1e9) + 4, str(tick), 12, "end", FAINT)
    for tick in contexts[::2]:
        x = left + width * tick / contexts[-1]
        c.text(x, bottom + 20, f"{tick // 1024}K" if tick else "0", 12, "middle", FAINT)
    c.rect(left, up(data["weights"]), width, bottom - up(data["weights"]), SAND)
    c.text(left + 10, up(data["weights"] / 2), f"weights, {data['weights'] / 1e9:.1f} GB in BF16", 12)
    for name, color in (("bf16", RED), ("oscar", FAINT), ("int2", BLUE)):
        c.line([(at(i), up(b + data["weights"])) for i, b in enumerate(data[name])], color, 2.5)
        y = up(data[name][-1] + data["weights"]) + (14 if name == "int2" else 2)
        c.text(left + width + 8, y, f"{name} {data[name][-1] / 1e9:.1f}", 12, fill=color)
    c.text(left, bottom + 44, "tokens in the cache. Above the weights: keys and values, steps, minima and norms.", 12, fill=FAINT)
    return c


# --- what is read of a turn


def turns(numbers: dict) -> Canvas:
    """The cache between two turns of a chat: what it holds, what is fed, and where it may be cut."""
    c = Canvas(860, 300, "The cache between the turns of a chat")
    left, scale = 40, 1.55

    def strip(y: float, parts: list[tuple[int, str, str]]) -> None:
        x = left
        for tokens, color, label in parts:
            c.rect(x, y, tokens * scale, 30, color, "white")
            c.text(x + tokens * scale / 2, y + 20, label, 11, "middle", "white" if color not in (SAND, "#dfe8f5") else INK)
            x += tokens * scale

    c.text(left, 28, "after the answer, the cache holds", 13)
    strip(38, [(128, BLUE, "block"), (128, BLUE, "block"), (70, GREEN, "window")])
    c.text(left, 98, "the next turn renders to the same tokens and goes on: only the new ones are fed", 13)
    strip(108, [(326, "#dfe8f5", "as it is"), (60, INK, "fed")])
    c.text(left, 168, "it parts from them within the window: the window is cut there", 13)
    strip(178, [(290, "#dfe8f5", "as it is"), (96, INK, "fed")])
    c.text(left, 238, "it parts from them within a block: that block is fed again, the ones before it stay", 13)
    strip(248, [(128, "#dfe8f5", "as it is"), (72, FAINT, "fed again"), (186, INK, "fed")])
    return c


DRAWN = {"path": path, "row": row, "group": group, "rotation": rotation, "norms": norms, "step": step, "turns": turns}


def draw(folder: Path = OUT) -> None:
    for name, canvas in all_drawn().items():
        canvas.save(f"{name}.svg", folder)


def all_drawn() -> dict[str, Canvas]:
    numbers = json.loads(NUMBERS.read_text())
    return {name: make(numbers) for name, make in DRAWN.items()} | bench_figures.drawn()


# --- the numbers


def measure() -> None:
    """From SmolLM2-135M (one layer's keys over real text), and from the arithmetic of the cache."""
    import numpy as np

    from minioscar import load, oscar
    from minioscar.cache import cache_bytes, row_layout
    from minioscar.config import Config
    from minioscar.evaluation.fidelity import default_text
    from minioscar.oscar import SCHEMES

    layer, head, tokens, channel, first = 15, 0, 256, 12, 64
    engine = load("smollm2-135m", "kivi", "cpu")  # keys as they are, not rotated
    found: list[np.ndarray] = []
    engine.model = engine.model.observed(lambda q, new: found.append(np.array(new.k)))
    engine.logits(engine.encode(default_text()[:4000], chat=False)[:tokens])
    keys = found[layer]  # [tokens, kv_heads, d]
    rotated, norm = oscar.rotate(keys), oscar.token_norms(oscar.rotate(keys))
    part = (rotated / norm[:, None, None])[first : first + 32, head, channel].astype(np.float32)
    group = {"layer": layer, "head": head, "channel": channel, "first": first, "values": part.tolist()}
    for name in ("oscar", "int2"):
        codes, step, low = oscar.quantize(part[:, None], -2, 32, 2, SCHEMES[name].shrink)
        packed = oscar.pack(codes[:, 0], 2)
        group[name] = {"codes": codes[:, 0].tolist(), "step": float(step[0, 0]), "min": float(low[0, 0]), "bytes": packed.tolist()}
    errors = {}
    for name in ("kivi", "oscar"):
        scheme, x = SCHEMES[name], (rotated if SCHEMES[name].rotate else keys).swapaxes(0, 1)
        back = oscar.dequantize_keys(*oscar.quantize_keys(x, norm, scheme), norm, scheme)
        errors[name] = (np.linalg.norm(back - x, axis=(0, 2)) / norm)[:48].round(4).tolist()
    config, contexts = Config.from_dict(QWEN3_8B), [n * 16384 for n in range(9)]
    read = {name: [cache_bytes(config, SCHEMES[name], 1, n) if n else 0 for n in contexts] for name in ("bf16", "oscar", "int2")}
    per_head = {**QWEN3_8B, "head_dim": 64, "num_key_value_heads": 1, "num_attention_heads": 1, "num_hidden_layers": 1}
    one = {}
    for name in ("bf16", "int2"):
        arrays = row_layout(Config.from_dict(per_head), SCHEMES[name], 12800)
        arrays = {n: of for n, of in arrays.items() if not n.startswith(("sink", "norms"))}
        one[name] = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays.values()) // 12800
    weights = 2 * (config.parameters() - config.vocab_size * config.hidden_size)  # one row of the embedding is read, not all
    numbers = {
        "rotation": {
            "layer": layer, "head": head, "tokens": tokens,
            "before": np.abs(keys[:, head]).mean(0).round(4).tolist(), "after": np.abs(rotated[:, head]).mean(0).round(4).tolist(),
        },
        "norms": {"layer": layer, "norms": norm[:48].round(3).tolist(), **errors},
        "group": group,
        "step": {"model": "the Qwen3-8B shape", "contexts": contexts, "weights": weights, **read},
        "row_bytes": {**one, "kv_heads": 3},
    }
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure()
    draw()
