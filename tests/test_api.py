"""`import minioscar` is the Python API: light, typed, and its examples are true."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import minioscar

ROOT = Path(minioscar.__file__).parents[1]


def test_the_examples_of_the_package_are_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(minioscar, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 10 and result.failed == 0


def test_importing_it_imports_nothing_heavy_and_every_name_is_there():
    code = (
        "import sys, minioscar; assert not {'numpy', 'tokenizers', 'cupy'} & set(sys.modules); "
        "print(*minioscar.__all__)"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"load", "Engine", "Conversation", "PromptCache", "Sampling", "UserError", "Failure"} <= set(names)
    for name in names:
        assert getattr(minioscar, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'pull'"):
        minioscar.pull  # noqa: B018


def test_the_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse(Path(minioscar.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.asname for node in block.body for alias in node.names} == set(minioscar._FROM)
    assert (Path(minioscar.__file__).parent / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", [name for name in minioscar.__all__ if name not in ("__version__", "SCHEMES")])
def test_everything_public_is_documented_and_typed(name):
    found = getattr(minioscar, name)
    functions = [found] if inspect.isfunction(found) else []
    if inspect.isclass(found):
        functions = [f for n, f in vars(found).items() if inspect.isfunction(f) and not n.startswith("_")]
        functions += [p.fget for n, p in vars(found).items() if isinstance(p, property) and not n.startswith("_")]
    assert found.__doc__
    for function in functions:
        hints = function.__annotations__
        missing = [p for p in inspect.signature(function).parameters if p not in ("self", "cls") and p not in hints]
        assert not missing and "return" in hints, f"{name}.{function.__name__} lacks types: {missing}"


def test_the_readmes_python_is_true(tmp_path):
    """Its blocks run one after the other, as a reader would type them."""
    text = (ROOT / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert blocks
    run = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "Paris" in run.stdout, run.stderr
