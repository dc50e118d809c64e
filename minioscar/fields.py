"""The fields of a JSON object that a model folder has, checked: errors name file and field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import UserError


class Fields:
    """Typed access to the fields of a config.json, with errors that name file and field."""

    def __init__(self, raw: Mapping[str, Any], source: str, defaults: Mapping[str, int]):
        self.raw, self.source, self.defaults = raw, source, defaults

    def count(self, key: str, default: int | None = None, most: int = 2**31) -> int:
        """default: of null, and of a missing key of which the family has none."""
        value = self.raw.get(key, self.defaults.get(key))
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise UserError(f"{self.source}: {key} must be a positive whole number, not {value!r}")
        if value > most:
            raise UserError(f"{self.source}: {key} {value} is not supported; it must be at most {most}")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{self.source}: {key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{self.source}: {key} must be true or false, not {value!r}")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.raw.get(key)
        value = [] if value is None else value
        if not isinstance(value, list):
            raise UserError(f"{self.source}: {key} must be a list, not {value!r}")
        return value

    def only(self, key: str, *supported: Any) -> None:
        value = self.raw.get(key)
        floats = all(isinstance(x, float) for x in (value, supported[0]))
        close = floats and math.isclose(value, supported[0], rel_tol=1e-6)
        if value is not None and value not in supported and not close:
            meant = [repr(s) for s in supported if s is not None] or ["null"]
            raise UserError(f"{self.source}: {key} {value!r} is not supported; only {' or '.join(meant)} is")
