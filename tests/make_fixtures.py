"""Makes tests/fixtures: tiny random models as transformers saves them, and what transformers computes with them.

    pip install -e '.[parity]' && python tests/make_fixtures.py [CASE ...]        (two minutes on two cores)

The fixtures are committed; this is run by hand when a case is added. Each folder holds config.json and the weights
exactly as `save_pretrained` writes them, and reference.npz (float32 arithmetic on the stored, rounded weights):
  prompt int32 [n], logits float32 [n, vocab] of all its positions, greedy int32 [k] the continuation,
  gap float32 [k] between the two largest logits at each of its steps.
smollm2-135m is the real model of weights/smollm2-135m (`python -m minioscar pull smollm2-135m`); only its reference is
stored.

Nothing is left at a default that would hide a mistake (norm weights of one, biases of zero, prompts shorter than what
RoPE scaling changes). The script checks that: undoing any single feature must move the logits by more than BITES of the
largest. It also checks that transformers reads every spelling of config.json alike.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
SMOLLM2 = Path(__file__).parent.parent / "weights" / "smollm2-135m"
PROMPT, STEPS, VOCAB = 70, 16, 96
BITES = 1e-2  # of the largest logit: a hundred times the tolerance of test_parity.py
CLEAR = 0.03  # of the largest logit: twice what keys and values in BF16 change
ROUTER_GAP = 2e-4  # between probabilities of experts: a hundred times the noise of float32


@dataclass(frozen=True)
class Case:
    """One folder of fixtures: `model` names the architecture, `config` overrides SHAPE, `dtype` is that of the stored
    weights."""

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    shard: str | None = None  # max_shard_size of save_pretrained


SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,  # large enough to matter
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ONE_KV_HEAD = {"num_attention_heads": 2, "num_key_value_heads": 1}


def rope(rope_type: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **more}}


LLAMA3 = rope(
    "llama3", 5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)

CASES: dict[str, Case] = {
    # head_dim is hidden/heads and theta 10000, as transformers assumes where config.json says nothing; F16 as published
    "llama2": Case(
        "llama", {
            "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, **rope("default"),
            "rms_norm_eps": 1e-6
        }, "float16"
    ),
    "llama3": Case("llama", {**LLAMA3, "tie_word_embeddings": True}),
    "llama3-untied-sharded": Case("llama", {**LLAMA3, **ONE_KV_HEAD}, shard="30KB"),
    "llama-bias": Case("llama", {"attention_bias": True, **ONE_KV_HEAD, **rope("default", 100.0)}, "float32"),
    "llama-mlp-bias": Case(
        "llama", {"attention_bias": True, "mlp_bias": True, **ONE_KV_HEAD, **rope("default", 500.0)}, "float32"
    ),
    # OpenLLaMA 3B has 100 channels a head: no multiple of 8, and hidden_size is none here either
    "llama-head-dim-20": Case(
        "llama", {
            "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20,
            **rope("default", 300.0)
        }
    ),
    # LongChat's way: max_position_embeddings is the length before scaling, and the prompt is longer
    "llama-linear-beyond": Case(
        "llama", {"max_position_embeddings": 32, **ONE_KV_HEAD, **rope("linear", 500.0, factor=4.0)}
    ),
    "llama-linear": Case("llama", {**ONE_KV_HEAD, **rope("linear", 500.0, factor=2.5)}),
    "llama-head-dim-16": Case(
        "llama", {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 16, **rope("default", 500.0)}
    ),
    "llama-head-dim-96": Case("llama", {"head_dim": 96, **ONE_KV_HEAD, **rope("default", 500.0)}),
    "mistral": Case("mistral", {"sliding_window": None, **rope("default", 1000.0)}),
    "mistral-sliding-window": Case("mistral", {"sliding_window": 128, **ONE_KV_HEAD, **rope("default", 1000.0)}),
    "qwen2": Case("qwen2", {**rope("default", 1000.0), "tie_word_embeddings": True}),
    # Qwen's own recipe for long contexts: max_position_embeddings stays at the original length
    "qwen2-yarn": Case(
        "qwen2",
        {"max_position_embeddings": 32, **ONE_KV_HEAD, **rope("yarn", factor=4.0, original_max_position_embeddings=32)}
    ),
    "qwen3": Case(
        "qwen3",
        {"head_dim": 64, **ONE_KV_HEAD, **rope("default", 1000.0), "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        "float32"
    ),
    "llama-yarn": Case("llama", {**ONE_KV_HEAD, **rope("yarn", factor=4.0, original_max_position_embeddings=64)}),
    "qwen3-moe": Case(
        "qwen3_moe",
        {
            "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True,
            "rms_norm_eps": 3e-3, **rope("default", 1000.0)
        }
    ),
    "qwen3-moe-not-normalized": Case(
        "qwen3_moe",
        {
            "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": True,
            "rms_norm_eps": 3e-3, **ONE_KV_HEAD, **rope("default", 500.0)
        },
        "float32"
    ),
    "qwen3-yarn-options": Case(
        "qwen3",
        {
            **ONE_KV_HEAD,
            "rms_norm_eps": 3e-3,
            # the ramp begins behind the first channel and would end behind the last
            **rope(
                "yarn", 100.0, factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.1,
                attention_factor=1.3
            ),
        },
    ),
}


def spellings(name: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Other config.json files that mean the same model as that of the case `name`, by what is other about them."""
    others = {f"transformers 4, {key}": _old_spelling(config, key) for key in ("rope_type", "type")}
    # saved by transformers 5, then scaled as the model's card says
    if scaling := others["transformers 4, type"]["rope_scaling"]:
        theta = config["rope_parameters"]["rope_theta"]
        plain = {"rope_type": "default", "rope_theta": theta}
        others["a scaling beside the default"] = {
            **config, "rope_parameters": plain, "rope_theta": theta, "rope_scaling": scaling
        }
    if name == "llama2":  # the first Llama files said no more than this, plus what is transformers' default
        required = (
            "hidden_size", "intermediate_size", "model_type", "num_attention_heads", "num_hidden_layers", "vocab_size"
        )
        others["nothing but shapes"] = {key: config[key] for key in required}
    if name == "qwen2-yarn":
        others["original length left out"] = _old_spelling(config, "type")
        del others["original length left out"]["rope_scaling"]["original_max_position_embeddings"]
    return others


def _old_spelling(config: dict[str, Any], type_key: str) -> dict[str, Any]:
    """The config.json of transformers 4: rope_theta and rope_scaling at the top, torch_dtype, no layer_types."""
    config = dict(config)
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    rope_type = scaling.pop("rope_type")
    config["rope_scaling"] = None if rope_type == "default" else {type_key: rope_type, **scaling}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    if config["model_type"] == "qwen2":  # Qwen2.5 publishes a window that use_sliding_window turns off
        config.update(sliding_window=8, use_sliding_window=False, max_window_layers=0)
    return config


# --- from here on with torch and transformers


def build(case: Case, seed: int) -> Any:
    """A model whose every tensor is random: matrices around 1/sqrt(fan in), norm weights in 0.5 ... 1.5, biases around
    0.5."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model, **{**SHAPE, **case.config}))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.5)
            elif "embed" in name:  # small, or a tied head would only ever repeat its input
                tensor.normal_(0, 0.3)
            else:
                tensor.normal_(0, 1.5 / tensor.shape[-1] ** 0.5)
    return model.to(getattr(torch, case.dtype)).eval()


def load(folder: Path, dtype: str = "float32", config: dict[str, Any] | None = None) -> Any:
    """Loads the saved folder; with `config`, its weights under that config.json instead."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        if config is not None:
            shutil.copytree(folder, scratch, dirs_exist_ok=True)
            (Path(scratch) / "config.json").write_text(json.dumps(config))
            folder = Path(scratch)
        options = {"dtype": getattr(torch, dtype), "local_files_only": True, "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """ids [..., n] -> logits [..., n, vocab], by one pass without a cache."""
    import torch

    with torch.no_grad():
        return model(
            torch.from_numpy(np.atleast_2d(ids).astype(np.int64)), use_cache=False
        ).logits.numpy().reshape(*ids.shape, -1)


def greedy(model: Any, ids: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [batch, n] -> continuations [batch, steps] and the gaps between their two largest logits."""
    tokens, gaps = ids, []
    for _ in range(steps):
        last = logits_of(model, tokens)[:, -1]
        top = np.sort(last, axis=-1)
        gaps.append(top[:, -1] - top[:, -2])
        tokens = np.concatenate([tokens, last.argmax(-1)[:, None]], axis=1)
    return tokens[:, -steps:], np.stack(gaps, axis=1)


def router_gap(model: Any, ids: np.ndarray) -> float:
    """The least difference between the probabilities of the last expert that a token takes and the first that it does
    not, in all layers; 1 without experts. Where it is small, a rounding chooses the expert."""
    import torch

    if not (count := getattr(model.config, "num_experts_per_tok", 0)):
        return 1.0
    with torch.no_grad():
        routers = model(torch.from_numpy(ids[None].astype(np.int64)), output_router_logits=True).router_logits
    p = torch.cat([logits.softmax(-1) for logits in routers]).sort(-1, descending=True).values
    return float((p[:, count - 1] - p[:, count]).min())


def clear_prompt(model: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first random prompt whose greedy continuation is nowhere so close that rounding could change it, and not
    monotonous."""
    for _ in range(100):
        prompts = rng.integers(0, VOCAB, (64, PROMPT))
        tokens, gaps = greedy(model, prompts, STEPS)
        for i in np.argsort(-gaps.min(axis=1)):
            varied = len(set(tokens[i].tolist())) >= STEPS // 2 and SHAPE["eos_token_id"] not in tokens[i]
            clear = gaps[i].min() > CLEAR * np.abs(logits_of(model, prompts[i])).max()
            if varied and clear and router_gap(model, np.concatenate([prompts[i], tokens[i]])) > ROUTER_GAP:
                return prompts[i], tokens[i], gaps[i]
    raise SystemExit("every continuation is ambiguous, repeats itself or ends early: use another seed")


def undone(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Models that lack one feature of the folder's each, by name: what a careless implementation would compute."""
    import torch

    scaling = config["rope_parameters"]
    plain = {"rope_type": "default", "rope_theta": scaling["rope_theta"]}
    theta = {**scaling, "rope_theta": 2 * scaling["rope_theta"]}
    models = {"theta": load(folder, config={**config, "rope_parameters": theta})}
    if scaling["rope_type"] != "default":
        models["rope scaling"] = load(folder, config={**config, "rope_parameters": plain})
    for key in set(scaling) & {"attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"}:
        without = {**scaling, key: scaling[key] * 2}
        models[key] = load(folder, config={**config, "rope_parameters": without})
    if config["rms_norm_eps"] > 1e-6:
        models["eps"] = load(folder, config={**config, "rms_norm_eps": 1e-6})
    if "num_experts_per_tok" in config:
        for key, other in (("norm_topk_prob", not config["norm_topk_prob"]), ("num_experts_per_tok", 1)):
            models[key] = load(folder, config={**config, key: other})
    names = [name for name, _ in load(folder).named_parameters() if "norm" in name or "bias" in name]
    kinds = {name.split("layers.")[-1].lstrip("0123456789.") for name in names}
    for kind in kinds:
        models[kind] = load(folder)
        with torch.no_grad():
            for name, tensor in models[kind].named_parameters():
                if name.endswith(kind):
                    tensor.fill_(1.0 if "norm" in kind else 0.0)
    return models


def make(name: str, case: Case) -> None:
    folder, seed = FIXTURES / name, zlib.crc32(name.encode())
    shutil.rmtree(folder, ignore_errors=True)
    build(case, seed).save_pretrained(folder, **({"max_shard_size": case.shard} if case.shard else {}))

    model = load(folder)
    prompt, tokens, gap = clear_prompt(model, np.random.default_rng(seed))
    logits = logits_of(model, prompt)
    largest = np.abs(logits).max()
    noise = np.abs(logits_of(load(folder, "float64"), prompt) - logits).max() / largest

    config = json.loads((folder / "config.json").read_text())
    for spelling, other in spellings(name, config).items():
        difference = np.abs(logits_of(load(folder, config=other), prompt) - logits).max()
        why = f"transformers computes something else from the spelling {spelling!r}: {difference}"
        assert difference == 0, f"{name}: {why}"
    moved = {
        what: np.abs(logits_of(other, prompt) - logits).max() / largest
        for what, other in undone(folder, config).items()
    }
    blunt = {what: move for what, move in moved.items() if move < BITES}
    assert not blunt, f"{name}: the logits hardly depend on {blunt}"

    save_reference(
        folder, prompt=prompt.astype(np.int32), logits=logits, greedy=tokens.astype(np.int32),
        gap=gap.astype(np.float32)
    )
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1000
    print(
        f"{name:24} {size:5.0f} kB  float32 noise {noise:.0e}  least move {min(moved.values()):.3f} "
        f"({min(moved, key=moved.get)})  least gap {gap.min() / largest:.3f}  of max |logit| {largest:.1f}"
    )


def make_smollm2() -> None:
    """The real model: a short prompt with the whole first row of logits, and one that crosses the window of 128
    tokens."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(SMOLLM2, local_files_only=True), load(SMOLLM2)
    # "string-methods": of the topics it is the one whose continuation is the least ambiguous
    long = tokenizer.encode(topics["string-methods"], add_special_tokens=False)[:300]
    arrays = {}
    for kind, ids in {
        "short": tokenizer.encode("The capital of France is", add_special_tokens=False), "long": long
    }.items():
        prompt = np.array(ids, np.int32)
        last = logits_of(model, prompt)[-1]
        tokens, gap = greedy(model, prompt[None], 32)
        arrays |= {f"{kind}_prompt": prompt, f"{kind}_greedy": tokens[0].astype(np.int32), f"{kind}_gap": gap[0]}
        if kind == "short":
            arrays["short_logits"] = last  # float32 [vocab]
        else:  # the 64 largest are enough a second time
            arrays["long_top"] = np.argsort(-last)[:64].astype(np.int32)
            arrays["long_top_logits"] = last[arrays["long_top"]]
        print(
            f"smollm2-135m {kind}: {len(ids)} tokens, least gap {gap.min():.3f}, max |logit| {np.abs(last).max():.1f}"
        )
        print(repr(tokenizer.decode(tokens[0])))
    text = topics["lambda"] + topics["numbers"] + "déjà vu: 12345 + 67 = 🦙\t\n  <|im_start|>user"
    arrays |= {"text": np.array(text), "text_ids": np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)}
    save_reference(FIXTURES / "smollm2-135m", **arrays)


def save_reference(folder: Path, **arrays: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "reference.npz", **arrays)


if __name__ == "__main__":
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [*CASES, "smollm2-135m"]
    for name in wanted:
        make_smollm2() if name == "smollm2-135m" else make(name, CASES[name])
