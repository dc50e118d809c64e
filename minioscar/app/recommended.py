"""The sampling that a model's authors recommend: its generation_config.json, read as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..sampling import Sampling
from ..storage import strict_json
from ..storage.files import read_text

FILE = "generation_config.json"
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
IMPLIED = {"temperature": 1.0, "top_k": 50}  # transformers' own, where do_sample is true and they are not named


def recommended(folder: Path, given: dict[str, Any]) -> tuple[Sampling, list[str]]:
    """Sampling with what is given, else what the model's folder says; and lines about what was taken from it, or not.

    Without "do_sample": true the model is greedy unless a temperature is given. temperature 0 takes nothing from the
    file, not even a repetition penalty. A value that cannot be is said and left out: no run is stopped by it.
    """
    if given.get("temperature") == 0 or not (folder / FILE).is_file():
        return Sampling(**given), []
    found, lines = _read(folder)
    found = {name: value for name, value in found.items() if name not in given}
    if not (found | given).get("temperature"):  # greedy: nothing is drawn
        found = {name: value for name, value in found.items() if name == "repetition_penalty"}
    found = {name: value for name, value in found.items() if value != getattr(Sampling(), name)}
    if found:
        said = ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in found.items())
        lines.append(f"sampling: {said} from {FILE}; --temperature 0 is greedy")
    return Sampling(**found | given), lines


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The fields of the file that Sampling takes, and a line for each that it does not."""
    try:
        config = strict_json.loads(read_text(str(folder / FILE)))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (UserError, ValueError, RecursionError) as error:
        return {}, [f"{FILE} is left out: {one_line(error)}"]
    found, wrong = {}, []
    for name in FIELDS:
        try:
            if config.get(name) is not None and Sampling(**{name: config[name]}):
                found[name] = config[name]
        except UserError as error:
            wrong.append(f"{FILE}: {error}; left out")
    if config.get("do_sample") is True:
        return {name: (IMPLIED | found)[name] for name in FIELDS if name in IMPLIED | found}, wrong
    if config.get("do_sample") not in (None, False):
        wrong.append(f"{FILE}: do_sample {str(config['do_sample'])[:40]!r} must be true or false; left out")
    return {name: value for name, value in found.items() if name != "temperature"}, wrong
