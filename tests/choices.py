"""Experts that kernels took, for NumPy to take them too: activations in BF16 choose others where two nearly tie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from minioscar.experts import reference
from minioscar.experts.plans import Product, Routes


class Choices:
    """What decides them, of every layer that kernels are launched for from now on: `Routes`, or of a few tokens the
    router's logits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch, self.made, self.gaps = monkeypatch, [], []
        allocate, launch = Routes.allocate, Product.launch

        def launched(product: Product, choices: Any, *others: Any) -> Any:
            if product.silu and not isinstance(choices, Routes):
                self.made.append(choices)
            return launch(product, choices, *others)

        monkeypatch.setattr(Routes, "allocate", lambda *given: self.made.append(allocate(*given)) or self.made[-1])
        monkeypatch.setattr(Product, "launch", launched)

    @contextmanager
    def taken(self, ops: Any, made: list[Any], error: float) -> Iterator[None]:
        """The reference takes in its next layers the choices of `made` as they are now, of its first tokens.

        Where it would have taken another, the two must nearly tie: logits of a router that are off by `error` of their
        size, as the model's are, change places.
        """
        of_layers = [np.array(ops.numpy(m.chosen if isinstance(m, Routes) else m)) for m in made]
        own_route, gaps = reference.route, []

        def route(logits: np.ndarray, experts: Any, xp: Any) -> tuple[np.ndarray, np.ndarray]:
            there = of_layers.pop(0)
            if there.ndim == 2:
                there = own_route(there, experts)[0]
            chosen = there.reshape(-1, experts.per_token)[: len(logits)]
            given, own = np.take_along_axis(logits, chosen, axis=1), -np.sort(-logits, axis=1)[:, : experts.per_token]
            gaps.append((own.min(axis=1) - given.min(axis=1)) / logits.std())
            summed = np.exp(given if experts.normalized else logits).sum(axis=1, keepdims=True)
            return chosen, np.exp(given) / summed

        with self.monkeypatch.context() as here:
            here.setattr(reference, "route", route)
            yield
        assert not of_layers
        if gaps:
            self.gaps = np.concatenate(gaps)
            print(f"{(self.gaps > 0).sum()} of {self.gaps.size} tokens differ, by {self.gaps.max():.3f}")
            assert self.gaps.max() < 2 * error


def gaps(monkeypatch: pytest.MonkeyPatch, forward: Any) -> np.ndarray:
    """How far the last expert that each token takes is from the next, in logits, while `forward()` runs on NumPy."""
    found, own_route = [], reference.route

    def route(logits: np.ndarray, experts: Any, xp: Any) -> tuple[np.ndarray, np.ndarray]:
        ordered = np.sort(logits, axis=1)
        found.append(ordered[:, -experts.per_token] - ordered[:, -experts.per_token - 1])
        return own_route(logits, experts)

    with monkeypatch.context() as here:
        here.setattr(reference, "route", route)
        forward()
    return np.min(found, axis=0)
