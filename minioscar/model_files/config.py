"""config.json -> the fields of a Config, checked, for every family; whatever is not implemented is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import formats
from ..errors import UserError
from ..experts import Experts
from ..fields import Fields
from ..storage import strict_json as json
from ..towers.files import M_ROPE, WITH_TOWERS, parts_of, preprocessors, towers_of
from .rope import read_rope, with_axes

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_vl", "llava", "llava_next", "qwen3_omni_moe")
# what is made from these numbers before a weight is seen must stay small
MOST = {"num_hidden_layers": 4096, "head_dim": 2048, "num_experts": 512}
EXPERTS = ("num_experts", "num_local_experts")  # spellings of one number
SHARED_DEFAULTS = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "sliding_window": 4096}
SHARED_DEFAULTS |= {"max_window_layers": 28}
QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
DEFAULTS: dict[str, dict[str, int]] = {  # what a missing key means: transformers 5.24, models/*/configuration_*.py
    "llama": SHARED_DEFAULTS | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": SHARED_DEFAULTS | {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    },
    "qwen2": SHARED_DEFAULTS | QWEN,
    "qwen3": SHARED_DEFAULTS | QWEN | {"head_dim": 128},
    "qwen3_vl": SHARED_DEFAULTS | QWEN | {"head_dim": 128, "max_position_embeddings": 128000},
    "qwen3_moe": SHARED_DEFAULTS | QWEN | {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8,
    },
}  # fmt: skip
NEUTRAL = {  # options of other families that change the numbers, and the values at which they do not; null never does
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "scale_emb"), 1),
    **dict.fromkeys(("residual_multiplier", "lm_head_multiplier"), 1),
    **dict.fromkeys(EXPERTS, 0),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"), 0),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "clip_qkv")),
    **dict.fromkeys(("attention_chunk_size", "text_config")),
}


def read_folder(folder: Path) -> dict[str, Any]:
    """`read_fields` of folder/config.json and what stands beside it. Raises UserError where it is missing or
    malformed."""
    path = folder / "config.json"
    raw = json.read_object(path, "a model folder needs it")
    return read_fields(formats.beside(raw, folder), str(path), preprocessors(folder))


def read_fields(raw: Mapping[str, Any], source: str, pictures: Mapping[str, Any]) -> dict[str, Any]:
    """What `Config` is made of. The options are those of transformers' configuration classes, old and new spelling of
    the rope options alike. pictures: preprocessor_config.json, of a model that reads some. Raises UserError."""
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{source}: model_type {kind!r} is not supported; minioscar runs {', '.join(MODEL_TYPES)}")
    model_type, whole = kind, raw
    if kind in WITH_TOWERS:
        whole, raw = parts_of(raw, source)
        kind = raw["model_type"]
    get = Fields(raw, source, DEFAULTS[kind])
    ending = "ForConditionalGeneration" if model_type in WITH_TOWERS else "ForCausalLM"
    for name in get.items("architectures"):
        if not str(name).endswith(ending):
            raise UserError(
                f"{source}: architecture {name!r} is not supported; only ...{ending} models generate text"
            )
    heads, hidden = get.count("num_attention_heads"), get.count("hidden_size")
    kv_heads = heads if raw.get("num_key_value_heads", 0) is None else get.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = _head_dim(get, kind, hidden, heads)
    experts = _experts(get) if kind == "qwen3_moe" else None
    _refuse_other_families(get, head_dim, experts)
    quantization = formats.read_config(raw, source)
    rope = read_rope(raw, head_dim, get.count("max_position_embeddings"), source)
    layers = get.count("num_hidden_layers", most=MOST["num_hidden_layers"])
    if model_type in M_ROPE:
        rope = with_axes(rope, raw, source)
    window = _sliding_window(get, kind, layers)
    biased = kind in ("llama", "qwen3", "qwen3_moe", "qwen3_vl") and get.flag("attention_bias", False)
    return dict(
        model_type=model_type,
        vocab_size=get.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=get.count("moe_intermediate_size" if experts else "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=get.positive("rms_norm_eps", 1e-6),
        max_positions=rope.max_positions,
        window=None if window is None or window >= rope.max_positions else window,
        rope=rope,
        qkv_bias=kind == "qwen2" or biased,
        output_bias=biased,
        mlp_bias=kind == "llama" and get.flag("mlp_bias", False),
        qk_norm=kind in ("qwen3", "qwen3_moe", "qwen3_vl"),
        tie_embeddings=get.flag("tie_word_embeddings", False),
        quantization=quantization,
        experts=experts,
        **towers_of(whole, pictures, source, (hidden, layers, rope.max_positions)),
    )


def _head_dim(get: Fields, kind: str, hidden: int, heads: int) -> int:
    if get.raw.get("head_dim") is None and kind != "qwen3" and hidden % heads:
        why = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} and there is no head_dim"
        raise UserError(f"{get.source}: {why}")
    head_dim = get.count("head_dim", 128 if kind == "qwen3" else hidden // heads)
    if head_dim % 2 or head_dim > MOST["head_dim"]:
        why = f"RoPE turns pairs of channels: it must be even, at most {MOST['head_dim']}"
        raise UserError(f"{get.source}: head_dim {head_dim} is not supported; {why}")
    return head_dim


def _experts(get: Fields) -> Experts:
    """Raises UserError for layers without experts, and for more experts a token than there are."""
    given = [key for key in EXPERTS if get.raw.get(key) is not None] or [EXPERTS[0]]
    count, per_token = get.count(given[0], most=MOST["num_experts"]), get.count("num_experts_per_tok")
    get.only(given[-1], count)
    if per_token > count:
        raise UserError(f"{get.source}: num_experts_per_tok {per_token} is more than the {count} experts; correct it")
    get.only("decoder_sparse_step", 1)
    get.only("mlp_only_layers", [])
    return Experts(count, per_token, get.flag("norm_topk_prob", False))


def _refuse_other_families(get: Fields, head_dim: int, experts: Experts | None) -> None:
    """Raises UserError for an option that this architecture does not have, unless its value changes nothing."""
    for key in ("hidden_act", "hidden_activation"):
        get.only(key, "silu", "swish")
    for key, neutral in NEUTRAL.items():
        if experts is None or key not in EXPERTS:
            get.only(key, neutral)
    get.only("query_pre_attn_scalar", head_dim)
    get.only("attention_multiplier", head_dim**-0.5)


def _sliding_window(get: Fields, kind: str, layers: int) -> int | None:
    """Tokens that a layer with a sliding window attends to, the newest included; None where no layer has one.

    As transformers 5.24 has it, which takes a Mistral with layer_types for a Ministral.
    """
    kinds = get.items("layer_types")
    for name in kinds:
        if name not in ("full_attention", "sliding_attention"):
            raise UserError(f"{get.source}: layer type {name!r} is not supported; only full_attention is")
    if kinds and len(kinds) != layers:
        why = f"layer_types has {len(kinds)} entries for num_hidden_layers {layers}"
        raise UserError(f"{get.source}: {why}; correct it")
    window = get.raw.get("sliding_window", get.defaults["sliding_window"])
    if kinds:
        if "sliding_attention" not in kinds:
            return None
        if window is None:
            why = "layer_types names sliding_attention, but sliding_window is null"
            raise UserError(f"{get.source}: {why}; correct it")
    elif kind in ("llama", "qwen3_vl") or window is None:  # these have no sliding windows
        return None
    elif kind == "qwen3_moe":  # a window is every layer's
        if not get.flag("use_sliding_window", False):
            return None
    elif kind != "mistral":
        full = get.raw.get("max_window_layers")
        full = get.defaults["max_window_layers"] if full is None else full
        if not get.flag("use_sliding_window", False):
            return None
        if isinstance(full, bool) or not isinstance(full, int) or full < 0:
            raise UserError(f"{get.source}: max_window_layers must be a whole number, not {full!r}")
        if full >= layers:  # the layers from this one on have a window
            return None
    return get.count("sliding_window")
