"""A checkpoint -> the arrays of a model on a back end, as its config and its KV scheme want them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .backend import Backend
from .config import Config
from .errors import UserError
from .formats import rounding
from .staging import Group, Staging, by_expert
from .storage.checkpoint import Checkpoint
from .storage.identity import WeightFiles

Array = Any
Matrix = Any  # an array, or a quantized.Quantized
ROUTER = "mlp.gate.weight"


@dataclass(frozen=True)
class Layer:
    """The weights of one layer; matrices are [out, in]. Projections that read the same input stand in one matrix."""

    input_norm: Array  # [hidden]
    qkv: Matrix  # [config.qkv_size, hidden]: all q heads, then all k heads, then all v heads
    qkv_bias: Array | None
    q_norm: Array | None  # [head_dim]
    k_norm: Array | None
    o: Matrix  # [hidden, q_heads * head_dim]
    o_bias: Array | None
    post_norm: Array  # [hidden]
    # of experts [experts, 2 * intermediate, hidden] and [experts, hidden, intermediate]; quantized, all their rows
    gate_up: Matrix  # [2 * intermediate, hidden]
    down: Matrix  # [hidden, intermediate]
    router: Array | None = None  # [experts, hidden]; None: a layer without experts
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
    # float32 [kv_heads, head_dim, head_dim], for a shaped scheme: key_shaping.py
    key_feedback: Array | None = None
    # float32 [2, kv_heads, head_dim, head_dim]: for a calibrated scheme: evaluation/own_samples.py
    rotations: Array | None = None


@dataclass(frozen=True)
class Weights:
    embed: Array  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Array  # [hidden]
    head: Matrix  # [vocab, hidden]; the same array as embed where they are tied
    # float32 [layers, kv_heads, head_dim, head_dim], for a shaped scheme: a layer has its slice
    key_feedback: Array | None = None
    files: WeightFiles | None = None  # what they were read from
    # of the values, as a scheme wants them: by v_proj and o_proj (`rotate_values`), or by the model at every pass
    rotation: Literal["none", "folded", "online"] = "none"
    quantized: bool = False  # whether some matrices are not what a rotation can be folded into
    towers: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)  # of each kind, by `Tower.expected`


def expected(config: Config) -> dict[str, tuple[int, ...]]:
    """Tensor name, as Hugging Face checkpoints spell it, -> shape."""
    shapes = _of_text(config)
    for tower in config.towers.values():
        shapes |= tower.expected()
    return shapes


def _of_text(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, inter, dim = config.hidden_size, config.intermediate_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        keys = config.key_heads[0] * config.head_dim
        for name, out in (("q", config.q_size), ("k", keys), ("v", config.kv_size)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (out, hidden)
            if config.qkv_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, config.q_size)
        if config.output_bias:
            shapes[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        if config.qk_norm:
            shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (dim,)
        for mlp in (f"{layer}mlp.{expert}" for expert in _experts(config)):
            shapes[f"{mlp}gate_proj.weight"] = shapes[f"{mlp}up_proj.weight"] = (inter, hidden)
            shapes[f"{mlp}down_proj.weight"] = (hidden, inter)
        if config.experts:
            shapes[f"{layer}{ROUTER}"] = (config.experts.count, hidden)
        if config.mlp_bias:
            shapes[f"{layer}mlp.gate_proj.bias"] = shapes[f"{layer}mlp.up_proj.bias"] = (inter,)
            shapes[f"{layer}mlp.down_proj.bias"] = (hidden,)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def _experts(config: Config) -> list[str]:
    """What stands in the names of a layer's MLPs."""
    return [f"experts.{e}." for e in range(config.experts.count)] if config.experts else [""]


def load(folder: Path, config: Config, ops: Backend, progress: bool = False, fold: bool = False) -> Weights:
    """Reads the weights onto the back end, in its dtype, or quantized as the files or `config.weights` have them.

    fold: fold V's rotation into matrices before config.weights quantizes them. Raises UserError for what `Checkpoint`
    refuses.
    """
    from tqdm import tqdm

    with ExitStack() as stack:
        tensors = opened(folder, config, ops, stack)
        staging = Staging(tensors, config, ops, matrices(config))
        kept = [tensors[name] for name in expected(config) if name not in staging.names]
        total, shown = sum(tensor.nbytes for tensor in kept) + staging.nbytes, None if progress else True
        bar = stack.enter_context(tqdm(total=total, desc="load", unit="B", unit_scale=True, leave=False, disable=shown))
        with ops.loading(bar.update, kept) as put:

            def get(*names: str) -> Array | Group:
                return Group(names) if names[0] in staging.names else put([tensors[name] for name in names])

            embed, layers = get("model.embed_tokens.weight"), range(config.num_layers)
            layers = tuple(read_layer(get, f"model.layers.{i}.", config) for i in layers)
            norm, head = get("model.norm.weight"), embed if config.tie_embeddings else get("lm_head.weight")
            towers = {kind: {name: get(name) for name in of.expected()} for kind, of in config.towers.items()}
            weights = Weights(embed, layers, norm, head, files=tensors.files, towers=towers)
        if staging.names:
            by_fold = partial(fold_values, config=config, ops=ops) if fold else None
            weights = staging.filled(weights, bar.update, by_fold)
            staging.check()
        tensors.files.check()  # not half of them of one training step and half of another
    return weights


def opened(folder: Path, config: Config, ops: Backend, stack: ExitStack, cards: int = 1) -> Checkpoint:
    """The files, and on stderr what of them is not used. cards: over which the bytes of `ops` are spread. Raises
    UserError as `Checkpoint`, and where memory has no room."""
    tensors = Checkpoint(folder, expected(config), config.tie_embeddings, stack, config.quantization)
    for what in tensors.unused():
        print(f"[{what}]", file=sys.stderr, flush=True)
    if (need := ops.weight_bytes(config)) > (free := ops.free_bytes()):
        fitting = [mode for mode in rounding.MODES if ops.weight_bytes(replace(config, weights=mode)) <= free]
        where = "" if cards == 1 else f" on each of {cards} cards"
        raise UserError(
            f"{folder}: the weights take {need / cards / 1e9:.1f} GB{where}, but only {free / cards / 1e9:.1f} GB of "
            f"{ops.name} memory are free{f'; --weights {fitting[0]} fits' if fitting else ''}"
        )
    for name in tensors.quantized.keys() - _of_text(config).keys():
        raise UserError(f"{folder}: {name} of a tower is quantized, which is not supported; use its BF16 weights")
    return tensors


def matrices(config: Config) -> list[str]:
    """The names of those that `Config.weights` is about: all but the embedding and routers."""
    shapes = _of_text(config).items()
    return [name for name, shape in shapes if len(shape) == 2 and "embed" not in name and not name.endswith(ROUTER)]


def read_layer(get: Callable[..., Array], prefix: str, config: Config) -> Layer:
    def of(*names: str, present: bool = True) -> Array | None:
        return get(*(prefix + name for name in names)) if present else None

    def mlps(*names: str) -> Array | Group:
        matrices = of(*(f"mlp.{expert}{name}.weight" for expert in _experts(config) for name in names))
        return matrices if isinstance(matrices, Group) else by_expert(matrices, config)

    # in the order of the alphabet, which is that of the files: what stands side by side there is read at once
    return Layer(
        input_norm=of("input_layernorm.weight"),
        down_bias=of("mlp.down_proj.bias", present=config.mlp_bias),
        down=mlps("down_proj"),
        gate_up_bias=of("mlp.gate_proj.bias", "mlp.up_proj.bias", present=config.mlp_bias),
        gate_up=mlps("gate_proj", "up_proj"),
        router=of(ROUTER, present=config.experts is not None),
        post_norm=of("post_attention_layernorm.weight"),
        k_norm=of("self_attn.k_norm.weight", present=config.qk_norm),
        o_bias=of("self_attn.o_proj.bias", present=config.output_bias),
        o=of("self_attn.o_proj.weight"),
        q_norm=of("self_attn.q_norm.weight", present=config.qk_norm),
        qkv_bias=of(*(f"self_attn.{n}_proj.bias" for n in "qkv"), present=config.qkv_bias),
        qkv=of(*(f"self_attn.{n}_proj.weight" for n in "qkv")),
    )


def rotate_values(weights: Weights, config: Config, ops: Backend, in_place: bool = False) -> Weights:
    """V's half of canalized rotation, folded into the weights: v_proj's rows and o_proj's columns times H, head by
    head.

    v' = H.v for every kv head, and o_proj.H undoes it, since H.H = I: the model computes what it did, on rotated
    values. Arrays that do not change are shared with `weights`; those that do are copies, or in_place what they were.
    Quantized matrices cannot take it: values are rotated at every pass then (`Weights.rotation`).
    Raises ValueError where head_dim has no Hadamard matrix.
    """
    if weights.rotation != "none":
        return weights
    if weights.quantized:
        return replace(weights, rotation="online")
    layers = (layer if in_place else _with_own_values(layer) for layer in weights.layers)
    return replace(weights, layers=tuple(fold_values(layer, config, ops) for layer in layers), rotation="folded")


def _with_own_values(layer: Layer) -> Layer:
    own = {name: getattr(layer, name) for name in ("qkv", "qkv_bias", "o")}
    return replace(layer, **{name: x if x is None else x.copy() for name, x in own.items()})


def fold_values(layer: Layer, config: Config, ops: Backend) -> Layer:
    """`rotate_values` of one layer, in place."""
    v = config.qkv_size - config.kv_size  # where the rows of v begin
    ops.rotate_heads(layer.qkv[v:], config.head_dim, 0)
    if layer.qkv_bias is not None:
        ops.rotate_heads(layer.qkv_bias[v:], config.head_dim, 0)
    ops.rotate_heads(layer.o, config.head_dim, 1)
    return layer
