"""docs/results/pareto.svg: bits per element against KL for every family of schemes, on both models, from the committed
eval results."""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from tools.committed import RESULTS
from tools.plot import figure, save, styled

MODELS = {"eval-smollm2-135m": "SmolLM2-135M", "eval-smollm2-135m-key-biases": "the same with large key biases"}
FAMILIES = {
    "KIVI and its steps": ("#8c8c8c", "o", ("kivi", "rotation", "scaling")),
    "QuaRot-style": ("#c9a227", "s", ("quarot",)),
    "OTT": ("#cc79a7", "D", ("ott",)),
    "TurboQuant-style": ("#56b4e9", "^", ("turboquant",)),
    "KVarN": ("#1b7837", "^", ("kvarn-2", "kvarn-k4v2")),
    "OSCAR (Together), calibrated": ("#6a51a3", "D", ("oscar-cov",)),
    "llama.cpp, rotated": ("#b2182b", "s", ("q4_0",)),
    "OScaR, the paper": ("#0072b2", "o", ("oscar", "int4")),
    "minioscar": ("#d55e00", "o", ("int2", "int2-compact", "int2-long", "k3v2", "k3v3", "k4v2", "k4v4")),
}
LABELLED_BELOW = ("oscar", "ott", "rotation", "kvarn-2")
LABELLED_LEFT = "int2-compact", "turboquant", "quarot", "kivi", "rotation", "kvarn-2", "oscar-cov"


def points() -> dict[str, dict[str, list[float]]]:
    """Model -> scheme -> bits per element, KL, its standard error, as they are drawn."""
    found = {}
    for file, title in MODELS.items():
        rows = json.loads((RESULTS / f"{file}.json").read_text())["results"]
        found[title] = {
            row["kv"]: [round(row[key], 4) for key in ("bits_per_element", "kl", "kl_se")] for row in rows if row["kl"]
        }
    return found


def front(rows: dict[str, list[float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both bits and KL, by bits."""
    best = []
    for bits, kl, _ in sorted(rows.values()):
        if not best or kl < best[-1][1]:
            best.append((bits, kl))
    return best


@styled
def drawn() -> Figure:
    found = figure(1250, 560, "Bits per element against KL, by family of schemes")
    for axes, (title, rows) in zip(found.subplots(1, 2), points().items(), strict=True):
        axes.step(*zip(*front(rows), strict=True), where="post", color="#bbbbbb", lw=1.2, zorder=1)
        for family, (color, marker, names) in FAMILIES.items():
            names = [name for name in names if name in rows]  # what was measured on this model
            if not names:
                continue
            bits, kl, error = zip(*(rows[name] for name in names), strict=True)
            axes.errorbar(bits, kl, error, fmt=marker, color=color, ms=8, capsize=3, label=family)
            for name in names:
                left, x = (True, -9) if name in LABELLED_LEFT else (False, 9)
                place = {"xytext": (x, -13 if name in LABELLED_BELOW else 4), "textcoords": "offset points"}
                axes.annotate(name, rows[name][:2], **place, ha="right" if left else "left", fontsize=10.5, color=color)
        axes.set(title=title, xlabel="bits per element", yscale="log", xlim=(0.9, 5.6))
        axes.title.set_size(12)
        axes.grid(color="#eeeeee", which="both")
        axes.yaxis.set_major_formatter("{x:g}")
    found.axes[0].set_ylabel("KL to the unquantized run (nats per token)")
    found.axes[0].legend(loc="lower left", fontsize=11)
    return found


if __name__ == "__main__":
    save(drawn(), RESULTS / "pareto.svg")
