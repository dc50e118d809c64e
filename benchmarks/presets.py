"""Models by their published shapes, with random weights: what a speed or a size depends on, without a file.

engine = load(config_of("qwen3-8b"), "int2", "cuda")      it has no tokenizer: token ids only
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import quantized
from minioscar import ops as back_ends
from minioscar.arguments import scheme_named
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.errors import UserError
from minioscar.evaluation import baselines  # noqa: F401  registers its schemes
from minioscar.key_shaping import prepared
from minioscar.ops.reference import Reference
from minioscar.pages import check_scheme
from minioscar.parallel import cards, loading, shares
from minioscar.parallel.backend import Split
from minioscar.quantized import Quantized
from minioscar.staging import by_expert
from minioscar.storage.files import expand
from minioscar.storage.strict_json import read_object
from minioscar.tables import size
from minioscar.weights import Layer, Weights

Array = Any

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# From the config.json of Qwen/Qwen3-{0.6B,4B,8B,14B,32B,30B-A3B}, meta-llama/Llama-3.1-{8B,70B}, Qwen/Qwen2.5-7B.
PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-8b": QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-0.6b": QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-14b": QWEN3 | {
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "qwen3-32b": QWEN3 | {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": LLAMA3,
    },
    "llama-3.1-70b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": LLAMA3,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072, "rope_theta": 1e6,
    },
    "qwen3-30b-a3b": QWEN3 | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}  # fmt: skip
VISION = {  # of Qwen/Qwen3-VL-8B-Instruct; what is missing is transformers' default, as there
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
PRESETS["qwen3-vl-8b"] = {
    "model_type": "qwen3_vl", "vision_config": VISION,
    "text_config": PRESETS["qwen3-8b"] | {
        "max_position_embeddings": 262144, "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    },
}  # fmt: skip
PRESETS["llava-next-7b"] = {  # llava-hf/llava-v1.6-vicuna-7b-hf
    "model_type": "llava_next", "image_token_index": 32000,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
    },
}  # fmt: skip
PRESETS["qwen3-omni-30b-a3b"] = {  # the thinker of Qwen/Qwen3-Omni-30B-A3B-Instruct
    "model_type": "qwen3_omni_moe", "thinker_config": {
        "audio_config": {"output_dim": 2048}, "vision_config": VISION | {"out_hidden_size": 2048},
        "text_config": PRESETS["qwen3-30b-a3b"] | {
            "vocab_size": 152064, "max_position_embeddings": 65536, "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "interleaved": True},
        },
    },
}  # fmt: skip
CHUNK = 1 << 26  # numbers drawn at once: in float32 first, so that a large matrix of BF16 needs little besides itself


def config_of(preset: str) -> Config:
    """The config of a preset, or of any config.json, by its path. Raises UserError for other names."""
    if preset in PRESETS:
        return Config.from_dict(PRESETS[preset], preset)
    if Path(preset).name == "config.json":
        return Config.from_dict(read_object(expand(preset), "name an existing one"), preset)
    raise UserError(f"{preset!r} is neither a preset ({', '.join(PRESETS)}) nor the path of a config.json")


def load(config: Config, kv: str = "int2", device: str = "auto", seed: int = 0, gpus: int = 1) -> Engine:
    """`engine.load` without files. Raises UserError for a scheme or device that cannot work, or too little memory."""
    scheme, ops = scheme_named(kv), back_ends.backend(device)
    check_scheme(config, scheme)
    ops = cards.over(gpus, ops, config, scheme)
    need, free = ops.weight_bytes(config), ops.free_bytes()
    if need > free:
        raise UserError(
            f"random weights of this shape take {size(need)}, but only {size(free)} of {ops.name} memory are free"
        )
    if gpus > 1:
        weights = loading.prepared(random_shares(config, ops, seed, scheme.rotate), config, ops, scheme)
    else:
        weights = prepared(random_weights(config, ops, seed, scheme.rotate), config, scheme, ops)
    ops.release()  # what was rotated in them
    return Engine(config, weights, None, scheme, ops)


def random_shares(config: Config, ops: Split, seed: int, rotates: bool = False) -> list[Weights]:
    """Of each card. One seed: what is on all cards is the same on all."""
    parts = []
    for rank, one in enumerate(ops.ranks):
        with ops.on(rank):
            own = shares.local(config, ops.cards, shares.first_key(config, ops.cards, rank))
            tokens = slice(ops.first_tokens[rank], ops.first_tokens[rank] + ops.share)
            part = random_weights(own, one, seed, rotates, tokens)
            parts.append(replace(part, head=part.embed[tokens]) if config.tie_embeddings else part)
            one.release()
    return parts


def _cut(head: Array, tokens: slice) -> Array:
    return head if tokens == slice(None) else head[tokens].copy()


def random_weights(
    config: Config, ops: Reference, seed: int = 0, rotates: bool = False, tokens: slice = slice(None)
) -> Weights:
    """Drawn on the back end, in its dtype or quantized as the config says; one seed gives the same on the same back
    end. rotates: values, in what is quantized after that (benchmarks/quantized.py). tokens: of the head.

    Every projection keeps the size of what it reads, and a layer adds to the residual about 1 / layers of its
    variance, so that activations stay near 1 however deep the model is.
    """
    rng, xp, hidden = ops.xp.random.default_rng(seed), ops.xp, config.hidden_size
    stack = (config.experts.count,) if config.experts else ()

    def normal(*shape: int, scale: float) -> Array:
        out = xp.empty(int(np.prod(shape)), ops.dtype)
        for at in range(0, out.size, CHUNK):
            chunk = out[at : at + CHUNK]
            chunk[...] = (rng.standard_normal(chunk.size, dtype=np.float32) * np.float32(scale)).astype(ops.dtype)
        return out.reshape(shape)

    def matrix(*shape: int, scale: float = 1.0) -> Array:
        *_, inputs = shape
        if config.quantization is not None:  # of experts all rows in one
            rows, size = int(np.prod(shape[:-1])), scale * inputs**-0.5
            made = quantized.random_matrix(config.quantization, rows, inputs, size, ops, rng)
            return by_expert(made, config) if len(shape) > 2 else made
        return normal(*shape, scale=scale * inputs**-0.5)

    def layer() -> Layer:
        rows, to_residual = config.qkv_size, (2 * config.num_layers) ** -0.5
        head_norm = xp.ones(config.head_dim, ops.dtype) if config.qk_norm else None
        return Layer(
            input_norm=xp.ones(hidden, ops.dtype),
            qkv=matrix(rows, hidden),
            qkv_bias=normal(rows, scale=0.1) if config.qkv_bias else None,
            q_norm=head_norm,
            k_norm=head_norm,
            o=matrix(hidden, config.q_size, scale=to_residual),
            o_bias=normal(hidden, scale=0.1 * to_residual) if config.output_bias else None,
            post_norm=xp.ones(hidden, ops.dtype),
            gate_up=matrix(*stack, 2 * config.intermediate_size, hidden),
            gate_up_bias=normal(2 * config.intermediate_size, scale=0.1) if config.mlp_bias else None,
            down=matrix(*stack, hidden, config.intermediate_size, scale=to_residual),
            router=normal(*stack, hidden, scale=hidden**-0.5) if stack else None,
            down_bias=normal(hidden, scale=0.1 * to_residual) if config.mlp_bias else None,
        )

    def of_tower(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
        norms = {name: xp.ones(shape, ops.dtype) for name, shape in shapes.items() if len(shape) == 1}
        return norms | {name: normal(*shape, scale=float(np.prod(shape[1:])) ** -0.5) for name, shape in shapes.items()
                        if len(shape) > 1}  # fmt: skip

    embed = normal(config.vocab_size, hidden, scale=1.0)
    weights = Weights(
        embed=embed,
        layers=tuple(quantized.of_layer(layer(), config, rotates, ops) for _ in range(config.num_layers)),
        norm=xp.ones(hidden, ops.dtype),
        head=embed if config.tie_embeddings else _cut(normal(config.vocab_size, hidden, scale=hidden**-0.5), tokens),
        towers={kind: of_tower(tower.expected()) for kind, tower in config.towers.items()},
    )
    return quantized.of_model(weights, config, rotates, ops)


def arrays(weights: Weights) -> Iterator[Array]:
    """Every array once (a tied head is the embedding); of a quantized matrix those that it consists of."""
    outer = [weights.embed, weights.norm, *([] if weights.head is weights.embed else [weights.head])]
    of_layers = (array for layer in weights.layers for array in vars(layer).values() if array is not None)
    of_towers = (array for tower in weights.towers.values() for array in tower.values())
    for array in (*outer, *of_layers, *of_towers):
        yield from array.arrays() if isinstance(array, Quantized) else (array,)
