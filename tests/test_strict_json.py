"""JSON that every other program reads: NaN and infinities are neither written nor taken."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest

import minioscar
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.evaluation import fidelity
from minioscar.oscar import SCHEMES
from minioscar.storage import strict_json

from .tiny import CONFIG, write_model

NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"]
PATHS = {"{}": "the number", '{{"a": {}}}': "a", '{{"a": [0, {{"b": {}}}]}}': r"a\[1\].b", "[[{}]]": r"\[0\]\[0\]"}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("text", "path"), PATHS.items())
def test_numbers_that_json_does_not_have_are_refused_by_the_path_of_their_field(text, path, number):
    with pytest.raises(ValueError, match=f"{path} is -?(nan|inf), which JSON does not have"):
        strict_json.loads(text.format(number))


@pytest.mark.parametrize("text", ['{"a": [1e308, -0.0, 5e-324, 12345678901234567890123, null, true, "NaN"]}', '"x"'])
def test_everything_else_is_as_python_reads_it(text):
    assert strict_json.loads(text) == json.loads(text) == json.loads(strict_json.dumps(json.loads(text)))


@pytest.mark.parametrize("text", ["", "{", "[1,]", "nan", "{'a': 1}", "[" * 100_000])
def test_what_is_no_json_is_an_error_that_readers_know(text):
    with pytest.raises((ValueError, RecursionError)):
        strict_json.loads(text)


def test_results_that_are_not_finite_become_null():
    value = {"a": float("nan"), "b": [1.5, float("inf"), {"c": (np.float64("-inf"), 2)}]}
    assert json.loads(strict_json.dumps(value)) == {"a": None, "b": [1.5, None, {"c": [None, 2]}]}


def test_a_perplexity_that_overflows_is_null():
    scores = np.array([[800.0, 0.1, 1.0]])
    row = fidelity.summary(SCHEMES["int2"], 64, scores, scores)
    assert row.ppl == float("inf") and json.loads(strict_json.dumps(vars(row)))["ppl"] is None


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "hidden_size", "initializer_range", "rope_scaling"])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_config_with_such_a_number_is_refused_by_its_name(tmp_path, key, number):
    folder = write_model(tmp_path / "m", 1)
    raw = json.dumps({**CONFIG, key: {"factor": "HERE"} if key == "rope_scaling" else "HERE"})
    (folder / "config.json").write_text(raw.replace('"HERE"', number))
    with pytest.raises(UserError, match=f"config.json.*{key}.* is -?(nan|inf)") as error:
        Config.from_folder(folder)
    assert "\n" not in str(error.value)


def test_no_other_module_reads_or_writes_json_by_itself():
    """But for a header that the safetensors library has read before, and writers that say allow_nan=False."""
    for path in Path(minioscar.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import) and node.names[0].name == "json"]
        if path.name == "strict_json.py" or not imports:
            continue
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        for call in (call for call in calls if ast.unparse(call.func) in ("json.loads", "json.dumps")):
            strict = any(keyword.arg == "allow_nan" for keyword in call.keywords)
            assert strict or path.name in ("checkpoint.py", "prompts.py"), f"{path.name}: {ast.unparse(call)}"
