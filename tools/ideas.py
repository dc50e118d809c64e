"""What was tried on the way past `int2`, and what each idea is worth: `python -m tools.ideas MODEL >
docs/results/ideas-NAME.json`.

An idea is a function from a run of whole blocks of keys (or values) to what attention would read back of them; the
rest of the cache path (BF16 window and sinks, flush by flush, teacher-forced decoding) is that of `eval`.
docs/fidelity.md says what came of each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from minioscar import oscar
from minioscar.attention_inputs import observed
from minioscar.cache import BF16, Cache, NewTokens
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.evaluation import fidelity
from minioscar.evaluation.teacher_forcing import followed, log_softmax
from minioscar.key_shaping import shape_keys
from minioscar.layer_cache import PackedCache
from minioscar.model import Model
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES, Scheme
from minioscar.storage import hub
from minioscar.tokenizer import Tokenizer
from minioscar.weights import load, rotate_values
from tools import texts

WINDOWS, PREFILL, DECODE = 4, 1024, 512
Array = np.ndarray
# What ideas are measured beside: a window that is emptied, neither pairs of keys nor values scaled.
PLAIN = Scheme("int2", rotate=True, scale=True, shrink=0.9, symmetric_values=True, sinks=32)
SHAPED = replace(PLAIN, name="int2-shaped", shaped=True)


# --- keys, rotated: float32 [kv_heads, tokens, d] -> the same, as read back


@dataclass
class Keys:
    """One way to keep keys. `bits` per element counts everything but the norms."""

    bits: float
    scheme: Scheme = PLAIN
    shaped: bool = False
    levels: tuple[float, ...] | None = None  # instead of 0, 1, 2, 3
    offset: int = 0  # tokens that share a mean, about which the groups are symmetric, instead of a minimum each
    refit: bool = False  # the norm that fits best after rounding
    params: Callable[[Array, Array], tuple[Array, Array]] | None = None  # what storing step and minimum makes of them
    choices: tuple[
        Keys, ...
    ] = ()  # of these, the one with the smaller squared error is taken in each group of each channel
    rank: int = 0  # of a term, in float16, that is taken off each block of each head before
    exact: int = 0  # tokens of each block and head, those with the largest errors, that stay in BF16
    by_head: bool = False  # a norm for each kv head of a token instead of one for all

    def __call__(self, keys: Array, feedback: Array | None) -> Array:
        blocks = keys.reshape(len(keys), -1, oscar.WINDOW, keys.shape[-1])
        if self.choices:
            group = self.scheme.group
            backs = np.stack(
                [choice(keys, feedback).reshape(len(keys), -1, group, keys.shape[-1]) for choice in self.choices]
            )
            errors = ((backs - keys.reshape(backs.shape[1:])) ** 2).sum(axis=3, keepdims=True)
            return np.take_along_axis(backs, errors.argmin(axis=0)[None], axis=0).reshape(keys.shape)
        if self.rank:
            u, size, v = np.linalg.svd(blocks, full_matrices=False)
            term = f16(u[..., : self.rank] * size[..., None, : self.rank]) @ f16(v[..., : self.rank, :])
            return replace(self, rank=0)((blocks - term).reshape(keys.shape), feedback) + term.reshape(keys.shape)
        if self.exact:
            back = replace(self, exact=0)(keys, feedback).reshape(blocks.shape)
            worst = np.argsort(((back - blocks) ** 2).sum(axis=-1), axis=-1)[..., -self.exact :, None]
            np.put_along_axis(back, worst, np.take_along_axis(blocks, worst, axis=2), axis=2)
            return back.reshape(keys.shape)
        return self.rounded(keys, feedback)

    def rounded(self, keys: Array, feedback: Array | None) -> Array:
        norms = oscar.token_norms(keys.reshape(-1, 1, keys.shape[-1]) if self.by_head else keys.swapaxes(0, 1))
        norms = norms.reshape(-1, keys.shape[1], 1)  # [kv_heads or 1, tokens, 1]
        x, top, group = keys / norms, 2**self.scheme.key_bits - 1, self.scheme.group
        if self.offset:
            mean = np.repeat(f16(x.reshape(len(x), -1, self.offset, x.shape[-1]).mean(axis=2)), self.offset, axis=1)
            step = f16(
                abs(x - mean).reshape(len(x), -1, group, x.shape[-1]).max(axis=2) * self.scheme.shrink / (top / 2)
            )
            low = mean - np.repeat(step, group, axis=1) * top / 2
        else:
            _, step, minimum = oscar.quantize(x, -2, group, self.scheme.key_bits, self.scheme.shrink)
            step, minimum = (
                self.params(step, minimum) if self.params else (step.astype(np.float32), minimum.astype(np.float32))
            )
            low = np.repeat(minimum, group, axis=1)
        step = np.maximum(np.repeat(step, group, axis=1), 1e-7)
        levels = np.arange(top + 1, dtype=np.float32) if self.levels is None else np.array(self.levels, np.float32)
        edges, left, back = (levels[1:] + levels[:-1]) / 2, x.copy(), np.empty_like(x)
        for i in range(x.shape[-1]):
            back[..., i] = (
                levels[np.searchsorted(edges, (left[..., i] - low[..., i]) / step[..., i])] * step[..., i] + low[..., i]
            )
            if self.shaped:
                left[..., i + 1 :] -= (left[..., i] - back[..., i])[..., None] * feedback[:, None, i, i + 1 :]
        if self.refit:
            norms = ((back * keys).sum(axis=(0, 2)) / (back * back).sum(axis=(0, 2)))[:, None]
        return back * norms


def f16(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def eight_bits(step: Array, minimum: Array) -> tuple[Array, Array]:
    """A step in 1/16 octaves, a minimum in quarters of a step, within 32 steps of 0."""
    step = np.exp2(np.round(np.log2(np.maximum(step.astype(np.float32), 1e-6)) * 16) / 16)
    return step, np.clip(np.rint(minimum.astype(np.float32) / step * 4), -127, 127) / 4 * step


# --- values, rotated


@dataclass
class Values:
    bits: float
    scheme: Scheme = PLAIN
    levels: tuple[float, float] | None = None  # inner and outer, in the largest magnitude of the group
    least_squares: bool = False
    carried: float = 0.0  # share of a token's rounding error that is handed to the next token
    # Groups with |v_t - v_(t-1)| <= dithered |v_t| get their whole range and, before rounding, an offset that runs
    # through the eighths of a step from token to token; with inf all groups get the offset, and the shrunk range.
    dithered: float = 0.0

    def __call__(self, values: Array) -> Array:
        group = self.scheme.value_group(values.shape[-1])
        x = values.reshape(*values.shape[:2], -1, group)
        if self.levels:
            inner, outer = self.levels
            peak = f16(abs(x).max(axis=-1, keepdims=True))
            return (np.where(abs(x) > peak * (inner + outer) / 2, outer, inner) * peak * np.sign(x)).reshape(
                values.shape
            )
        if self.least_squares or self.carried:
            step = oscar.quantize_values(values, self.scheme)[1][..., None].astype(np.float32)
            for _ in range(2 * self.least_squares):
                codes = rounded(x, step)
                step = f16((x * codes).sum(axis=-1, keepdims=True) / (codes * codes).sum(axis=-1, keepdims=True))
            error, back = np.zeros_like(x[:, 0]), np.empty_like(x)
            for t in range(x.shape[1]):
                wanted = x[:, t] + self.carried * error
                back[:, t] = rounded(wanted, step[:, t]) * step[:, t]
                error = wanted - back[:, t]
            return back.reshape(values.shape)
        if self.dithered:
            before = np.concatenate([x[:, 1:2], x[:, :-1]], axis=1)  # the first is compared with the second
            distance, size = (((y * y).sum(axis=-1, keepdims=True)) for y in (x - before, x))
            equal = distance <= self.dithered**2 * size
            whole, shrunk = np.float32(1 / 1.5), np.float32(self.scheme.shrink / 1.5)  # as quantize_symmetric has them
            step = f16(abs(x).max(axis=-1, keepdims=True) * np.where(equal & np.isfinite(self.dithered), whole, shrunk))
            offset = np.resize(OFFSETS, x.shape[1])[:, None, None]
            return (rounded(x + step * equal * offset, step) * step).reshape(values.shape)
        return oscar.dequantize_values(*oscar.quantize_values(values, self.scheme), self.scheme)


OFFSETS = np.array([-7, 1, -3, 5, -5, 3, -1, 7], np.float32) / 16  # of a step, token by token


def rounded(x: Array, step: Array) -> Array:
    return np.clip(np.rint(x / np.maximum(step, 1e-7) + 1.5), 0, 3) - 1.5


# --- the cache path of eval, with an idea in it


class Lab(Reference):
    """The reference back end, with a cache that keeps packed blocks as the idea reads them back."""

    def __init__(
        self,
        keys: Keys,
        values: Values,
        correction: float = 0.0,
        centered: bool = False,
        shrinks: tuple[float, ...] = (),
        where_needed: bool = False,
    ):
        """shrinks: of these, a layer keeps the one that loses least of the first keys it packs. where_needed: sinks
        in BF16 only in layers whose first key is shorter than half of the median.
        """
        self.keys, self.values, self.correction, self.centered = keys, values, correction, centered
        self.shrinks, self.where_needed = shrinks, where_needed

    def cache_type(self, config: Config, scheme: Scheme) -> type[PackedCache]:
        return LabCache


class LabCache(PackedCache):
    row_arrays = *PackedCache.row_arrays, "back_keys", "back_values", "variance"

    @classmethod
    def layout(cls, config: Config, scheme: Scheme, batch: int, context: int, blocks: int) -> dict:
        arrays = super().layout(config, scheme, batch, context, blocks)
        shape = batch, config.num_kv_heads, context, config.head_dim
        back = {name: (shape, np.dtype(np.float32)) for name in ("back_keys", "back_values", "variance")}
        return {name: array for name, array in arrays.items() if name.startswith(("window", "sink", "norms"))} | back

    def pack(self, slot, first, keys, values, feedback=None) -> None:
        lab, scheme, layer, tokens = self.ops, self.scheme, self.arrays, slice(first, first + keys.shape[1])
        self.copy_sinks(slot, first, keys, values)
        keys, values = keys.astype(np.float32), values.astype(np.float32)
        if (
            lab.centered
        ):  # a constant taken off every key of a sequence is a constant in its logits: softmax does not see it
            mean = layer.setdefault("mean", keys[:, scheme.sinks :].mean(axis=1, keepdims=True))
            back = lab.keys(keys - mean, feedback) + mean
        elif lab.shrinks:
            backs = {
                shrink: replace(lab.keys, scheme=replace(lab.keys.scheme, shrink=shrink))(keys, feedback)
                for shrink in lab.shrinks
            }
            best = min(backs, key=lambda shrink: float(((backs[shrink] - keys)[:, scheme.sinks :] ** 2).sum()))
            back = backs[layer.setdefault("shrink", best)]
        else:
            back = lab.keys(keys, feedback)
        if lab.where_needed and first == 0:
            norms = oscar.token_norms(keys.swapaxes(0, 1))
            if norms[0] > np.median(norms) / 2:  # the first tokens are like all others
                kept = back[:, : scheme.sinks], lab.values(values)[:, : scheme.sinks]
                layer["sink_keys"][slot], layer["sink_values"][slot] = (x.astype(BF16) for x in kept)
        layer["back_keys"][slot, :, tokens] = back
        layer["back_values"][slot, :, tokens] = lab.values(values)
        if lab.correction:  # the variance of a rounded channel, taken from the errors themselves
            error = (back - keys).reshape(len(keys), -1, lab.keys.scheme.group, keys.shape[-1])
            layer["variance"][slot, :, tokens] = np.repeat((error * error).mean(axis=2), lab.keys.scheme.group, axis=1)
            layer["variance"][slot, :, : scheme.sinks] = 0

    def packed(self, slot, tokens) -> tuple[Array, Array]:
        return self["back_keys"][slot, :, :tokens].copy(), self["back_values"][slot, :, :tokens].copy()

    def attend(self, q, new, batch) -> Array:
        """With a correction, a logit q.k gives way by half its variance, which noise adds to the logarithm of the
        mean of exp."""
        if not self.ops.correction or batch.starts[0] < oscar.WINDOW:
            return super().attend(q, new, batch)
        (slot, start, _), dim = batch.spans()[0], q.shape[-1]
        keys, values = self.past(slot, start, batch.packed[0], room=len(q))
        keys[:, start:], values[:, start:] = new.k.swapaxes(0, 1), new.v.swapaxes(0, 1)
        x = (q / np.float32(np.sqrt(dim))).reshape(len(q), len(keys), -1, dim).transpose(1, 2, 0, 3)
        scores, packed = x @ keys[:, None].swapaxes(-1, -2), batch.packed[0]
        variance = self["variance"][slot, :, None, :packed].swapaxes(-1, -2)
        scores[..., :packed] -= self.ops.correction / 2 * ((x * x) @ variance)
        scores += np.triu(np.full(scores.shape[-2:], -np.inf, np.float32), 1 + start)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return (
            (p / p.sum(axis=-1, keepdims=True) @ values[:, None]).transpose(2, 0, 1, 3).reshape(q.shape).astype(q.dtype)
        )


def int2(**changes: Any) -> Scheme:
    return replace(PLAIN, **changes)


K, V = Keys(3), Values(2.5)
V64 = Values(2.25, int2(group=64, shrink=0.8))
IDEAS: dict[str, tuple[Keys, Values, dict[str, Any]]] = {
    "int2": (K, V, {}),
    "values in 8 bits": (K, Values(8.5, int2(value_bits=8, shrink=1.0)), {}),
    "keys in 8 bits": (Keys(9, int2(key_bits=8, shrink=1.0)), V, {}),
    "softmax bias corrected": (K, V, {"correction": 1.0}),
    "keys' shrink 0.85": (Keys(3, int2(shrink=0.85)), V, {}),
    "keys' shrink 0.95": (Keys(3, int2(shrink=0.95)), V, {}),
    "values' shrink 0.8": (K, Values(2.5, int2(shrink=0.8)), {}),
    "no sinks": (K, V, {"sinks": 0}),
    "8 sinks": (K, V, {"sinks": 8}),
    "16 sinks": (K, V, {"sinks": 16}),
    "64 sinks": (K, V, {"sinks": 64}),
    "128 sinks": (K, V, {"sinks": 128}),
    "sinks only in layers that have them": (K, V, {"where_needed": True}),
    "keys' shrink 0.8, 0.85, 0.9, 0.95 or 1 by layer": (K, V, {"shrinks": (0.8, 0.85, 0.9, 0.95, 1.0)}),
    "value groups of 64, shrink 0.8": (K, V64, {}),
    "norms refitted": (Keys(3, refit=True), V, {}),
    "keys: a norm per kv head": (Keys(3, by_head=True), V, {}),
    "no sinks, keys: a norm per kv head": (Keys(3, by_head=True), V, {"sinks": 0}),
    "keys: centered on the mean of the prefill": (K, V, {"centered": True}),
    "keys: mean of 128, symmetric 32": (Keys(2.625, offset=128), V, {}),
    "keys: step and minimum in 8 bits": (Keys(2.5, params=eight_bits), V, {}),
    "keys: wider outer levels": (Keys(3, levels=(-0.1, 1, 2, 3.1)), V, {}),
    "keys: the better of two codebooks": (Keys(3 + 1 / 32, choices=(K, Keys(3, levels=(-0.3, 0.9, 2.1, 3.3)))), V, {}),
    "keys: shrink 0.8, 0.9 or 1 by group": (
        Keys(3, choices=tuple(Keys(3, int2(shrink=s)) for s in (0.8, 0.9, 1.0))),
        V,
        {},
    ),
    "keys: a rank-1 term a block": (Keys(3 + 16 * (1 / 64 + 1 / 128), rank=1), V, {}),
    "keys: 2 worst tokens a block exact": (Keys(3 + 2 * 16 / 128, exact=2), V, {}),
    "values: Lloyd-Max spacing": (K, Values(2.5, levels=(0.25, 0.85)), {}),
    "values: least-squares step": (K, Values(2.5, least_squares=True), {}),
    "values: half the error carried on": (K, Values(2.5, carried=0.5), {}),
    "values: dithered": (K, Values(2.5, dithered=np.inf), {}),
    "values: dithered where they repeat": (K, Values(2.5, dithered=0.25), {}),
    "keys 3 bits in 128s, values 2 in 64s": (Keys(3.25, int2(key_bits=3, group=128, shrink=1.0)), V64, {}),
    "RoPE pairs of k balanced against q": (K, V, {"balance": True}),
    "shaped": (Keys(3, shaped=True), V, {}),
    "shaped, a norm per kv head": (Keys(3, shaped=True, by_head=True), V, {}),
    "shaped, values dithered where they repeat": (Keys(3, shaped=True), Values(2.5, dithered=0.25), {}),
    "shaped, softmax bias corrected": (Keys(3, shaped=True), V, {"correction": 1.0}),
    "shaped, value groups of 64": (Keys(3, shaped=True), V64, {}),
    "shaped, key groups of 64": (Keys(2.5, int2(group=64, shrink=0.85), shaped=True), V64, {"sinks": 64}),
    "shaped, key groups of 128": (Keys(2.25, int2(group=128, shrink=0.8), shaped=True), V64, {"sinks": 64}),
    "shaped, keys 3 bits in 128s, values 2 in 64s": (
        Keys(3.25, int2(key_bits=3, group=128, shrink=1.0), shaped=True),
        V64,
        {},
    ),
}


def balanced(weights, config: Config):
    """k times s and q over s in every RoPE pair, s^4 = the ratio of their energies by the weights' own rows: a fold,
    free at run time."""
    layers = []
    for layer in weights.layers:
        rows = ((layer.qkv * layer.input_norm) ** 2).sum(axis=1) + (0 if layer.qkv_bias is None else layer.qkv_bias**2)
        rows = rows[: config.q_size + config.kv_size].reshape(-1, 2, config.head_dim // 2).sum(axis=1)
        q, k = (
            rows[: config.num_heads].reshape(config.num_kv_heads, -1, config.head_dim // 2).mean(axis=1),
            rows[config.num_heads :],
        )
        s = np.tile((q / k) ** 0.25, 2)  # [kv_heads, d]
        factor = np.concatenate(
            [1 / s.repeat(config.num_heads // config.num_kv_heads, axis=0).ravel(), s.ravel(), np.ones(config.kv_size)]
        )
        factor = factor.astype(np.float32)
        bias = None if layer.qkv_bias is None else layer.qkv_bias * factor
        layers.append(replace(layer, qkv=layer.qkv * factor[:, None], qkv_bias=bias))
    return replace(weights, layers=tuple(layers))


# Rotated as the ideas are, not quantized.
EXACT = replace(SHAPED, name="exact", key_bits=16, value_bits=16, scale=False)


def prefilled(engine: Engine, ids: list[int]) -> list[tuple[Array, Array]]:
    """Keys and values of every layer, [tokens, kv_heads, d], as a prefill hands them to the cache; no scheme changes
    them."""
    seen: list[tuple[Array, Array]] = []
    model, cache = (
        Model(engine.config, engine.model.weights, EXACT, Reference()),
        Cache(engine.config, EXACT, 1, len(ids), Reference()),
    )
    model = observed(model, lambda q, new: seen.append((new.k, new.v)))
    model.forward(np.array(ids), cache, cache.batch_for([0], [len(ids)]))
    return seen


def decoded(engine: Engine, ids: list[int], prefill: list[tuple[Array, Array]]) -> Iterable[Array]:
    """Log-probabilities, chunk by chunk, of the tokens behind a prefill that is put into the cache as it was once
    computed."""
    cache = Cache(engine.config, engine.scheme, 1, len(ids) - 1, engine.ops)
    batch = cache.batch_for([0], [len(prefill[0][0])])
    for (k, v), layer, layer_cache in zip(prefill, engine.model.weights.layers, cache.layers, strict=True):
        norms = oscar.token_norms(k.astype(BF16)) if engine.scheme.scale else None
        layer_cache.append(NewTokens(k, v, norms, layer.key_feedback), batch)
    cache.advance(batch)
    return map(log_softmax, followed(engine, ids, cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("ideas", nargs="*", metavar="IDEA", default=list(IDEAS), help="all of them")
    parser.add_argument("--text", choices=texts.TEXTS, help="instead of the default text")
    args, ops = parser.parse_intermixed_args(), Reference()
    folder = hub.resolve(args.model)
    config, tokenizer = Config.from_folder(folder), Tokenizer(folder)
    rotated = rotate_values(load(folder, config, ops), config, ops)
    shaped = other = shape_keys(rotated, config, SHAPED, ops)
    if any(IDEAS[name][2].get("balance") for name in args.ideas):
        other = shape_keys(balanced(rotated, config), config, SHAPED, ops)
    runs = [Engine(config, shaped, tokenizer, EXACT, ops), Engine(config, shaped, tokenizer, SCHEMES["oscar"], ops)]
    for name in args.ideas:
        keys, values, options = IDEAS[name]
        scheme = replace(SHAPED, name=name, sinks=options.get("sinks", 32))
        lab = Lab(
            keys, values, **{option: value for option, value in options.items() if option not in ("sinks", "balance")}
        )
        runs.append(Engine(config, other if options.get("balance") else shaped, tokenizer, scheme, lab))
    windows = texts.stretches(args.text or texts.DEFAULT, tokenizer, PREFILL + DECODE + 1, WINDOWS)
    scores: list[list[tuple[float, float, float]]] = [[] for _ in runs]
    for window in tqdm(windows, disable=None):
        prefills: dict[int, list[tuple[Array, Array]]] = {}  # by the weights that they belong to
        truth = None
        for engine, found in zip(runs, scores, strict=True):
            weights = engine.model.weights
            prefills[id(weights)] = prefills.get(id(weights)) or prefilled(engine, window[:PREFILL])
            chunks = list(decoded(engine, window, prefills[id(weights)]))
            truth = np.concatenate(chunks) if truth is None else truth
            found.append(fidelity.compare(chunks, truth, np.array(window[PREFILL + 1 :])))
    rows = [
        asdict(fidelity.summary(run.scheme, config.head_dim, np.array(found), np.array(scores[0])))
        for run, found in zip(runs, scores, strict=True)
    ]
    for row in rows[2:]:
        keys, values, _ = IDEAS[row["kv"]]
        row["bits_per_element"] = (keys.bits + values.bits) / 2
    for row, found in zip(rows, scores, strict=True):
        row["kl_by_window"] = [kl for _, kl, _ in found]
    about = {"model": folder.name, "prefill": PREFILL, "decode": DECODE, "windows": WINDOWS}
    about |= {} if args.text is None else {"text": args.text}
    print(json.dumps({**about, "results": rows[1:]}))


if __name__ == "__main__":
    main()
