"""The tables of docs/weights.md and parallel.md: which model fits which cards, and what 4 and 8 bits cost."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from benchmarks import presets, quantized
from benchmarks.runs import POSITIONS
from minioscar.config import Config
from minioscar.memory import longest_context
from minioscar.ops.cuda import OnPaper
from minioscar.ops.launch import Card
from minioscar.oscar import SCHEMES
from minioscar.parallel.backend import Split
from minioscar.parallel.collectives import NOTHING_PUSHED
from minioscar.parallel.cuda import SplitCuda
from minioscar.tables import markdown
from tools.committed import load

CARDS = (8, 12, 16, 24, 48, 80)  # GiB
RESERVED = 0.9 * 2**30  # bytes of CUDA itself and of a desktop
READ = 2048  # tokens that are read at a time
MODELS = {"qwen3-4b": "Qwen3-4B", "qwen3-8b": "Qwen3-8B", "llama-3.1-8b": "Llama-3.1-8B", "qwen3-14b": "Qwen3-14B"}
MODELS |= {"qwen3-32b": "Qwen3-32B", "llama-3.1-70b": "Llama-3.1-70B"}
CARD = Card(128, 89)  # plans, and with them work memory, differ little between cards
CASES = ("awq", "bf16"), ("awq", "int2"), (None, "int2")
SEVERAL = (2, 12), (2, 16), (2, 24), (4, 24), (2, 48), (4, 48)  # cards, GiB of each
LARGE = ("qwen3-14b", "Qwen3-14B"), ("qwen3-30b-a3b", "Qwen3-30B-A3B"), ("qwen3-32b", "Qwen3-32B")
LARGE = dict((*LARGE, ("llama-3.1-70b", "Llama-3.1-70B")))


class OnSeveral(SplitCuda):
    """Cards on which nothing runs, and which do not reach each other's memory, as most small ones do not."""

    on = Split.on

    def __init__(self, cards: int, config: Config):
        Split.__init__(self, [OnPaper(CARD)] * cards, config)
        self.links = SimpleNamespace(pushed=NOTHING_PUSHED)


def longest(preset: str, weights: str | None, kv: str, gib: int, cards: int = 1) -> int:
    """Tokens of one conversation that fit, by the arithmetic of `info`."""
    config = quantized.config_with(replace(presets.config_of(preset), max_positions=POSITIONS, window=None), weights)
    ops = OnPaper(CARD) if cards == 1 else OnSeveral(cards, config)
    free = cards * (gib * 2**30 - int(RESERVED)) - ops.weight_bytes(config)
    return longest_context(config, SCHEMES[kv], ops, 1, free, READ)


def tokens(count: int) -> str:
    return "-" if count < 1024 else "> 1M" if count >= POSITIONS else f"{count // 1024:,}K"


def weights_fit() -> str:
    """Of each card: 4-bit weights with a BF16 and an int2 cache, BF16 weights with an int2 cache."""
    rows = []
    for preset, name in MODELS.items():
        sizes = (OnPaper(CARD).weight_bytes(quantized.config_with(presets.config_of(preset), w)) for w in ("awq", None))
        cells = (" / ".join(tokens(longest(preset, weights, kv, gib)) for weights, kv in CASES) for gib in CARDS)
        rows.append([name, " / ".join(f"{size / 1e9:.1f}" for size in sizes), *cells])
    lines = markdown(["model", "GB in 4 bits / in BF16", *(f"{gib} GiB" for gib in CARDS)], rows)
    lines += [
        "",
        "The longest conversation, in K = 1,024 tokens: weights of 4 bits with a `bf16` cache / with an `int2` cache / "
        "BF16 weights with an `int2` cache. A model's own positions end earlier than some of these. 4 bits: an AWQ "
        "file in groups of 128 whose head `--weights int8` quantizes (a tied one stays in BF16). Of a card's memory "
        f"0.9 GiB are left for CUDA and a desktop, and {READ:,} tokens are read at a time: a long prompt in one piece "
        "takes more (`info`).",
    ]
    return "\n".join(lines)


def cards_fit() -> str:
    """The same of several cards."""
    rows = []
    for preset, name in LARGE.items():
        configs = [quantized.config_with(presets.config_of(preset), weights) for weights in ("awq", None)]
        sizes = (OnSeveral(2, config).weight_bytes(config) / 2e9 for config in configs)
        fits = [[longest(preset, *case, gib, cards) for case in CASES] for cards, gib in SEVERAL]
        rows.append([name, " / ".join(f"{n:.1f}" for n in sizes), *(" / ".join(map(tokens, each)) for each in fits)])
    columns = ["model", "GB on each of 2 in 4 bits / in BF16", *(f"{cards} x {gib} GiB" for cards, gib in SEVERAL)]
    return "\n".join(markdown(columns, rows))


def weights_cost() -> str:
    """eval --weights of SmolLM2-135M."""
    report = load("eval-weights-smollm2-135m")
    rows = []
    for row in report["results"]:
        kl = "0" if row["kl"] == 0 else f"{row['kl']:.4f} ± {row['kl_se']:.4f}"
        weights = "BF16" if row["weights"] is None else f"`{row['weights']}`"
        rows.append([weights, f"`{row['kv']}`", kl, f"{row['dnll']:+.4f}", f"{row['top1']:.1%}"])
    lines = markdown(["`--weights`", "`--kv`", "KL to BF16", "ΔNLL", "same top token"], rows)
    where = f"({report['device']}); mean and standard error of {report['windows']} windows of the default text"
    lines += ["", f"SmolLM2-135M, {report['prefill']} tokens prefilled, then {report['decode']} decoded {where}."]
    return "\n".join(lines)


TABLES = {"weights_fit": weights_fit, "cards_fit": cards_fit, "weights_cost": weights_cost}
