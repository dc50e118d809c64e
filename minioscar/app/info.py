"""What a model is and what its cache costs, from config.json alone: no weights are loaded."""

from __future__ import annotations

import math
from dataclasses import asdict

from ..cache import cache_bytes
from ..config import Config
from ..engine import with_weights
from ..errors import UserError
from ..memory import longest_context, size
from ..memory import weight_bytes as bytes_with_tables
from ..model import check_scheme
from ..ops import backend
from ..oscar import SCHEMES, WINDOW
from ..storage.hub import resolve
from ..tables import aligned
from ..towers.media import Tower


def describe(model: str, ctx: int | None, batch: int, device: str, weights: str | None = None) -> dict:
    """The object of `info --json`. Raises UserError for a context that the model does not have or a batch below 1."""
    folder = resolve(model, weights=False)
    config, ops = with_weights(Config.from_folder(folder), weights), backend(device)
    context = config.max_context if ctx is None else ctx
    if not 1 <= context <= config.max_context:
        raise UserError(f"--ctx {ctx} is out of range; {config.limit}")
    if batch < 1:
        raise UserError(f"--batch {batch} is out of range; it must be at least 1")
    weight_bytes, free = ops.weight_bytes(config), ops.free_bytes()
    schemes = []
    for name, scheme in SCHEMES.items():
        try:
            check_scheme(config, scheme)
        except UserError:
            continue  # its head_dim has no such scheme
        many = 64 * WINDOW  # the slope: bytes that one more token costs, the window and the sinks aside
        per_token = (cache_bytes(config, scheme, 1, 2 * many) - cache_bytes(config, scheme, 1, many)) / many
        schemes.append(
            {
                "kv": name,
                "bits_per_element": scheme.bits_per_element(config.head_dim),
                "bytes_per_token": per_token,
                "cache_bytes": cache_bytes(config, scheme, batch, context),
                "ratio_to_bf16": cache_bytes(
                    config, SCHEMES["bf16"], batch, context
                ) / cache_bytes(config, scheme, batch, context),
                "longest_context": longest_context(
                    config, scheme, ops, batch, free - bytes_with_tables(config, scheme, ops)
                ),
            }
        )
    return {
        "model": model,
        "folder": str(folder),
        "model_type": config.model_type,
        "parameters": config.parameters(),
        "active_parameters": config.parameters(active=True),
        "experts": None if config.experts is None else asdict(config.experts),
        "towers": {kind: _tower(tower) for kind, tower in config.towers.items()},
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "q_heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope": config.rope.type,
        "max_positions": config.max_positions,
        "sliding_window": config.window,
        "device": ops.name,
        "weights": kept_as(config),
        "weight_bytes": weight_bytes,
        "work_bytes": ops.work_bytes(config, context, context),
        "free_bytes": free,
        "context": context,
        "batch": batch,
        "schemes": schemes,
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
    words |= {name: size(report[f"{key}_bytes"]) for name, key in SIZES.items()}
    lines = [
        "{model}: {model_type}, {parameters:,} parameters{active}, {layers} layers, hidden {hidden_size}, mlp "
        "{intermediate_size}{experts}",
        "attention: {q_heads} q heads, {kv_heads} kv heads, head_dim {head_dim}",
        *(f"{kind}s: {_by(of)}" for kind, of in report["towers"].items()),
        "positions: {max_positions}{window}, rope {rope}; vocabulary {vocab_size}",
        "on {device}: weights {size} ({weights}), reading a prompt of {context} tokens takes {work} more; {free} free",
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
