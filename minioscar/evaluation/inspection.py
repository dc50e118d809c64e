"""What quantization meets in a model and what it does to it: norms, spreads, sinks and errors, layer by layer
(`inspect`).

The four forms of keys that the figures compare are the steps of the method: raw; scaled (divided by the token's norm
over all kv heads, without rotation); rotated; rotated and scaled, which is what `oscar` quantizes. OScaR (arXiv
2605.19660) calls the spread of these norms Token Norm Imbalance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import oscar
from ..arguments import scheme_named
from ..attention_inputs import AttentionInputs, record_attention_inputs
from ..cache import BF16, Cache, NewTokens
from ..config import Config
from ..errors import UserError
from ..hadamard import hadamard
from ..key_shaping import Shaping, key_statistics, shaping
from ..ops import backend
from ..ops.reference import Reference
from ..oscar import SCHEMES, WINDOW, Scheme
from ..pages import check_scheme
from ..storage.hub import resolve
from ..tokenizer import Tokenizer
from ..weights import load as load_weights
from . import modalities
from .contrasts import BIN, by_window, feedback_effect
from .fidelity import default_text

STEPS = ("raw", "scaled", "rotated", "rotated and scaled")
QUANTILES = (0, 0.05, 0.5, 0.95, 1)
ASKING = 128  # queries at the end, whose attention is computed with every scheme
# of a layer's attention, by mean over heads and queries far behind: a token that gets more is a sink there
SINK_SHARE = 0.05
OVER_LAYERS = "of_tokens", "picture", "windows", "feedback"  # reported for all layers at once
SPREADS = 12  # bins of the norm spread, from 1 to the largest, evenly in its logarithm
PLAIN = Shaping(None, None)  # of a scheme that is neither shaped nor pair-scaled


def inspect(
    model: str, schemes: Sequence[str], *, text: str | None = None, tokens: int = 1024, device: str = "auto",
    progress: bool = False, media: Sequence[Mapping[str, Any]] = (),
) -> dict:
    """The object of `inspect --json`: one unquantized run over the first `tokens` tokens of a text, or of a message of
    media and the text, seen from every layer. media: parts of a message.

    Raises UserError for an unknown scheme, a number of tokens that is no multiple of WINDOW, or a text or model too
    short for it.
    """
    from tqdm import tqdm

    wanted = [scheme_named(name) for name in dict.fromkeys(schemes)]
    if tokens < 2 * WINDOW or tokens % WINDOW:
        raise UserError(f"--tokens {tokens} is out of range; use a multiple of {WINDOW}, at least {2 * WINDOW}")
    ops, folder = backend(device), resolve(model)
    config, tokenizer = Config.from_folder(folder), Tokenizer(folder)
    for scheme in wanted:
        check_scheme(config, scheme)
    check_scheme(config, SCHEMES["oscar"])  # its rotation is one of the four forms
    if tokens > config.max_context:
        raise UserError(f"--tokens {tokens} is out of range; {config.limit}")
    ids, shown = modalities.prompt_of(config, tokenizer, media, default_text() if text is None else text, tokens)
    kinds = modalities.kinds_of(ids, shown)
    weights = load_weights(folder, config, ops, progress)
    shaped = [scheme for scheme in wanted if scheme.shaped or scheme.pair_scaled]
    statistics = key_statistics(weights, config, ops) if shaped else None
    shapings = {scheme.name: shaping(statistics, scheme, config) for scheme in shaped}
    calibrated = {kv.name: kv.prepare(weights, config, ops).layers for kv in wanted if kv.calibrated}
    layers: list[dict] = []

    def record(inputs: AttentionInputs) -> None:
        i = len(layers)
        rotations = {kv: ops.numpy(of[i].rotations) for kv, of in calibrated.items()}
        of_layer = {kv: found.of_layer(i) for kv, found in shapings.items()}
        layers.append(look(inputs, config, wanted, of_layer, rotations) | by_kind(inputs.k, kinds))
        bar.update()

    with tqdm(
        total=config.num_layers, desc="inspect", unit="layer", leave=False, disable=None if progress else True
    ) as bar:
        record_attention_inputs(weights, config, ops, np.array(ids), record, media=shown)
    return {
        "model": str(model), "device": ops.name, "tokens": tokens, "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "group": SCHEMES["oscar"].group, "schemes": [scheme.name for scheme in wanted],
        "quantiles": QUANTILES, "runs": modalities.runs_of(kinds),
        "sinks": sinks(layers, modalities.texts_of(ids, kinds, tokenizer)),
        "imbalance": imbalance(layers),
        "errors_by_token": by_token(layers),
        "example": example(layers),
        "windows": {"bin": BIN, "errors": mean_of([layer["windows"] for layer in layers])},
        "feedback": mean_of([layer["feedback"] for layer in layers]),
        "layers": [{name: value for name, value in layer.items() if name not in OVER_LAYERS} for layer in layers],
    }


# --- one layer


def look(
    inputs: AttentionInputs, config: Config, schemes: Sequence[Scheme], shapings: Mapping[str, Shaping],
    rotations: Mapping[str, np.ndarray],
) -> dict:
    """Everything about one layer, rounded numbers only. Keys and values count as BF16 keeps them.

    shapings: this layer's of shaped and pair-scaled schemes. rotations: of calibrated ones, [2, kv_heads, d, d].
    """
    k, v = (x.astype(BF16).astype(np.float32).swapaxes(0, 1) for x in (inputs.k, inputs.v))  # [kv_heads, tokens, d]
    # [kv_heads, q_per_kv, tokens, d]
    q = inputs.q.reshape(len(inputs.q), config.num_kv_heads, -1, config.head_dim).transpose(1, 2, 0, 3)
    norms = oscar.token_norms(k.swapaxes(0, 1))
    keys = dict(zip(STEPS, (k, k / norms[:, None], oscar.rotate(k), oscar.rotate(k) / norms[:, None]), strict=True))
    group = SCHEMES["oscar"].group
    ranges = {step: x.reshape(len(x), -1, group, x.shape[-1]) for step, x in keys.items()}
    ranges = {step: x.max(axis=2) - x.min(axis=2) for step, x in ranges.items()}  # [kv_heads, groups, d]
    rms = {step: np.sqrt((x * x).mean()) for step, x in keys.items()}
    exact, attention = attend(q[:, :, -ASKING:], k, v), received(q, k)
    low = int(norms[:group].argmin())
    stretches = {step: stretch(x[:, :group], low) for step, x in keys.items()}
    head = int(stretches["scaled"].max(axis=1).argmax())

    def read_back(scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
        return through_cache(k, v, scheme, config, shapings.get(scheme.name, PLAIN), rotations.get(scheme.name))

    back = {scheme.name: read_back(scheme) for scheme in schemes}
    of_keys, of_values = ({name: relative(x[i], (k, v)[i], (0, 2)) for name, x in back.items()} for i in range(2))
    errors = {}
    for name, (back_k, back_v) in back.items():
        output = np.linalg.norm(attend(q[:, :, -ASKING:], back_k, back_v) - exact) / np.linalg.norm(exact)
        heads = (rounded(relative(x, y, (1, 2))) for x, y in ((back_k, k), (back_v, v)))
        errors[name] = {**dict(zip(("keys", "values"), heads, strict=True)), "attention": rounded(output)}
    packed, shaped = ([kv for kv in schemes if kv.quantized], [kv for kv in schemes if kv.shaped])
    windows = {kv.name: by_window(inputs.q[-WINDOW:], (k, v), back[kv.name], kv) for kv in packed}
    effects = {kv.name: feedback_effect(q[:, :, -ASKING:], k, kv, read_back) for kv in shaped}
    return {
        "norms": {
            "q": {"raw": quantiles(q), "rotated": quantiles(oscar.rotate(q))},
            "k": {step: quantiles(x[:, None]) for step, x in keys.items()},
            "v": {"raw": quantiles(v[:, None]), "rotated": quantiles(oscar.rotate(v)[:, None])},
        },
        "token_norms": rounded(norms),
        # a number a group
        "norm_spread": rounded(norms.reshape(-1, group).max(axis=1) / norms.reshape(-1, group).min(axis=1)),
        "range": {step: rounded(x.mean(axis=(1, 2)) / rms[step]) for step, x in ranges.items()},  # a number a kv head
        # a number a channel, largest first
        "stretch": {step: rounded(np.sort(x, axis=None)[::-1]) for step, x in stretches.items()},
        "attention": rounded(attention),
        "errors": errors,  # keys and values: a number a kv head
        "windows": windows, "feedback": effects,
        "of_tokens": {"spread": norms.reshape(-1, group).max(axis=1).repeat(group) / norms, "bound": bound(
            norms, ranges["rotated"]
        ),
                      "keys": of_keys, "values": of_values},
        "picture": {
            "head": head, "token": low, "keys": {step: abs(x[head, :group]) / rms[step] for step, x in keys.items()}
        },
    }


def by_kind(k: np.ndarray, kinds: Sequence[str]) -> dict:
    """`modalities.of_layer` of keys [tokens, kv_heads, d] as BF16 keeps them."""
    found = modalities.of_layer(k.astype(BF16).astype(np.float32).swapaxes(0, 1), kinds, SCHEMES["oscar"].group)
    return {"kinds": {kind: {name: rounded(x) for name, x in of.items()} for kind, of in found.items()}}


def relative(back: np.ndarray, x: np.ndarray, axis: tuple[int, int]) -> np.ndarray:
    return np.linalg.norm(back - x, axis=axis) / np.linalg.norm(x, axis=axis)


def through_cache(
    k: np.ndarray, v: np.ndarray, scheme: Scheme, config: Config, shaped: Shaping, rotations: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What attention reads back of one layer's keys and values, [kv_heads, tokens, d], after they went through a
    cache and all were packed."""
    ops, one, scheme = Reference(), replace(config, num_layers=1), replace(scheme, keep=0)
    if rotations is None:
        d = config.head_dim
        rotations = np.stack([hadamard(d) if scheme.rotate else np.eye(d, dtype=np.float32)] * 2)
    cache = Cache(one, scheme, 1, k.shape[1], ops)
    scales = np.float32(1) if shaped.scales is None else shaped.scales.astype(np.float32)[:, None]
    k = k * scales
    rotated = ((x @ rotation).swapaxes(0, 1) for x, rotation in zip((k, v), rotations, strict=True))
    new = NewTokens(*rotated, oscar.token_norms(k.swapaxes(0, 1)) if scheme.scale else None, shaped.feedback)
    cache.layers[0].append(new, cache.batch_for([0], [k.shape[1]]))
    back_k, back_v = cache.layers[0].past(0, *[k.shape[1]] * 2)
    return back_k @ rotations[0].swapaxes(-1, -2) / scales, back_v @ rotations[1].swapaxes(-1, -2)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of the last queries, [kv_heads, q_per_kv, n, d], over all keys up to each."""
    p = probabilities(q, k)
    return p @ v[:, None]


def probabilities(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    scores = q @ k[:, None].swapaxes(-1, -2) / np.float32(math.sqrt(k.shape[-1]))  # [kv_heads, q_per_kv, n, tokens]
    n, tokens = scores.shape[-2:]
    scores += np.triu(np.full((n, tokens), -np.inf, np.float32), 1 + tokens - n)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def received(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Share of attention that each token gets from queries at least WINDOW tokens behind it, mean over heads; 0 where
    there are none."""
    p = np.mean(
        [probabilities(q[i : i + 1], k[i : i + 1]).mean(axis=(0, 1)) for i in range(len(k))], axis=0, dtype=np.float64
    )
    return np.tril(p, -WINDOW).sum(axis=0) / np.maximum(np.arange(len(p))[::-1] + 1 - WINDOW, 1)


def stretch(group: np.ndarray, token: int) -> np.ndarray:
    """Range of every channel of one group of keys, [kv_heads, tokens, d], over its range without one token; [kv_heads,
    d]."""
    others = np.delete(group, token, axis=1)
    return np.ptp(group, axis=1) / np.ptp(others, axis=1)


def bound(norms: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """The largest relative error that a token of rotated, unscaled keys can have; [tokens].

    A code is at most half a step off, and a step is a third of the range of its channel in its group; so
    ||error of t|| / n_t <= sqrt(sum over channels of range^2) / (2 * 3 * n_t). Ranges grow with the largest norm of
    the group, hence the bound with max n / n_t: Token Norm Imbalance. norms [tokens], ranges [kv_heads, groups, d].
    """
    return np.sqrt((ranges * ranges).sum(axis=(0, 2))).repeat(len(norms) // ranges.shape[1]) / (2 * 3 * norms)


# --- all layers


def imbalance(layers: Sequence[dict]) -> dict:
    """Mean bound and key errors of all tokens of all layers, in bins of the norm spread of their groups (empty bins are
    left out)."""
    tokens = [layer["of_tokens"] for layer in layers]
    spread, limit = (np.concatenate([layer[name] for layer in tokens]) for name in ("spread", "bound"))
    bins = np.minimum(np.log(spread) / max(np.log(spread.max()), 1e-9) * SPREADS, SPREADS - 1).astype(int)
    used = [b for b in range(SPREADS) if (bins == b).any()]

    def means(values: np.ndarray) -> list:
        return rounded(np.array([values[bins == b].mean() for b in used]))

    errors = {name: means(np.concatenate([layer["keys"][name] for layer in tokens])) for name in tokens[0]["keys"]}
    return {
        "spread": rounded(np.exp(means(np.log(spread)))), "tokens": [int((bins == b).sum()) for b in used],
        "bound": means(limit),
        "errors": errors,
    }


def mean_of(layers: Sequence) -> Any:
    """Of numbers, or of lists and objects of them that are alike in all layers."""
    if isinstance(layers[0], Mapping):
        return {name: mean_of([layer[name] for layer in layers]) for name in layers[0]}
    return rounded(np.mean(layers, axis=0))


def by_token(layers: Sequence[dict]) -> dict:
    """Relative error of every token, mean over the layers: scheme -> keys, values, each [tokens]."""
    tokens = [layer["of_tokens"] for layer in layers]
    return {
        name: {kind: rounded(np.mean([layer[kind][name] for layer in tokens], axis=0)) for kind in ("keys", "values")}
        for name in tokens[0]["keys"]
    }


def example(layers: Sequence[dict]) -> dict:
    """The first group of keys where the artifact of scaling alone is largest: |key| / rms, [tokens, d] for each form,
    of one kv head."""
    index = int(np.argmax([layer["stretch"]["scaled"][0] for layer in layers]))
    picture = layers[index]["picture"]
    keys = {step: rounded(x) for step, x in picture["keys"].items()}
    return {"layer": index, "kv_head": picture["head"], "low_norm_token": picture["token"], "keys": keys}


def sinks(layers: Sequence[dict], texts: Sequence[str]) -> list[dict]:
    """Tokens that get more than SINK_SHARE of the attention of some layer, those of most layers first. texts: of all
    tokens."""
    # [layers, tokens]
    shares, norms = (np.array([layer[name] for layer in layers]) for name in ("attention", "token_norms"))
    counts = (shares > SINK_SHARE).sum(axis=0)
    found = [
        {
            "position": int(t), "text": texts[t], "layers": int(counts[t]),
            "attention": rounded(shares[:, t].mean()),
            "norm_to_median": rounded((norms[:, t] / np.median(norms, axis=1)).mean()),
        }
        for t in np.flatnonzero(counts)
    ]
    return sorted(found, key=lambda sink: (-sink["layers"], sink["position"]))


def quantiles(x: np.ndarray) -> list:
    """Of the norms of vectors [kv_heads, any, tokens, d]: QUANTILES for each kv head."""
    norms = np.linalg.norm(x, axis=-1).reshape(len(x), -1)
    return rounded(np.quantile(norms, QUANTILES, axis=1).T)


def rounded(x: np.ndarray | float) -> list | float:
    """Four significant digits, as JSON takes them."""
    return [rounded(part) for part in x] if np.ndim(x) else float(f"{x:.4g}")
