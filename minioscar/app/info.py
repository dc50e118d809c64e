"""What a model is and what its cache costs, from config.json alone: no weights are loaded."""

from __future__ import annotations

import math
from dataclasses import asdict

from ..arguments import context_of, gpus_of, with_weights
from ..config import Config
from ..errors import UserError
from ..memory import longest_context
from ..memory import weight_bytes as bytes_with_tables
from ..ops import backend
from ..ops.reference import Reference
from ..oscar import SCHEMES, WINDOW, Scheme
from ..pages import check_scheme
from ..parallel.cards import over
from ..storage.hub import resolve
from ..tables import aligned, size
from ..towers.media import Tower


def describe(
    model: str, ctx: int | None, batch: int, device: str, weights: str | None = None, gpus: int | None = None
) -> dict:
    """The object of `info --json`; of several GPUs bytes are those of all. Raises UserError for a context that the
    model does not have, a batch below 1, or GPUs that it cannot be split over."""
    folder, gpus = resolve(model, weights=False), gpus_of(gpus)
    config = with_weights(Config.from_folder(folder), weights)
    ops = over(gpus, backend(device), config, SCHEMES["bf16"])
    context = context_of(ctx, config) or config.max_context
    if batch < 1:
        raise UserError(f"--batch {batch} is out of range; it must be at least 1")
    weight_bytes, free = ops.weight_bytes(config), ops.free_bytes()
    fitting = [scheme for scheme in SCHEMES.values() if _fits(config, scheme)]
    schemes = [_scheme(config, scheme, ops, (batch, context), free) for scheme in fitting]
    return {
        "model": model, "folder": str(folder), "model_type": config.model_type,
        "parameters": config.parameters(), "active_parameters": config.parameters(active=True),
        "experts": None if config.experts is None else asdict(config.experts),
        "towers": {kind: _tower(tower) for kind, tower in config.towers.items()},
        "layers": config.num_layers, "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "q_heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "rope": config.rope.type,
        "max_positions": config.max_positions, "sliding_window": config.window,
        "device": ops.name, "gpus": gpus, "weights": kept_as(config), "weight_bytes": weight_bytes,
        "work_bytes": ops.work_bytes(config, context, context), "free_bytes": free,
        "context": context, "batch": batch, "schemes": schemes,
    }


def _fits(config: Config, scheme: Scheme) -> bool:
    """Whether the model's head_dim has such a scheme."""
    try:
        check_scheme(config, scheme)
    except UserError:
        return False
    return True


def _scheme(config: Config, scheme: Scheme, ops: Reference, size: tuple[int, int], free: int) -> dict:
    many = 64 * WINDOW  # the slope: bytes that one more token costs, the window and the sinks aside
    per_token = (ops.cache_bytes(config, scheme, 1, 2 * many) - ops.cache_bytes(config, scheme, 1, many)) / many
    held, bf16 = (ops.cache_bytes(config, one, *size) for one in (scheme, SCHEMES["bf16"]))
    (batch, _), left = size, free - bytes_with_tables(config, scheme, ops)
    return {
        "kv": scheme.name, "bits_per_element": scheme.bits_per_element(config.head_dim), "bytes_per_token": per_token,
        "cache_bytes": held, "ratio_to_bf16": bf16 / held,
        "longest_context": longest_context(config, scheme, ops, batch, left),
    }


def _tower(tower: Tower) -> dict:
    shapes = tower.expected().values()
    return {"parameters": sum(math.prod(shape) for shape in shapes), "weights_of": tower.weights_of} | asdict(tower)


def _by(tower: dict) -> str:
    """tower: of the report."""
    if not tower["parameters"]:
        return f"by the tower of {tower['weights_of']}s"
    return f"a tower of {tower['parameters']:,} parameters"


def kept_as(config: Config) -> str:
    """What matrices are, in the files or by --weights."""
    given = [] if config.quantization is None else [config.quantization.name]
    return ", the others ".join([*given, *([] if config.weights is None else [config.weights])]) or "16 or 32 bits"


SIZES = {"size": "weight", "work": "work", "free": "free"}
WIDTHS = {"kv": -20, "bits/element": 12, "bytes/token": 12, "cache": 11, "vs bf16": 8, "longest context that fits": 26}


def text(report: dict) -> str:
    """The report for people."""
    window = report["sliding_window"]
    window = "" if window is None else f", sliding window {window}: no longer context runs"
    experts, active = "", ""
    if report["experts"]:
        active = f" ({report['active_parameters']:,} for a token)"
        experts = ", {per_token} of {count} experts a token".format(**report["experts"])
    words = {"window": window, "experts": experts, "active": active}
    gpus = report["gpus"]
    words |= {name: size(report[f"{key}_bytes"] // gpus) for name, key in SIZES.items()}
    words["where"] = report["device"] if gpus == 1 else f"each of {gpus} {report['device']} cards"
    lines = [
        "{model}: {model_type}, {parameters:,} parameters{active}, {layers} layers, hidden {hidden_size}, mlp "
        "{intermediate_size}{experts}",
        "attention: {q_heads} q heads, {kv_heads} kv heads, head_dim {head_dim}",
        *(f"{kind}s: {_by(of)}" for kind, of in report["towers"].items()),
        "positions: {max_positions}{window}, rope {rope}; vocabulary {vocab_size}",
        "on {where}: weights {size} ({weights}), reading a prompt of {context} tokens takes {work} more; {free} free",
        "",
        "KV cache at context {context}, batch {batch}:",
    ]
    lines = [line.format(**report | words) for line in lines]
    rows = [list(WIDTHS)]
    for row in report["schemes"]:
        numbers = f"{row['bits_per_element']:.3f}", f"{row['bytes_per_token']:.0f}"
        numbers += f"{row['cache_bytes'] / 1e6:.1f} MB", f"{row['ratio_to_bf16']:.2f}x", str(row["longest_context"])
        rows.append([row["kv"], *numbers])
    return "\n".join([*lines, *(aligned(zip(row, WIDTHS.values(), strict=True)) for row in rows)])
