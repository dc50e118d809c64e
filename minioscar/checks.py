"""What a user gives as a number, a switch or a path is one; else a UserError that names it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError, shown

# what Python takes for sequences of characters or numbers, and no user means as one
TEXT = str | bytes | bytearray | memoryview


def number(name: str, value: Any, good: Callable[[float], bool], want: str) -> float:
    """The value as a float. Raises UserError, which names it, for another type (bool, text) and where it is not good;
    NaN never is."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise UserError(f"{name} {shown(value)} is not a number; it must be {want}")
    try:
        found = float(value)
    except OverflowError:  # an int may be larger than any float
        found = math.inf if value > 0 else -math.inf
    if math.isnan(found) or not good(found):
        raise UserError(f"{name} {shown(value)} is out of range; it must be {want}")
    return found


def whole(name: str, value: Any, good: Callable[[int], bool], want: str) -> int:
    """The same for whole numbers, Python's and NumPy's, as an int."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name} {shown(value)} is not a whole number; it must be {want}")
    if not good(int(value)):
        raise UserError(f"{name} {shown(value)} is out of range; it must be {want}")
    return int(value)


def flag(name: str, value: Any) -> bool | None:
    """True, False or None. Raises UserError for anything else."""
    if value is not None and not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} {shown(value)} must be True, False or None")
    return None if value is None else bool(value)


def as_path(name: str, value: Any) -> Path:
    """Raises UserError for what is no path."""
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str) or not path or "\0" in path:
        raise UserError(f"{name} {shown(value)} must be text or a path")
    return Path(path)
