"""JSON as RFC 8259 has it: Python's own module also reads and writes NaN and Infinity, which other programs refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from . import foreign


def loads(text: str | bytes) -> Any:
    """The value. Raises ValueError, with the path of the field, for a number that is NaN or infinite (1e999 is)."""
    odd: list[str] = []

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            odd.append(digits)
        return value

    value = json.loads(text, parse_float=real, parse_constant=real)
    if odd:  # a prompt of many numbers is not gone through again
        check(value)
    return value


def check(value: Any) -> None:
    """Raises what `loads` raises for a value that Python's own module has read."""
    for path, number in _not_finite(value):
        raise ValueError(f"{' '.join(path.split())[:80] or 'the number'} is {number}, which JSON does not have")


def dumps(value: Any, **options: Any) -> str:
    """The text of a result. A number that is NaN or infinite, such as a perplexity that overflows, becomes null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _not_finite(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{path}[{i}]")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_object(path: Path, why: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError, with `why` the file is needed, if it is missing or is not one."""
    try:
        value = loads(path.read_bytes())  # with a byte order mark, or in UTF-16, too
    except FileNotFoundError:
        raise UserError(f"{path} {foreign.GONE if path.is_symlink() else f'does not exist; {why}'}") from None
    except (OSError, ValueError, RecursionError) as error:
        if found := foreign.content(path):
            raise UserError(f"{path} cannot be read as JSON: it is {found}") from None
        raise UserError(f"{path} cannot be read as JSON ({one_line(error)}); fetch the model again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch the model again")
    return value
