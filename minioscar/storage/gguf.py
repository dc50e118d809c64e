"""A GGUF file of the Llama architecture -> an ordinary model folder, weights in BF16. Used once, when a model is
fetched.

Written from the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md). What a file may hold and this module does
not know (biases, rope scaling, experts, another tokenizer) is refused by name: a wrong model is worse than none.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from minioscar.errors import Failure, UserError, one_line

LAYER = {  # GGUF name within blk.N -> Hugging Face name within model.layers.N
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
NAMED = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "mask", "cls")}
NAMED |= {
    "unk": "tokenizer.ggml.unknown_token_id", "pad": "tokenizer.ggml.padding_token_id",
    "sep": "tokenizer.ggml.seperator_token_id"
}


def convert(gguf_path: str | Path, out_dir: str | Path) -> None:
    """Writes model.safetensors (BF16), tokenizer.json, tokenizer_config.json, generation_config.json and config.json.

    out_dir exists already. config.json is written last: a folder that has it has everything.
    Raises UserError for a file that is unreadable or holds what is not supported; then out_dir may hold some of the
    files.
    """
    path, out = Path(gguf_path), Path(out_dir)
    fields, tensors = _read(path)
    config = _config(path, fields, tensors)
    tokenizer, tokenizer_config = _tokenizer(path, fields, config["max_position_embeddings"])
    _write_weights(path, tensors, config, out / "model.safetensors")
    (out / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    # safetensors makes its file unreadable for others
    shutil.copymode(out / "tokenizer.json", out / "model.safetensors")
    _write_json(out / "tokenizer_config.json", tokenizer_config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    ends = dict.fromkeys(fields[NAMED[name]] for name in ("eos", "eot", "eom") if NAMED[name] in fields)
    if len(ends) > 1:  # the end of a turn is an end, too
        special["eos_token_id"] = list(ends)
    _write_json(out / "generation_config.json", special)
    _write_json(out / "config.json", config)


def require_gguf(what: str) -> None:
    """Raises UserError if the gguf package, an extra, is not installed; to be asked before a long download. what: who
    needs it."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{what}: reading GGUF needs the gguf package; pip install 'minioscar[gguf]'") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata by key, tensors (gguf.ReaderTensor) by name."""
    require_gguf(path.name)
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}
    except Exception as error:  # the reader does not check what it reads: a bad file ends in any exception
        reason = one_line(error)
        raise UserError(f"{path}: not a readable GGUF file ({reason}); fetch it again") from error


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path}: GGUF architecture {architecture!r} is not supported, only 'llama'; use the model's safetensors"
        )

    def need(key: str) -> Any:
        if key not in fields:
            raise UserError(f"{path}: GGUF key {key} is missing; the file is not a complete model")
        return fields[key]

    def number(key: str, default: int | None = None) -> int:
        value = need(f"llama.{key}") if default is None else fields.get(f"llama.{key}", default)
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{path}: llama.{key} is {value!r}, a single positive number is supported")
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    sizes = {head_dim, number("attention.value_length", head_dim), number("rope.dimension_count", head_dim)}
    if len(sizes) > 1 or head_dim % 2:
        raise UserError(
            f"{path}: head sizes {sorted(sizes)} (key, value, rope) must be one even number; others are not supported"
        )
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(
            f"{path}: rope scaling {fields['llama.rope.scaling.type']!r} in GGUF is not supported; use the safetensors"
        )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing; the file is not a complete model")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]), "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"), "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim, "hidden_act": "silu", "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _shortest(need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)), "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": "output.weight" not in tensors,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def _shortest(x: float) -> float:
    """GGUF keeps float32; 9.999999747378752e-06 is 1e-05 written in it."""
    return float(str(np.float32(x)))


# --- weights


def _write_weights(path: Path, tensors: dict[str, Any], config: dict[str, Any], out: Path) -> None:
    from ml_dtypes import bfloat16
    from safetensors import SafetensorError
    from safetensors.numpy import save_file
    from tqdm import tqdm

    wanted = _wanted(config)
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise UserError(
            f"{path}: tensor {unknown[0]} is not part of a plain Llama model and is not supported; use the safetensors"
        )
    weights = {}
    for name, (hf_name, shape) in tqdm(wanted.items(), desc="converting", unit="tensor", leave=False):
        x = _dequantize(path, name, tensors.get(name), shape)
        if name.endswith("attn_q.weight"):
            x = unpermute(x, config["num_attention_heads"])
        elif name.endswith("attn_k.weight"):
            x = unpermute(x, config["num_key_value_heads"])
        weights[hf_name] = np.ascontiguousarray(x.astype(bfloat16))
    try:
        save_file(weights, out, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise Failure(f"{out}: cannot be written: {error}; free space or set MINIOSCAR_WEIGHTS") from error


def _wanted(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (Hugging Face name, shape) of every tensor that the model has."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {
        "attn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_norm": (hidden,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    wanted = {
        "token_embd.weight": ("model.embed_tokens.weight", (config["vocab_size"], hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = ("lm_head.weight", (config["vocab_size"], hidden))
    for i in range(config["num_hidden_layers"]):
        for name, hf_name in LAYER.items():
            wanted[f"blk.{i}.{name}.weight"] = (f"model.layers.{i}.{hf_name}.weight", shapes[name])
    return wanted


def _dequantize(path: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    """float32 array of that shape; GGUF counts dimensions from the fastest, so its shape reads backwards."""
    from gguf.quants import dequantize

    if tensor is None:
        raise UserError(f"{path}: tensor {name} is missing; the file is not a complete model")
    found = tuple(int(n) for n in reversed(tensor.shape))
    if found != shape:
        raise UserError(
            f"{path}: tensor {name} has shape {list(found)}, its metadata wants {list(shape)}; the file is damaged"
        )
    try:
        x = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: tensor {name} is stored as {tensor.tensor_type.name}, which gguf cannot dequantize"
        ) from None
    if x.size != math.prod(shape):
        raise UserError(
            f"{path}: tensor {name} holds {x.size} numbers, its shape wants {math.prod(shape)}; the file is damaged"
        )
    return x.astype(np.float32, copy=False).reshape(shape)


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from GGUF's order to Hugging Face's.

    x: [heads * head_dim, ...]. RoPE turns the pairs (i, i + head_dim/2) in Hugging Face's Llama and (2i, 2i + 1) in
    GGUF's, so GGUF row 2i + j of a head is row i + j * head_dim/2. Returns the same shape.
    """
    pairs = x.reshape(heads, -1, 2, *x.shape[1:])  # [heads, head_dim/2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(x.shape)


# --- tokenizer


def _tokenizer(path: Path, fields: dict[str, Any], max_length: int) -> tuple[Any, dict[str, Any]]:
    """tokenizers.Tokenizer and the content of tokenizer_config.json, from the tokenizer.ggml.* metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise UserError(
            f"{path}: GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported, only 'gpt2' with 'smollm'"
        )
    try:
        tokens, types, merges = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    except Exception as error:  # the library raises plain Exception for a merge of tokens that are not there
        raise UserError(f"{path}: the tokenizer in the GGUF file is damaged ({error}); fetch it again") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    of_type = {
        wanted: [t for t, kind in zip(tokens, types, strict=True) if kind == wanted]
        for wanted in (CONTROL, USER_DEFINED)
    }
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in of_type[CONTROL]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in of_type[USER_DEFINED]])

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, key in NAMED.items():
        if (token := fields.get(key)) is not None:
            if not (isinstance(token, int) and 0 <= token < len(tokens)):
                raise UserError(
                    f"{path}: the {name} token {token} is not among the {len(tokens)} tokens; the file is damaged"
                )
            config[f"{name}_token"] = tokens[token]
    added = {
        name: config.get(f"{name}_token") for name in ("bos", "eos") if fields.get(f"tokenizer.ggml.add_{name}_token")
    }
    around = [(token, tokens.index(token)) for token in added.values() if token]
    bos, eos = ([f"{added[name]}:0"] if added.get(name) else [] for name in ("bos", "eos"))
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(single=[*bos, "$A:0", *eos], special_tokens=around)
    templates = _templates(fields)
    if templates:
        named = [{"name": name, "template": text} for name, text in templates.items()]
        config["chat_template"] = named if templates.keys() != {"default"} else templates["default"]
    return tokenizer, config


def _templates(fields: dict[str, Any]) -> dict[str, str]:
    """tokenizer.chat_template, and tokenizer.chat_template.NAME for what others there are."""
    key = "tokenizer.chat_template"
    found = {
        name.removeprefix(key)[1:] or "default": text for name, text in fields.items() if name == key
        or name.startswith(f"{key}.")
    }
    return {name: text for name, text in found.items() if isinstance(text, str) and text}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(
            f"{path.name}: the GGUF file has a number for it that is NaN or infinite; fetch it again"
        ) from None
    path.write_text(f"{text}\n", encoding="utf-8")
