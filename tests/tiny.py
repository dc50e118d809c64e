"""Tiny random models for tests: a config, its weights as a safetensors folder, with a tokenizer where text is
needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from minioscar import engine
from minioscar.cache import BF16
from minioscar.config import Config
from minioscar.error_feedback import feedback_matrix
from minioscar.oscar import SCHEMES, Scheme
from minioscar.weights import Layer, Weights, expected

# Schemes that nobody is offered: plain rounding with sinks and symmetric values, error feedback, and other windows.
PLAIN = Scheme("plain", rotate=True, scale=True, shrink=0.9, symmetric_values=True, sinks=32)
PLAIN_64 = replace(PLAIN, name="plain-g64", group=64, shrink=0.85, sinks=64)
WINDOWS = {
    scheme.name: scheme
    for scheme in (
        PLAIN,
        PLAIN_64,
        replace(PLAIN, name="plain-64-64", flush=64, keep=64),
        replace(PLAIN, name="plain-128-128", flush=128, keep=128),
        replace(PLAIN_64, name="plain-g64-64-64", flush=64, keep=64),
        replace(SCHEMES["oscar"], name="oscar-64-0", flush=64),
        replace(PLAIN, name="plain-32-96", flush=32, keep=96, sinks=64),  # sinks come with two flushes
        replace(PLAIN, name="shaped", shaped=True),
        replace(PLAIN, name="shaped-64-128", shaped=True, flush=64, keep=128),
        replace(SCHEMES["int4"], name="shaped-int4", shaped=True),
    )
}

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

MOE = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def write_model(folder: Path, seed: int, **changes) -> Path:
    """Writes config.json and model.safetensors with random float32 weights; `changes` go into the config."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(random_weights(Config.from_dict(raw), seed), folder / "model.safetensors")
    return folder


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_talker(folder: Path, seed: int, template: str | None = TEMPLATE, **changes) -> Path:
    """The same with a byte-level tokenizer, and a chat template in the manner of ChatML. Its end token is <|end|>."""
    write_model(folder, seed, **{"vocab_size": 320, "head_dim": 64, **changes})
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["the cat sat on the mat, and the dog saw that the cat sat there"] * 3, trainer)
    library.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def talker(folder: Path, kv: str = "int2") -> engine.Engine:
    return engine.load(folder, kv, "cpu")


def random_weights(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Matrices that keep the size of activations, norms around 1, biases that matter."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected(config).items():
        x = rng.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            x = 1 + 0.2 * x
        elif "embed" not in name and not name.endswith("bias"):
            x *= 1.5 / np.sqrt(shape[-1])
        tensors[name] = x
    return tensors


def blank_weights(config: Config, scheme: Scheme) -> Weights:
    """Weights in BF16, with what the scheme wants of a layer, that have shapes and no memory."""

    def blank(*shape: int, dtype: type = BF16.type) -> np.ndarray:
        return np.broadcast_to(dtype(0), shape)

    hidden, inter, e = config.hidden_size, config.intermediate_size, config.experts
    stack, width = (e.count,) if e else (), config.q_size + 2 * config.kv_size
    head_norm = blank(config.head_dim) if config.qk_norm else None
    layer = Layer(
        input_norm=blank(hidden), qkv=blank(width, hidden), qkv_bias=blank(width) if config.qkv_bias else None,
        q_norm=head_norm, k_norm=head_norm, o=blank(hidden, config.q_size), o_bias=None, post_norm=blank(hidden),
        gate_up=blank(*stack, 2 * inter, hidden), down=blank(*stack, hidden, inter),
        router=blank(e.count, hidden) if e else None,
    )  # fmt: skip
    embed, layers = blank(config.vocab_size, hidden), (layer,) * config.num_layers
    if not scheme.shaped:
        return Weights(embed, layers, blank(hidden), embed)
    feedback = blank(len(layers), config.num_kv_heads, config.head_dim, config.head_dim, dtype=np.float32)
    layers = tuple(replace(layer, key_feedback=of) for of in feedback)
    return Weights(embed, layers, blank(hidden), embed, key_feedback=feedback)


def load(folder: Path, kv: str = "int2", device: str = "cpu") -> engine.Engine:
    return engine.load(folder, kv, device, tokenizer=False)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||."""
    return float(np.linalg.norm(got.astype(np.float32) - want) / np.linalg.norm(want))


def key_feedback(scheme: Scheme, heads: int, dim: int) -> np.ndarray | None:
    """What a shaped scheme wants of a layer, for queries that weigh each RoPE pair up to ten times as much as another;
    else None."""
    if not scheme.shaped:
        return None
    energies = np.exp(np.random.default_rng(1).uniform(0, np.log(10), (heads, dim // 2)))
    return np.stack([feedback_matrix(np.concatenate([energy, energy])) for energy in energies])


def rotations(heads: int, dim: int) -> np.ndarray:
    """What a calibrated scheme wants of a layer, orthogonal, float32 [2, heads, dim, dim]."""
    return np.linalg.qr(np.random.default_rng(2).standard_normal((2, heads, dim, dim)))[0].astype(np.float32)
