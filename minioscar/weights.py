"""A checkpoint -> the arrays of a model on a back end, as its config and its KV scheme want them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import oscar
from .config import Config
from .errors import UserError
from .storage.checkpoint import Checkpoint, Tensor
from .storage.identity import WeightFiles

Array = Any
Put = Callable[[Sequence[Tensor]], Array]


class Backend(Protocol):
    """What weights ask of a back end (ops/reference.py says what each does)."""

    name: str
    dtype: np.dtype

    def free_bytes(self) -> int: ...

    def loading(self, advance: Callable[[int], object], tensors: Sequence[Tensor]) -> AbstractContextManager[Put]: ...

    def rotate_heads(self, x: Array, head_dim: int, axis: int) -> None: ...


@dataclass(frozen=True)
class Layer:
    """The weights of one layer; matrices are [out, in]. Projections that read the same input stand in one matrix."""

    input_norm: Array  # [hidden]
    qkv: Array  # [(q_heads + 2 * kv_heads) * head_dim, hidden]: all q heads, then all k heads, then all v heads
    qkv_bias: Array | None
    q_norm: Array | None  # [head_dim]
    k_norm: Array | None
    o: Array  # [hidden, q_heads * head_dim]
    o_bias: Array | None
    post_norm: Array  # [hidden]
    gate_up: Array  # [2 * intermediate, hidden]
    down: Array  # [hidden, intermediate]
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
    # float32 [kv_heads, head_dim, head_dim], for a shaped scheme: error_feedback.feedback_matrix
    key_feedback: Array | None = None
    # float32 [2, kv_heads, head_dim, head_dim]: for a calibrated scheme: evaluation/own_samples.py
    rotations: Array | None = None


@dataclass(frozen=True)
class Weights:
    embed: Array  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Array  # [hidden]
    head: Array  # [vocab, hidden]; the same array as embed where they are tied
    files: WeightFiles | None = None  # what they were read from


def expected(config: Config) -> dict[str, tuple[int, ...]]:
    """Tensor name, as Hugging Face checkpoints spell it, -> shape."""
    hidden, inter, dim = config.hidden_size, config.intermediate_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        for name, out in (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (out, hidden)
            if config.qkv_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, config.q_size)
        if config.output_bias:
            shapes[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        if config.qk_norm:
            shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (dim,)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inter)
        if config.mlp_bias:
            shapes[f"{layer}mlp.gate_proj.bias"] = shapes[f"{layer}mlp.up_proj.bias"] = (inter,)
            shapes[f"{layer}mlp.down_proj.bias"] = (hidden,)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def load(folder: Path, config: Config, ops: Backend, progress: bool = False) -> Weights:
    """Reads the weights onto the back end, in its dtype. Raises UserError for what `Checkpoint` refuses."""
    from tqdm import tqdm

    with ExitStack() as stack:
        tensors = Checkpoint(folder, expected(config), config.tie_embeddings, stack)
        need, free = config.parameters() * ops.dtype.itemsize, ops.free_bytes()
        if need > free:
            raise UserError(
                f"{folder}: the weights take {need / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of {ops.name} memory "
                "are free"
            )
        wanted, shown = [tensors[name] for name in expected(config)], None if progress else True
        total = sum(tensor.nbytes for tensor in wanted)
        bar = stack.enter_context(tqdm(total=total, desc="load", unit="B", unit_scale=True, leave=False, disable=shown))
        put = stack.enter_context(ops.loading(bar.update, wanted))

        def get(*names: str) -> Array:
            return put([tensors[name] for name in names])

        embed = get("model.embed_tokens.weight")
        weights = Weights(
            embed=embed,
            layers=tuple(_layer(get, f"model.layers.{i}.", config) for i in range(config.num_layers)),
            norm=get("model.norm.weight"),
            head=embed if config.tie_embeddings else get("lm_head.weight"),
            files=tensors.files,
        )
        tensors.files.check()  # not half of them of one training step and half of another
    return weights


def _layer(get: Callable[..., Array], prefix: str, config: Config) -> Layer:
    def of(*names: str, present: bool = True) -> Array | None:
        return get(*(prefix + name for name in names)) if present else None

    # in the order of the alphabet, which is that of the files: what stands side by side there is read at once
    return Layer(
        input_norm=of("input_layernorm.weight"),
        down_bias=of("mlp.down_proj.bias", present=config.mlp_bias),
        down=of("mlp.down_proj.weight"),
        gate_up_bias=of("mlp.gate_proj.bias", "mlp.up_proj.bias", present=config.mlp_bias),
        gate_up=of("mlp.gate_proj.weight", "mlp.up_proj.weight"),
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
    Raises ValueError where head_dim has no Hadamard matrix.
    """

    def own(x: Array | None) -> Array | None:
        return x if in_place or x is None else x.copy()

    def fold(layer: Layer) -> Layer:
        v = config.q_size + config.kv_size  # where the rows of v begin
        qkv, o, bias = map(own, (layer.qkv, layer.o, layer.qkv_bias))
        ops.rotate_heads(qkv[v:], config.head_dim, 0)
        if bias is not None:
            ops.rotate_heads(bias[v:], config.head_dim, 0)
        ops.rotate_heads(o, config.head_dim, 1)
        return replace(layer, qkv=qkv, qkv_bias=bias, o=o)

    return replace(weights, layers=tuple(map(fold, weights.layers)))


def for_scheme(weights: Weights, config: Config, scheme: oscar.Scheme, ops: Backend) -> Weights:
    """The weights as a model with this KV scheme wants them, in the arrays of `weights`, which are the caller's no
    more: copies beside them would leave holes in a card's memory that no cache fits into (3 GB of a Qwen3-8B)."""
    return rotate_values(weights, config, ops, in_place=True) if scheme.rotate else weights


def arrays(weights: Weights) -> Iterator[Array]:
    """Every array once (a tied head is the embedding)."""
    yield weights.embed
    yield weights.norm
    if weights.head is not weights.embed:
        yield weights.head
    for layer in weights.layers:
        yield from (array for array in vars(layer).values() if array is not None)
