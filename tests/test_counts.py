"""The code stays within the limits of tools/counts.py, and imports point down."""

from __future__ import annotations

import ast

from tools import counts


def test_nothing_is_longer_or_wider_than_its_limit():
    assert not [count for count in counts.counts() if count.found > count.limit]


def test_no_import_points_up_and_there_is_no_circle():
    graph = counts.imports()
    assert not counts.rising(graph) and not counts.circle(graph)
    assert {"engine", "oscar", "ops.reference", "app.cli", "evaluation.fidelity"} <= set(graph)
    # one is imported from .., one for types only
    assert "oscar" in graph["ops.reference"] and "app.conversation" in graph[""]


def test_what_points_up_or_in_a_circle_is_found():
    assert counts.rising({"errors": {"engine"}, "engine": {"errors"}}) == ["errors -> engine"]
    assert counts.rising({"ops.cuda": {"model"}, "ops.decode": {"ops.cuda", "tests.simt"}}) == [
        "ops.cuda -> model", "ops.decode -> tests.simt",
    ]
    assert counts.circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert counts.circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_parameters_are_counted_without_self():
    count = lambda code: counts.parameters(ast.parse(code).body[0])  # noqa: E731
    assert count("def f(self, a, /, b, *c, d=1, **e): ...") == 5
    assert count("def f(): ...") == 0 and count("def f(*, a): ...") == 1
