"""The figures of `inspect`, and what each says to a student."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .inspection import SINK_SHARE, STEPS
from .modalities import MEETING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "kivi": "#8c8c8c", "quarot": "#c9a227", "rotation": "#56b4e9", "scaling": "#e69f00", "oscar": "#0072b2",
    "int2": "#d55e00", "ott": "#a6761d", "turboquant": "#7570b3", "kvarn-2": "#1b7837", "kvarn-k4v2": "#7fbf7b",
    "oscar-cov": "#6a51a3", "q4_0": "#b2182b",
    "int2-compact": "#cc79a7", "int2-long": "#66c2a5", "int4": "#333333",
    "k3v2": "#67000d", "k3v3": "#cb181d", "k4v2": "#a50f15", "k4v4": "#fb6a4a",
}
KIND_COLORS = {"text": "#333333", "image": "#0072b2", "video": "#009e73", "audio": "#d55e00", MEETING: "#cc79a7"}
STEP_COLORS = dict(zip(STEPS, ("#8c8c8c", "#e69f00", "#56b4e9", "#0072b2"), strict=True))
STYLE = {
    "font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e5e5", "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 2, "svg.hashsalt": "minioscar", "svg.fonttype": "path", "figure.constrained_layout.use": True,
}


def drawn(draw: Callable[[Figure, dict], None], report: dict) -> Figure:
    """One of FIGURES. To be saved within the same style: `matplotlib.rc_context(STYLE)`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        fig = Figure(figsize=(11, 4.6))
        draw(fig, report)
    return fig


def sinks(fig: Figure, report: dict) -> None:
    """Attention sinks have small keys

    Left: a row is a layer, a column one of the first tokens, red is a key much shorter than the others of its layer
    (the norm is over all kv heads). Right: every token of the text. The few tokens that nearly every query looks at,
    the attention sinks, are usually those with the shortest keys: the opposite of an outlier one would look for. A
    token is listed as a sink of a layer if it gets more than {share} of the attention of queries at least 128 tokens
    behind it."""
    norms, shares = (np.array([layer[name] for layer in report["layers"]]) for name in ("token_norms", "attention"))
    left, right = fig.subplots(1, 2, width_ratios=(1.25, 1))
    shown = np.arange(min(64, norms.shape[1]))
    image = left.imshow(
        (norms / np.median(norms, axis=1, keepdims=True))[:, shown], aspect="auto", cmap="RdBu", vmin=0, vmax=2,
        interpolation="nearest"
    )
    left.grid(False)
    left.set(title="Norm of each key / median of its layer", xlabel="token", ylabel="layer")
    fig.colorbar(image, ax=left, ticks=(0, 0.5, 1, 1.5, 2), pad=0.01)
    mean = shares.mean(axis=0)
    right.scatter(
        (norms / np.median(norms, axis=1, keepdims=True)).mean(axis=0), mean.clip(1e-6), s=14, color="#0072b2",
        alpha=0.5, lw=0
    )
    for i, sink in enumerate(report["sinks"][:3]):
        text = f"token {sink['position']}: {sink['text'].strip() or sink['text']!r}"
        place = {"xytext": (8, 4 - 12 * i), "textcoords": "offset points", "fontsize": 11}
        right.annotate(text, (sink["norm_to_median"], mean[sink["position"]]), **place)
    right.set_yscale("log")
    right.set(
        title="Low norm, much attention", xlabel="norm of the key / median, mean over layers",
        ylabel="share of attention received"
    )
    right.set_ylim(bottom=max(np.quantile(mean[mean > 0], 0.01) / 2, 1e-6))


def norms(fig: Figure, report: dict) -> None:
    """How long queries, keys and values are

    Median norm per layer and kv head (line), 5 to 95 % of the tokens (band), and the shortest of all (dotted). Rotation
    by an orthogonal matrix does not change any of these norms; dividing a key by its norm over all kv heads (omni-token
    scaling) makes all tokens of a layer equally long, and the norm is kept aside as one number per token and layer."""
    x = np.arange(len(report["layers"]))
    for axes, name in zip(fig.subplots(1, 3), "qkv", strict=True):
        q = np.array([layer["norms"][name]["raw"] for layer in report["layers"]])  # [layers, kv_heads, quantiles]
        for head in range(q.shape[1]):
            color = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")[head % 4]
            axes.fill_between(x, q[:, head, 1], q[:, head, 3], color=color, alpha=0.15, lw=0)
            axes.plot(x, q[:, head, 2], color=color, label=f"kv head {head}" if head < 4 else None)
            axes.plot(x, q[:, head, 0], color=color, lw=1, ls=":")
        axes.set(title={"q": "Queries", "k": "Keys", "v": "Values"}[name], xlabel="layer")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    fig.axes[0].set_ylabel("norm per head")
    fig.axes[1].legend(loc="lower right", fontsize=10)


def forms(fig: Figure, report: dict) -> None:
    """Why rotate before scaling: the four forms of the same keys

    The first keys of one head, where the effect is largest: rows are tokens, columns are channels, dark is large. Raw
    keys have outlier channels, and a first token that is nearly empty. Scaling alone blows that token up to the norm of
    the others, and with it whatever channels its little energy sits in: new outliers. Rotation spreads the energy of
    each token evenly over all channels first, so that scaling afterwards only equalizes rows."""
    example = report["example"]
    for axes, step in zip(fig.subplots(1, 4, sharey=True), STEPS, strict=True):
        image = axes.imshow(
            np.array(example["keys"][step])[:16], aspect="auto", cmap="magma_r", vmin=0, vmax=4, interpolation="nearest"
        )
        axes.grid(False)
        axes.set(title=step.capitalize(), xlabel="channel")
    fig.axes[0].set_ylabel(f"token (layer {example['layer']}, kv head {example['kv_head']})")
    fig.colorbar(image, ax=fig.axes[:4], pad=0.01, label="|key| / rms", extend="max")


def artifact(fig: Figure, report: dict) -> None:
    """The Scaling-Induced Outlier Artifact, measured

    For the token of lowest norm in the first group: how much wider it makes the range of each channel than the other
    tokens alone would (1 means it fits in). Without rotation, dividing by the norm makes it worse, not better: a few
    channels get several times their range, and every other token of the group pays for it with coarser steps."""
    left, right = fig.subplots(1, 2)
    x = np.arange(len(report["layers"]))
    for step in STEPS:
        values = np.array([layer["stretch"][step] for layer in report["layers"]])  # [layers, channels], largest first
        left.plot(x, values[:, 0], color=STEP_COLORS[step], label=step)
        share = np.arange(1, values.shape[1] + 1) / values.shape[1]
        right.plot(share, values.mean(axis=0), color=STEP_COLORS[step], label=step)
    left.set(title="The channel it stretches most", xlabel="layer", ylabel="range with it / range without it")
    right.set(
        title="All channels, mean over layers", xlabel="share of channels stretched at least so far", xscale="log"
    )
    right.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}" if x >= 0.01 else f"{x:.1%}")
    for axes in (left, right):
        axes.set_ylim(bottom=1)
    right.legend()


def spread(fig: Figure, report: dict) -> None:
    """Token Norm Imbalance

    Left: keys are quantized in groups of consecutive tokens that share a step in every channel. The longer the longest
    key of a group is compared with the shortest, the coarser the step is for the shortest. Right: the range of a
    channel inside a group (largest minus smallest), which the four levels must cover, for the four forms of keys: as
    they are, divided by their norms, rotated, and both. Rotation makes the average channel a little wider; what it
    takes away are the extremes."""
    left, right = fig.subplots(1, 2)
    spreads = [layer["norm_spread"] for layer in report["layers"]]
    x = np.arange(len(spreads))
    middle, low, high = (np.quantile(spreads, q, axis=1) for q in (0.5, 0, 1))
    left.fill_between(x, low, high, color="#0072b2", alpha=0.15, lw=0, label="all groups")
    left.plot(x, middle, color="#0072b2", label="median group")
    left.plot(x, [s[0] for s in spreads], color="#d55e00", label="the first group")
    left.set(title="Largest norm / smallest norm in a group", xlabel="layer")
    left.set_ylim(bottom=1)
    left.legend()
    for step in STEPS:
        right.plot(
            x, [np.mean(layer["range"][step]) for layer in report["layers"]], color=STEP_COLORS[step], label=step
        )
    right.set(title="Mean range of a channel, in rms of the keys", xlabel="layer")
    right.legend()


def kinds(fig: Figure, report: dict) -> None:
    """Token Norm Imbalance by what tokens are of

    Left: the norm of every key, over all kv heads, in the layer where it differs most inside groups. Right: the largest
    norm of a group over the smallest, median over the groups of text, of pictures, videos and sounds, and over those
    where kinds meet; dotted: the same in a single kv head once its keys are divided by the norms over all heads, which
    is what a norm for each head would take away. In text a few sinks are short; the paper's figures of Qwen3-VL show
    visual tokens of many times the usual norm, and other levels beside text."""
    left, right = fig.subplots(1, 2, width_ratios=(1.6, 1))
    layers = [layer["kinds"] for layer in report["layers"]]
    seen = [kind for kind in KIND_COLORS if any("spread" in of.get(kind, ()) for of in layers)]
    visual = [kind for kind in seen if kind != "text"] or seen
    index = int(np.argmax([max(of[kind]["spread"][1] for kind in visual) for of in layers]))
    norms, x = np.array(report["layers"][index]["token_norms"]), np.arange(len(layers))
    for kind in dict.fromkeys(run["kind"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["kind"] == kind]
        here = np.concatenate([np.arange(run["first"], run["first"] + run["count"]) for run in runs])
        left.plot(here, norms[here], ".", ms=4, color=KIND_COLORS[kind], label=kind)
    for kind in seen:
        for name, style in (("spread", "-"), ("left", ":")):
            right.plot(x, [of[kind][name][1] for of in layers], style, color=KIND_COLORS[kind],
                       label=kind if name == "spread" else None)  # fmt: skip
    left.set(title=f"Norm of every key, layer {index}", xlabel="token")
    right.set(title="Spread of a group", xlabel="layer", ylabel="largest norm / smallest (dotted: in a head)")
    for axes, low in ((left, norms.min()), (right, 1)):
        if axes.get_ylim()[1] > 10 * low:
            axes.set_yscale("log")
    left.legend(fontsize=10, markerscale=2)
    right.legend(fontsize=10)


def bound(fig: Figure, report: dict) -> None:
    """The error grows with the imbalance, as it must

    A code is at most half a step off, and a step is a third of the range of its channel. So without scaling the error
    of a key, relative to its norm, is at most the dashed line, which rises with the largest norm of the group over the
    token's own. The measured error of <i>rotation</i> and <i>kivi</i> follows it; dividing by the norm before
    quantizing (<i>scaling</i>, <i>oscar</i>) makes it flat. The few tokens at the right are the sinks, which matter
    most; <i>int2</i> keeps the first tokens in BF16 besides."""
    data, shown = report["imbalance"], [
        name for name in ("kivi", "rotation", "scaling", "oscar", "int2") if name in report["schemes"]
    ]
    left, right = fig.subplots(1, 2, width_ratios=(1.6, 1))
    left.plot(data["spread"], data["bound"], color="black", ls="--", label="bound without scaling")
    for name in shown:
        left.plot(data["spread"], data["errors"][name], "o-", color=COLORS[name], label=name, ms=5)
    left.set(title="Error of a token's key, by how much its group outweighs it", ylabel="error / norm of the key",
             xlabel="largest norm of the group / norm of the token",
             xscale="log" if data["spread"][-1] > 10 else "linear")
    left.set_ylim(0, 1.05 * max(data["bound"]))
    left.legend(loc="upper left")
    right.bar(range(len(data["tokens"])), data["tokens"], color="#bbbbbb")
    right.set_xticks(range(len(data["tokens"])), [f"{s:.3g}" for s in data["spread"]], rotation=45)
    right.set(title="Tokens at each spread", xlabel="largest norm / norm of the token", yscale="log")


def along(fig: Figure, report: dict) -> None:
    """Who pays

    The error of keys along the text, as attention reads them from the cache. Without scaling the first tokens, the
    sinks, pay for the longer keys of their group. Schemes that keep the first tokens in BF16 have no error there."""
    left, right = fig.subplots(1, 2)
    first = report["group"]
    for name in report["schemes"]:
        keys, color = np.array(report["errors_by_token"][name]["keys"]), COLORS.get(name)
        left.plot(np.arange(first), keys[:first], color=color, label=name)
        right.plot(np.arange(len(keys) // first) * first, keys.reshape(-1, first).mean(axis=1), color=color, label=name)
    left.set(
        title="The first group, token by token", xlabel="token", ylabel="error / norm of the key, mean over layers"
    )
    right.set(title="All groups", xlabel="token")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    left.legend(fontsize=11)


def errors(fig: Figure, report: dict) -> None:
    """What is left of it in the output

    Relative error of keys, of values, and of what attention makes of both for the last queries, by layer. A smaller
    error of keys is not always a smaller error of the output: a shaped scheme makes larger errors than its plain twin,
    in directions that queries do not look."""
    x = np.arange(len(report["layers"]))
    for axes, kind in zip(fig.subplots(1, 3), ("keys", "values", "attention"), strict=True):
        for name in report["schemes"]:
            values = [np.mean(layer["errors"][name][kind]) for layer in report["layers"]]
            axes.plot(x, values, color=COLORS.get(name), label=name)
        axes.set(title={"keys": "Keys", "values": "Values", "attention": "Output of attention"}[kind], xlabel="layer")
        axes.set_ylim(bottom=0)
    fig.axes[0].set_ylabel("relative error")
    fig.axes[2].legend(fontsize=10)


def windows(fig: Figure, report: dict) -> None:
    """What the window is worth

    Left: the error of what attention returns to the last 128 queries, by how long ago the number of tokens was a
    multiple of 128. Where all 128 tokens of the window are packed at once (128/0), the next queries read even their
    nearest neighbours from codes, and the error is largest just then; where the oldest 64 or 32 are packed and the
    others stay (64/64, 32/96), it is nearly even. The codes are the same. Right: the mean of that, for every scheme;
    its own window is one of them."""
    left, right = fig.subplots(1, 2)
    found, width = report["windows"]["errors"], report["windows"]["bin"]
    name = next((name for name in reversed(found) if len(found[name]) > 1), next(iter(found), None))
    for window, values in found.get(name, {}).items():
        left.plot((np.arange(len(values)) + 0.5) * width, values, "o-", ms=5, label=window)
    left.set(title=f"{name}: output of attention", xlabel="tokens since a multiple of 128", ylabel="relative error")
    left.legend(title="flush/keep", fontsize=10)
    kinds = list(dict.fromkeys(window for by_window in found.values() for window in by_window))
    for i, window in enumerate(kinds):
        x = [j + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for j, name in enumerate(found) if window in found[name]]
        heights = [np.mean(by_window[window]) for by_window in found.values() if window in by_window]
        right.bar(x, heights, 0.8 / len(kinds), label=window)
    right.set_xticks(range(len(found)), found, rotation=30, ha="right")
    right.set(title="Mean over a cycle")
    for axes in (left, right):
        axes.set_ylim(bottom=0)


def feedback(fig: Figure, report: dict) -> None:
    """What the feedback is worth

    Left: the error of keys in each RoPE pair, mean over layers and heads, relative to that without feedback over all
    pairs, beside how much queries weigh the pair. Plain rounding makes errors of about the same size in all pairs;
    shaped rounding makes smaller ones where queries look and larger ones where they do not. Right: what is left of it
    in the logits (gray: without feedback)."""
    left, right = fig.subplots(1, 2, width_ratios=(1.6, 1))
    left.set(title="Error of keys by RoPE pair, of the mean", xlabel="pair, the one that queries weigh most first")
    right.set(title="Error of logits, nats")
    for i, (name, found) in enumerate(report["feedback"].items()):
        for kind, style in (("plain", "--"), ("shaped", "-")):
            label = f"{name}, {'with' if kind == 'shaped' else 'without'} feedback"
            left.plot(found[kind]["pairs"], style, color=COLORS.get(name, "black"), label=label)
            color = COLORS.get(name, "black") if kind == "shaped" else "#bbbbbb"
            right.bar([i + (0.2 if kind == "shaped" else -0.2)], [found[kind]["logits"]], 0.4, color=color)
    if not report["feedback"]:
        left.text(0.5, 0.5, "no scheme with shaped rounding in --kv", transform=left.transAxes, ha="center")
        return
    left.plot(found["energy"]["pairs"], color="#999999", lw=1, label="queries' energy")
    left.set_yscale("log")
    left.legend(fontsize=10)
    right.set_xticks(range(len(report["feedback"])), report["feedback"])


def captioned(draw: Callable[[Any, dict], None]) -> tuple[str, str, Callable[[Any, dict], None]]:
    """Title and text of a figure, which its docstring is, and what draws it."""
    title, _, text = draw.__doc__.partition("\n\n")
    return title, " ".join(text.split()).format(share=f"{SINK_SHARE:.0%}"), draw


DRAWN = sinks, norms, spread, kinds, bound, forms, artifact, along, errors, windows, feedback
FIGURES = [captioned(draw) for draw in DRAWN]
