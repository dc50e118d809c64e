"""What scaling keys by pair is worth with a factor for each kv head, and with one for all of them, as behind a QK-norm:
`python -m tools.pair_scales > docs/results/pair-scales.json`.

Keys of every layer of SmolLM2-135M go through a cache and back. `logits` is the error of the logits of the last
QUERIES, root of the mean square about each query's mean, which softmax does not see; `attention` the divergence from
the exact attention that it makes, to first order: half the variance of the error under the attention's weights, in
nats. Both are means over the layers, of packed keys alone.
"""

from __future__ import annotations

import json

import numpy as np

from minioscar import engine
from minioscar.attention_inputs import AttentionInputs, record_attention_inputs
from minioscar.cache import BF16
from minioscar.config import Config
from minioscar.error_feedback import feedback_matrix
from minioscar.evaluation.fidelity import default_text
from minioscar.evaluation.inspection import through_cache
from minioscar.key_shaping import Shaping, key_statistics, pair_scales
from minioscar.oscar import SCHEMES, Scheme

KV, TOKENS, QUERIES = ("int2", "int2-compact"), 1024, 128


def errors(inputs: AttentionInputs, scheme: Scheme, config: Config, shaped: Shaping) -> tuple[float, float]:
    """Mean square error of logits, and the divergence of attention."""
    k, seen = inputs.k.swapaxes(0, 1).astype(BF16).astype(np.float32), slice(scheme.sinks, TOKENS - QUERIES)
    q = inputs.q[-QUERIES:].reshape(QUERIES, len(k), -1, config.head_dim).transpose(1, 2, 0, 3)
    back, _ = through_cache(k, k, scheme, config, shaped)
    logits, error = (q @ x[:, None, seen].swapaxes(-1, -2) / np.sqrt(config.head_dim) for x in (k, back - k))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    about = error - (weights * error).sum(axis=-1, keepdims=True)
    return error.var(axis=-1).mean(), (weights * about**2).sum(axis=-1).mean() / 2


def main() -> None:
    e = engine.load("smollm2-135m", "bf16", "cpu")
    statistics, layers, rows = key_statistics(e.model.weights, e.config, e.ops), [], []
    ids = e.tokenizer.encode(default_text())[:TOKENS]
    record_attention_inputs(e.model.weights, e.config, e.ops, np.array(ids), layers.append)
    energy, variance = statistics
    together = np.broadcast_to(variance.mean(axis=1, keepdims=True), variance.shape)
    scales = {"none": np.ones_like(variance), "each head": pair_scales(variance), "all heads": pair_scales(together)}
    for kv in KV:
        for name, scale in scales.items():
            shaped = Shaping(scale, feedback_matrix(energy / np.square(scale)))
            found = [errors(x, SCHEMES[kv], e.config, shaped.of_layer(i)) for i, x in enumerate(layers)]
            logits, attention = np.mean(found, axis=0)
            row = {"logits": float(f"{np.sqrt(logits):.4g}"), "attention": float(f"{attention:.4g}")}
            rows.append({"kv": kv, "scales": name, **row})
    print(json.dumps({"model": "smollm2-135m", "tokens": TOKENS, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
