"""How fast a RoPE pair may turn a large key bias before two bits lose it: `python -m tools.bias_pairs >
docs/results/bias-pairs-smollm2-135m.json`.

A bias of constant size in a pair that turns by f a token is no constant for a group of keys: it sweeps a range of about
|bias| * f * group, and the levels of the group must cover that too. Here the keys of the first and of the last layer of
SmolLM2-135M get a bias as large as Qwen2.5-7B's (key_biases.py) in one pair, after RoPE; they go through a cache and
back; the error is that of the logits of the last ASKING queries, root of the mean square about each query's mean, which
softmax does not see. Without the bias it is what is left where the bias is kept out of the codes and its logit added
exactly.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from minioscar import engine, oscar
from minioscar.attention_inputs import AttentionInputs, record_attention_inputs
from minioscar.cache import BF16
from minioscar.config import Config
from minioscar.evaluation.fidelity import default_text
from minioscar.evaluation.inspection import through_cache
from minioscar.key_shaping import Shaping, key_statistics, shaping
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES, Scheme
from tools.key_biases import FIRST, LAST

TOKENS, ASKING, EVERY = 512, 64, 4


def biased(k: np.ndarray, config: Config, pair: int, norm: float) -> np.ndarray:
    """Keys [tokens, kv_heads, d] after RoPE, with a bias of `norm` over all kv heads in one pair."""
    heads, half = config.num_kv_heads, config.head_dim // 2
    bias = np.zeros_like(k)
    bias[..., [pair, pair + half]] = norm / np.sqrt(2 * heads)
    return k + Reference().rope(bias, *config.rope.tables(len(k)))


def logit_error(q: np.ndarray, k: np.ndarray, scheme: Scheme, config: Config, shaped: Shaping) -> float:
    """q [tokens, q_heads, d], k [tokens, kv_heads, d] -> nats, over packed keys that are no sinks of any scheme."""
    keys = k.swapaxes(0, 1).astype(BF16).astype(np.float32)
    back, _ = through_cache(keys, keys, scheme, config, shaped)
    queries = q[-ASKING:].reshape(ASKING, len(keys), -1, config.head_dim).transpose(1, 2, 0, 3)
    error = queries @ (back - keys)[:, None, oscar.WINDOW :].swapaxes(-1, -2) / np.sqrt(config.head_dim)
    return float(error.std(axis=-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv", default="oscar,int2,int4")
    schemes = [SCHEMES[name] for name in parser.parse_args().kv.split(",")]
    e, layers, rows = engine.load("smollm2-135m", "bf16", "cpu"), [], []
    statistics = key_statistics(e.model.weights, e.config, e.ops)
    shapings = {scheme.name: shaping(statistics, scheme, e.config) for scheme in schemes}
    ids = e.tokenizer.encode(default_text())[:TOKENS]
    record_attention_inputs(e.model.weights, e.config, e.ops, np.array(ids), layers.append)
    half, frequencies = e.config.head_dim // 2, e.config.rope.frequencies()
    for index, norm in ((0, FIRST), (e.config.num_layers - 1, LAST)):
        layer: AttentionInputs = layers[index]
        for pair in (None, *range(half - 1, -1, -EVERY)):
            k = layer.k if pair is None else biased(layer.k, e.config, pair, norm)
            errors = {
                scheme.name: logit_error(layer.q, k, scheme, e.config, shapings[scheme.name].of_layer(index))
                for scheme in schemes
            }
            turn = None if pair is None else float(f"{frequencies[pair]:.4g}")  # radians a token
            errors = {kv: float(f"{error:.4g}") for kv, error in errors.items()}
            rows.append({"layer": index, "norm": norm, "pair": pair, "turn": turn, "errors": errors})
    print(json.dumps({"model": "smollm2-135m", "tokens": TOKENS, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
