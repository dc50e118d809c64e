"""The rope options of a config.json, in the spellings of all years -> Rope."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..rope import Rope

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
TOP = "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"  # may stand at config.json's top, too
OPTIONS = {  # of all types; one that its type does not have changes nothing, as in transformers
    *TOP, "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "finetuned",
    "mrope_section", "mrope_interleaved", "interleaved",
}  # fmt: skip


def read_rope(raw: Mapping[str, Any], head_dim: int, max_positions: int, source: str) -> Rope:
    """By the options of a config.json (`_options`); max_positions: max_position_embeddings. Raises UserError."""
    fields = _options(raw, source)
    kind = fields.get("rope_type") or "default"
    if kind not in ROPE_TYPES:
        raise UserError(f"{source}: rope type {kind!r} is not supported; minioscar has {', '.join(ROPE_TYPES)}")
    if (fields.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(
            f"{source}: partial_rotary_factor {fields['partial_rotary_factor']!r} is not supported; only 1.0 is"
        )

    def number(key: str, default: float | None = None, least: float = 0) -> float:
        value = fields.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise UserError(
                f"{source}: rope option {key} of type {kind!r} must be a positive number, not {value!r}"
            )
        if value < least:
            raise UserError(f"{source}: rope option {key} {value!r} is not supported; it must be at least {least}")
        return float(value)

    theta = number("rope_theta", 10000.0, least=1.001)  # angles fall from channel to channel
    if kind == "default":
        return Rope(kind, theta, head_dim, max_positions, max_positions)
    original = int(number("original_max_position_embeddings", max_positions, least=1))
    # a factor of null is the ratio of the two lengths
    factor = number("factor", max_positions / original if kind == "yarn" and "factor" in fields else None)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise UserError(f"{source}: rope option low_freq_factor {low} must be below high_freq_factor {high}")
        return Rope(kind, theta, head_dim, max_positions, original, factor, low, high)
    # max_position_embeddings may be the scaled length already
    reach = min(max(max_positions, int(factor * original)), 2**31)
    if kind == "linear":
        return Rope(kind, theta, head_dim, reach, original, factor)
    if fields.get("attention_factor") is not None:
        attention = number("attention_factor")
    elif fields.get("mscale") and fields.get("mscale_all_dim"):
        attention = _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim"))
    else:
        attention = _mscale(factor)
    truncate = fields.get("truncate", True)
    if not isinstance(truncate, bool | None):
        raise UserError(f"{source}: rope option truncate must be true or false, not {truncate!r}")
    betas = {"beta_fast": number("beta_fast", 32.0), "beta_slow": number("beta_slow", 1.0)}
    rest = {**betas, "attention_factor": attention, "truncate": bool(truncate)}
    return Rope(kind, theta, head_dim, reach, original, factor, **rest)


def with_axes(rope: Rope, raw: Mapping[str, Any], source: str) -> Rope:
    """The same with interleaved M-RoPE (Qwen3-VL): pairs of the second and third section stand at every third place
    from 1 and 2 on, the others are of the first. Raises UserError for other kinds."""
    fields, half = _options(raw, source), rope.head_dim // 2
    section = fields.get("mrope_section")
    numbers = isinstance(section, list) and len(section) == 3 and all(type(n) is int and n >= 0 for n in section)
    if not numbers or sum(section) != half or max(section[1:]) * 3 > half + 2:
        why = f"must be three numbers whose sum is {half}, half of head_dim"
        raise UserError(f"{source}: rope option mrope_section {section!r} {why}")
    if not (fields.get("mrope_interleaved") or fields.get("interleaved")):
        raise UserError(f"{source}: rope option mrope_interleaved must be true; M-RoPE in chunks is not supported")
    axes = [0] * half
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = [axis] * len(range(axis, min(3 * section[axis], half), 3))
    return replace(rope, axes=tuple(axes))


def _options(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The rope options of a config.json from all places that have any: `rope_parameters` (transformers 5),
    `rope_scaling` and the top (before). `type` is the old name of `rope_type`.

    Raises UserError where two places say different things; a type in one goes before `default` in the other.
    """
    merged: dict[str, Any] = {}
    said: dict[str, str] = {}  # where an option that is not null stands

    def add(key: str, value: Any, place: str) -> None:
        if merged.get(key) is None:
            merged[key] = value
            said[key] = place
        elif value is not None and value != merged[key]:
            raise UserError(f"{source}: {said[key]} is {merged[key]!r}, but {place} is {value!r}; delete one of them")

    types = {}
    for name in ("rope_parameters", "rope_scaling"):
        fields = raw.get(name)
        fields = {} if fields is None else fields
        if not isinstance(fields, Mapping):
            raise UserError(f"{source}: {name} must be an object, not {fields!r}")
        nested = [key for key, value in fields.items() if isinstance(value, Mapping)]
        if nested:
            kinds = f"{name} per layer type ({', '.join(nested)})"
            raise UserError(f"{source}: {kinds} is not supported; one set for all layers is")
        for key, value in fields.items():
            place = f"{name}.{key}"
            if key in ("rope_type", "type"):
                if value is not None and types.setdefault(name, value) != value:
                    both = f"rope_type {fields['rope_type']!r} and type {fields['type']!r}"
                    raise UserError(f"{source}: {name} has {both}; delete one of them")
            elif key not in OPTIONS and value is not None:
                why = "is not known; if it changes nothing, delete it"
                raise UserError(f"{source}: rope option {place} {value!r} {why}")
            else:
                add(key, value, place)
    for key in TOP:
        add(key, raw.get(key), f"{key} at the top")
    for name, value in types.items():
        if value != "default":
            add("rope_type", value, f"{name}.rope_type")
    factor = merged.get("factor")
    if merged.get("rope_type") is None and factor not in (None, 1) and said["factor"].split(".")[0] not in types:
        why = f"{said['factor']} {factor!r} has no rope_type beside it"
        raise UserError(f"{source}: {why}; add one of {', '.join(ROPE_TYPES)}")
    return merged


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
