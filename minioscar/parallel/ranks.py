"""An array of each card under one name, and the functions of NumPy or CuPy that make such arrays.

What only asks for shapes, takes slices or hands arrays to a kernel works on `Ranks` as it does on one array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ..quantized import Quantized

Array = Any


class Ranks:
    """values[r]: of card r, its array, a scalar, or None; arrays have one shape. split: of a matrix (shares.py)."""

    def __init__(self, values: Sequence[Any], split: str | None = None):
        self.values, self.split = tuple(values), split

    @property
    def first(self) -> Array:
        """One that is there: all have its shape and dtype."""
        return next(value for value in self.values if value is not None)

    shape = property(lambda self: self.first.shape)
    dtype = property(lambda self: self.first.dtype)
    ndim = property(lambda self: self.first.ndim)
    size = property(lambda self: self.first.size)
    strides = property(lambda self: self.first.strides)

    @property
    def nbytes(self) -> int:
        """Of all cards."""
        return sum(value.nbytes for value in self.values if value is not None)

    def map(self, change: Callable[..., Any], *args: Any) -> Ranks:
        """`change` of each card's array, on its card, with the card's own of the other arguments."""
        changed = []
        for rank, value in enumerate(self.values):
            with device_of(value):
                changed.append(None if value is None else change(value, *of_rank(args, rank)))
        return Ranks(changed)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, key: Any) -> Ranks:
        return self.map(lambda x, key: x[key], key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.map(lambda x, key, value: x.__setitem__(key, value), key, value)

    def __getattr__(self, name: str) -> Callable[..., Ranks]:
        """A method of the arrays: reshape, astype, copy, ..."""
        if name.startswith("_") or not callable(getattr(self.first, name)):
            raise AttributeError(name)
        return lambda *args, **options: self.map(lambda x, *own: getattr(x, name)(*own, **options), *args)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The first card's: of what all cards have alike."""
        return np.array(self.values[0], dtype)


def device_of(value: Any) -> AbstractContextManager:
    """The card of a CuPy array as the current one; nothing for others."""
    device = getattr(value, "device", None)
    return device if hasattr(device, "__enter__") else nullcontext()


def of_rank(x: Any, rank: int) -> Any:
    """What card `rank` has of an argument: within tuples, lists and dicts, too."""
    if isinstance(x, Ranks):
        return x.values[rank]
    if isinstance(x, Quantized):
        return x.map(lambda array: of_rank(array, rank))
    if isinstance(x, dict):
        return {name: of_rank(value, rank) for name, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(of_rank(value, rank) for value in x))
    return type(x)(of_rank(value, rank) for value in x) if type(x) in (tuple, list) else x


class Namespace:
    """NumPy or CuPy whose functions make an array on each card. xp: of each card; on: makes a card the current one."""

    def __init__(self, xp: Sequence[Any], on: Callable[[int], AbstractContextManager]):
        self._xp, self._on = xp, on

    def __getattr__(self, name: str) -> Any:
        functions = [getattr(xp, name) for xp in self._xp]
        if isinstance(functions[0], type) or not callable(functions[0]):
            return functions[0]  # a dtype, a module

        def on_each(*args: Any, **options: Any) -> Ranks:
            made = []
            for rank, function in enumerate(functions):
                with self._on(rank):
                    made.append(function(*of_rank(args, rank), **of_rank(options, rank)))
            return Ranks(made)

        return on_each
