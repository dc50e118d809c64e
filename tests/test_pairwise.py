"""What is left of a grid still has every pair."""

from __future__ import annotations

from itertools import product

import pytest

from .kernel_device import CUDA, SIMT, on_each_device_of, on_each_device_over
from .pairwise import pairwise, switches
from .test_linear import GROUPS, PARTS, has_both


def test_every_value_meets_every_value_of_another_axis_where_it_can():
    axes = ["abcd", range(5), (True, False)]

    def possible(letter: str, number: int, flag: bool) -> bool:
        return not (letter == "b" and flag) and number != 4

    chosen = pairwise(axes, [None] * 3, possible)
    every = [point for point in product(*axes) if possible(*point)]
    assert set(chosen) <= set(every) and len(chosen) < 0.7 * len(every) and chosen == sorted(chosen, key=every.index)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(p[i], p[j]) for p in chosen} == {(p[i], p[j]) for p in every}


def test_every_switch_of_a_product_is_on_and_off_with_every_shape_and_all_sets_of_switches_are_left():
    chosen = pairwise([GROUPS, PARTS], [None, switches], has_both)
    met = {(shape, switch) for shape, parts in chosen for switch in switches(parts)}
    assert met == {(s, switch) for s in GROUPS for p in PARTS if has_both(s, p) for switch in switches(p)}
    assert all(any(parts is p for _, parts in chosen) for p in PARTS)


@pytest.mark.parametrize("values", [3, 5])
def test_a_card_takes_the_whole_grid(values):
    mark = on_each_device_over(a=range(values), b=range(values), c=range(values))
    devices = [parameter.values[0] for parameter in mark.args[1]]
    assert devices.count(CUDA.values[0]) == values**3 and values**2 <= devices.count(SIMT.values[0]) < values**3


def test_of_listed_points_those_are_simulated_that_show_every_trait_and_a_card_takes_all():
    points = [(1, "a"), (1, "b"), (2, "b"), (3, "a")]
    mark = on_each_device_of(("number", "letter"), points, lambda number, letter: [number > 1, letter])
    on_card, simulated = (
        [p.values[1:] for p in mark.args[1] if p.values[0] is device.values[0]] for device in (CUDA, SIMT)
    )
    assert mark.args[0] == ("device", "number", "letter") and on_card == points
    assert simulated == [(1, "a"), (2, "b")]
