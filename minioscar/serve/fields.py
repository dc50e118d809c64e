"""Fields of a request's body, each of its type and within its bounds; else an ApiError that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import shown
from .errors import wrong

Body = Mapping[str, Any]


def switch(body: Body, name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, f"{name} {shown(value)} must be true or false")
    return default if value is None else value


def whole(body: Body, name: str, low: int, high: int, default: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, f"{name} {shown(value)} is not a whole number; it must be one from {low} to {high}")
    if not low <= value <= high:
        raise wrong(name, f"{name} {shown(value)} is out of range; it must be from {low} to {high}")
    return value


def number(body: Body, name: str) -> float | int | None:
    """A finite number; what else it must be, `Sampling` says."""
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or abs(value) > 1e30 or not math.isfinite(value):
        raise wrong(name, f"{name} {shown(value)} is not a number that can be used")
    return value


def text(body: Body, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(name, f"{name} {shown(value)} must be text")
    return value


def mapping(body: Body, name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise wrong(name, f"{name} {shown(value)} must be an object")
    return dict(value or {})


def items(body: Body, name: str, most: int) -> list[Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, list):
        raise wrong(name, f"{name} {shown(value)} must be a list")
    if value is not None and len(value) > most:
        raise wrong(name, f"{name} has {len(value)} entries; at most {most} can be")
    return value or []


def token_ids(value: Any, name: str, vocab: int) -> list[int]:
    if not isinstance(value, list) or not value:
        raise wrong(name, f"{name} must be a list of token ids, and not empty")
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) < vocab:  # thousands of them, mostly
        return value
    for i in value:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab:
            raise wrong(name, f"{name} has {shown(i)}, which is no token; this model's are 0 ... {vocab - 1}")
    return value
