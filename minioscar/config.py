"""config.json -> Config: the shapes and switches of a model, checked; whatever is not implemented is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import strict_json as json
from .errors import UserError
from .rope import Rope

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MOST = {"num_hidden_layers": 4096, "head_dim": 2048}  # what is made from these numbers before a weight is seen must stay small


@dataclass(frozen=True)
class Config:
    """The decoder-only transformer that every supported family is: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int  # q heads
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int  # the longest context the model is made for
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tie_embeddings: bool

    @classmethod
    def from_folder(cls, folder: Path) -> Config:
        """Reads folder/config.json. Raises UserError where it is missing, malformed or asks for what is not implemented."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path, "a model folder needs it"), str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """The fields are those of transformers' configuration classes, old and new spelling of the rope options alike."""
        get = _Reader(raw, source)
        kind = raw.get("model_type")
        if kind not in MODEL_TYPES:
            raise UserError(f"{source}: model_type {kind!r} is not supported; minioscar runs {', '.join(MODEL_TYPES)}")
        for name in get.items("architectures"):
            if not str(name).endswith("ForCausalLM"):
                raise UserError(f"{source}: architecture {name!r} is not supported; only ...ForCausalLM models generate text")
        if raw.get("quantization_config"):
            raise UserError(f"{source}: quantization_config (quantized weights) is not supported; use the model's F32, F16 or BF16 weights")
        get.only("hidden_act", "silu", default="silu")
        get.only("mlp_bias", False, default=False)
        get.only("partial_rotary_factor", 1.0, default=1.0)
        heads, hidden = get.count("num_attention_heads"), get.count("hidden_size")
        kv_heads = get.count("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if raw.get("head_dim") is None and kind != "qwen3" and hidden % heads:
            raise UserError(f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads} and there is no head_dim")
        head_dim = get.count("head_dim", 128 if kind == "qwen3" else hidden // heads)
        if head_dim % 8 or head_dim > MOST["head_dim"]:
            raise UserError(f"{source}: head_dim {head_dim} is not supported; it must be a multiple of 8, at most {MOST['head_dim']}")
        max_positions = get.count("max_position_embeddings", 2048)
        rope = Rope.from_config(raw, head_dim, max_positions, source)
        biased = kind != "mistral" and get.flag("attention_bias", False)
        return cls(
            model_type=kind,
            vocab_size=get.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=get.count("intermediate_size"),
            num_layers=get.count("num_hidden_layers", most=MOST["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=get.positive("rms_norm_eps", 1e-6),
            max_positions=min(rope.max_positions, _attention_span(raw, get)),
            rope=rope,
            qkv_bias=kind == "qwen2" or biased,
            output_bias=kind in ("llama", "qwen3") and biased,
            qk_norm=kind == "qwen3",
            tie_embeddings=get.flag("tie_word_embeddings", False),
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def parameters(self) -> int:
        """The number of weights, a tied embedding counted once."""
        hidden, inter = self.hidden_size, self.intermediate_size
        attention = hidden * (self.q_size + 2 * self.kv_size) + self.q_size * hidden
        attention += (self.q_size + 2 * self.kv_size) * self.qkv_bias + hidden * self.output_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * hidden * inter + 2 * hidden
        return self.num_layers * layer + hidden + self.vocab_size * hidden * (1 if self.tie_embeddings else 2)


def _attention_span(raw: Mapping[str, Any], get: _Reader) -> int:
    """Tokens a query may look back. Sliding windows are not implemented, but within one window attention is full attention."""
    window = raw.get("sliding_window", 4096 if raw["model_type"] == "mistral" else None)  # what a missing key means to transformers
    if raw["model_type"] in ("qwen2", "qwen3") and not get.flag("use_sliding_window", False):
        window = None
    kinds = get.items("layer_types")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"{get.source}: layer type {kind!r} is not supported; only full_attention is")
    if window is None or (kinds and "sliding_attention" not in kinds):
        return 2**31
    return get.count("sliding_window", window)


class _Reader:
    """Typed access to the fields of a config.json, with errors that name file and field."""

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw, self.source = raw, source

    def count(self, key: str, default: int | None = None, most: int = 2**31) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise UserError(f"{self.source}: {key} must be a positive whole number, not {value!r}")
        if value > most:
            raise UserError(f"{self.source}: {key} {value} is not supported; it must be at most {most}")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{self.source}: {key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{self.source}: {key} must be true or false, not {value!r}")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.raw.get(key)
        value = [] if value is None else value
        if not isinstance(value, list):
            raise UserError(f"{self.source}: {key} must be a list, not {value!r}")
        return value

    def only(self, key: str, supported: Any, default: Any) -> None:
        value = self.raw.get(key)
        if (default if value is None else value) != supported:
            raise UserError(f"{self.source}: {key} {value!r} is not supported; only {supported!r} is")


def read_json(path: Path, why: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError, with `why` the file is needed, if it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {why}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({' '.join(str(error).split())}); fetch the model again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch the model again")
    return value
