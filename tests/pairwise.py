"""Which points of a grid are enough to see every pair: a fault that needs three things at once is left to the card,
which takes the whole grid (`kernel_device.on_each_device_over`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import fields
from itertools import combinations, product
from typing import Any, TypeVar

from minioscar.oscar import Scheme

Traits = Callable[[Any], Sequence[Hashable]]
Point = TypeVar("Point")


def pairwise(
    axes: Sequence[Sequence[Any]], traits: Sequence[Traits | None], possible: Callable[..., bool]
) -> list[tuple]:
    """Points of the product of `axes`, in its order: every value occurs in one of them, and every trait of an axis
    meets every trait of every other axis in one, where a possible point has both.

    traits: of each axis, what a test may depend on of a value of it (None: the value itself is one trait).
    """
    points = [point for point in product(*(range(len(axis)) for axis in axes)) if possible(*values(axes, point))]
    return [values(axes, point) for point in covering(points, lambda point: _met(axes, traits, point))]


def covering(points: Sequence[Point], traits: Callable[[Point], Iterable[Hashable]]) -> list[Point]:
    """Some of the points, in their order, of which one at least has each trait that any of the points has."""
    met = [set(traits(point)) for point in points]
    missing = set().union(*met)
    chosen = []
    while missing:
        best = max(range(len(points)), key=lambda i: len(met[i] & missing))  # of equal ones the first
        chosen.append(best)
        missing -= met[best]
    return [points[i] for i in sorted(chosen)]


def values(axes: Sequence[Sequence[Any]], point: Sequence[int]) -> tuple:
    return tuple(axis[i] for axis, i in zip(axes, point, strict=True))


def _met(axes: Sequence[Sequence[Any]], traits: Sequence[Traits | None], point: Sequence[int]) -> set[Hashable]:
    own = [
        [(axis, i)] if of is None else [(axis, trait) for trait in of(axes[axis][i])]
        for axis, (i, of) in enumerate(zip(point, traits, strict=True))
    ]
    pairs = {pair for a, b in combinations(own, 2) for pair in product(a, b)}
    return pairs | {("value", axis, i) for axis, i in enumerate(point)}


def switches(parts: dict[str, bool]) -> list[tuple[str, bool]]:
    """Traits of what stands before and behind a product: each switch on or off, whatever the others are."""
    return [(name, parts.get(name, False)) for name in ("norm", "bias", "residual", "silu", "float32")]


TOGETHER = ("key_bits", "value_bits"), ("group", "max_value_group"), ("sinks", "flush", "keep")


def scheme_traits(scheme: Scheme) -> list[tuple]:
    """Traits of a scheme: each of its fields, but those together that lay out a page or a row."""
    alone = {field.name for field in fields(scheme)} - {"name"} - set(sum(TOGETHER, ()))
    return [(of, *(getattr(scheme, name) for name in of)) for of in (*TOGETHER, *((name,) for name in sorted(alone)))]
