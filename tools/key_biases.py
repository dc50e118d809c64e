"""A Qwen2-style model with large key biases, made from SmolLM2-135M: `python -m tools.key_biases OUT --profile NAME`.

Qwen2 models add biases to keys, some of them many times what the rest of a key varies by, and are the hardest for a
quantized KV cache. They sit where RoPE turns slowest (arXiv 2502.01563 finds the large values of keys there). So this
model gets, in every layer and kv head, a bias in the PAIRS slowest RoPE pairs, in proportion to the spread of the keys
there. How large it is, is the profile:

even     TIMES the spread, in every layer
qwen2.5  the norms over a layer's kv heads that Qwen2.5-7B has, FIRST, LAST and MIDDLE in all other layers (measured in
         github.com/ggml-org/llama.cpp/issues/21385, where MIDDLE is the median): smaller than `even` in the middle, and
         much larger at both ends

A constant added to a key before RoPE is not neutral: it adds q . R(s-t) . bias to the logit of a key at distance s-t.
Where the pair turns slowly this is nearly the same for all keys, and softmax does not see it; what is left is a slope
with distance, as large as the query's part across the bias. The bias therefore points along the mean query of its
pair, with a random sign, which makes that part small. The result is another model, but a language model: its own BF16
run is its reference (`eval` prints its NLL).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from minioscar.attention_inputs import AttentionInputs, record_attention_inputs
from minioscar.config import Config
from minioscar.evaluation.fidelity import default_text
from minioscar.ops.reference import Reference
from minioscar.rope import Rope
from minioscar.storage import hub
from minioscar.storage.files import replacing
from minioscar.tokenizer import Tokenizer
from minioscar.weights import load

TIMES, PAIRS, TOKENS = 30, 4, 2048
PROFILES = ("even", "qwen2.5")
FIRST, MIDDLE, LAST = 605, 22, 921
BF16 = np.dtype(ml_dtypes.bfloat16)


def unturned(x: np.ndarray, rope: Rope) -> np.ndarray:
    """Undoes RoPE: [tokens, heads, d] at positions 0, 1, 2 ..."""
    cos, sin = rope.tables(len(x))
    return Reference().rope(x, cos, -sin)


def biases(folder: Path, config: Config, profile: str) -> list[np.ndarray]:
    """Of the keys of every layer, float32 [kv_heads, d], measured on the end of the default text, which `eval` does
    not reach."""
    ops, rng, found = Reference(), np.random.default_rng(0), []
    heads, half = config.num_kv_heads, config.head_dim // 2

    def record(inputs: AttentionInputs) -> None:
        q, k = unturned(inputs.q, config.rope), unturned(inputs.k, config.rope)
        along = q.reshape(len(q), heads, -1, 2, half).mean(axis=(0, 2))  # [kv_heads, 2, pairs]
        spread = np.sqrt(k.reshape(len(k), heads, 2, half).var(axis=0).mean(axis=1))  # [kv_heads, pairs]
        bias = (
            along
            / np.linalg.norm(along, axis=1, keepdims=True)
            * (TIMES * spread * rng.choice([-1, 1], spread.shape))[:, None]
        )
        bias[..., : half - PAIRS] = 0
        if profile == "qwen2.5":
            norm = {0: FIRST, config.num_layers - 1: LAST}.get(len(found), MIDDLE)
            bias *= norm / np.linalg.norm(bias)
        found.append(bias.reshape(heads, -1))

    ids = Tokenizer(folder).encode(default_text())[-TOKENS:]
    record_attention_inputs(load(folder, config, ops), config, ops, np.array(ids), record)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", choices=PROFILES, default=PROFILES[0])
    args, source = parser.parse_args(), hub.resolve("smollm2-135m")
    out = args.out
    config = Config.from_folder(source)
    tensors = load_file(source / "model.safetensors")
    for i, bias in enumerate(biases(source, config, args.profile)):
        attention = f"model.layers.{i}.self_attn."
        for name, values in (("q", np.zeros(config.q_size)), ("k", bias.ravel()), ("v", np.zeros(config.kv_size))):
            tensors[f"{attention}{name}_proj.bias"] = values.astype(BF16)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, out)
    settings = {
        **json.loads((source / "config.json").read_text()),
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
    }
    with replacing(out / "config.json") as partial:
        partial.write_text(json.dumps(settings, indent=2))
    with replacing(out / "model.safetensors") as partial:
        save_file(tensors, partial)


if __name__ == "__main__":
    main()
