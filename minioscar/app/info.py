"""What a model is and what its cache costs, from config.json alone: no weights are loaded."""

from __future__ import annotations

from ..cache import cache_bytes
from ..config import Config
from ..errors import UserError
from ..memory import longest_context, size
from ..model import check_scheme
from ..ops import backend
from ..oscar import SCHEMES, WINDOW
from ..storage.hub import resolve


def describe(model: str, ctx: int | None, batch: int, device: str) -> dict:
    """The object of `info --json`. Raises UserError for a context that the model does not have or a batch below 1."""
    folder = resolve(model, weights=False)
    config, ops = Config.from_folder(folder), backend(device)
    context = config.max_context if ctx is None else ctx
    if not 1 <= context <= config.max_context:
        raise UserError(f"--ctx {ctx} is out of range; {config.limit}")
    if batch < 1:
        raise UserError(f"--batch {batch} is out of range; it must be at least 1")
    weights, free = config.parameters() * ops.dtype.itemsize, ops.free_bytes()
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
                "ratio_to_bf16": cache_bytes(config, SCHEMES["bf16"], batch, context) / cache_bytes(config, scheme, batch, context),
                "longest_context": longest_context(config, scheme, ops, batch, free - weights),
            }
        )
    return {
        "model": model,
        "folder": str(folder),
        "model_type": config.model_type,
        "parameters": config.parameters(),
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
        "weight_bytes": weights,
        "work_bytes": ops.work_bytes(config, context, context),
        "free_bytes": free,
        "context": context,
        "batch": batch,
        "schemes": schemes,
    }


def text(report: dict) -> str:
    """The report for people."""
    window = report["sliding_window"]
    window = "" if window is None else f", sliding window {window}: no longer context runs"
    lines = [
        "{model}: {model_type}, {parameters:,} parameters, {layers} layers, hidden {hidden_size}, mlp {intermediate_size}".format(**report),
        "attention: {q_heads} q heads, {kv_heads} kv heads, head_dim {head_dim}".format(**report),
        "positions: {max_positions}{0}, rope {rope}; vocabulary {vocab_size}".format(window, **report),
        "on {device}: weights {0}, reading a prompt of {context} tokens takes {1} more; {2} free".format(
            *(size(report[key]) for key in ("weight_bytes", "work_bytes", "free_bytes")), **report
        ),
        "",
        "KV cache at context {context}, batch {batch}:".format(**report),
        f"{'kv':20}{'bits/element':>13}{'bytes/token':>13}{'cache':>12}{'vs bf16':>9}{'longest context that fits':>27}",
    ]
    for row in report["schemes"]:
        lines.append(
            "{kv:20}{bits_per_element:>13.3f}{bytes_per_token:>13.0f}{0:>9.1f} MB{ratio_to_bf16:>8.2f}x{longest_context:>27}".format(
                row["cache_bytes"] / 1e6, **row
            )
        )
    return "\n".join(lines)
