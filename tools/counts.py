"""Counts the code and draws its imports: what is above a limit, or points the wrong way, fails. `python -m
tools.counts`.

Lines are lines of files, comments and blank ones included. A limit may only be lowered.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minioscar"
# What somebody reads who follows a prompt to its tokens on BF16 weights. What only some models, files, cards or callers
# need has a package of its own (experts, quantized, towers, model_files, sm90, ...) or a file, which these mention in a
# line each: plans and work_bytes (how kernels share their work, and the bytes of it), rows (what is cut, copied and
# saved), joining (rows that come and go), penalties, answers (text of tokens), arguments (what a prompt may be).
READING = (
    "engine generation model cache layer_cache batch oscar config rope weights tokenizer sampling memory ops".split()
)

# A module imports modules of its own floor or of lower ones, never a higher one, not even for its types. From the top:
FLOORS = (
    ("", "__main__"),  # the package itself: what it exports
    ("app",),
    ("serve",),
    ("evaluation",),
    ("engine",),
    ("parallel",),
    ("generation", "prompt_cache", "arguments", "key_shaping", "attention_inputs", "nan_check"),
    ("model", "memory"),
    ("ops", "pages", "plans", "work_bytes", "joining", "sm90", "compilation", "experts.reference", "experts.plans")
    + ("experts.on_card", "quantized.plans", "quantized.on_card", "towers.on_card"),
    ("cache", "layer_cache", "rows", "weights", "quantized.weights", "decoding"),
    ("quantized", "staging"),
    ("config", "tokenizer", "model_files", "chat_template", "detokenizer", "sampling", "options", "answers")
    + ("experts",),
    ("oscar", "batch", "causal_attention", "dither", "error_feedback", "hadamard", "rope", "towers"),
    ("storage", "formats"),
    ("errors", "checks", "fields", "backend", "penalties", "tables", "machine", "version", "cublas"),
)


class Count(NamedTuple):
    what: str
    found: int
    where: str
    limit: int


def counts() -> list[Count]:
    package, tests = python("minioscar"), [*python("tests"), *python("benchmarks"), *python("tools"), ROOT / "bench.py"]
    reading = [path for path in package if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in READING]
    kernels = [path for path in (PACKAGE / "kernels").rglob("*") if path.suffix in (".cu", ".cuh")]
    general = [path for path in kernels if path.parent.name != "sm90"]
    return [
        Count("lines of the reading path", total(reading), f"{len(reading)} files", 3792),
        Count("lines of kernels outside sm90/", total(general), f"{len(general)} files", 5765),
        Count("lines of the package's Python", total(package), f"{len(package)} files", 24176),
        Count("longest file of the package", *longest(package), 400),
        Count("longest function of the package", *worst(package, length), 60),
        Count("most parameters in the package", *worst(package, parameters), 8),
        Count("longest line of the package", *widest(package), 120),
        Count("longest line of the kernels", *widest(kernels), 120),
        Count("longest function of the rest", *worst(tests, length), 60),
        Count("longest line of the rest", *widest(tests), 120),
    ]


def python(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def total(paths: list[Path]) -> int:
    return sum(len(lines(path)) for path in paths)


def longest(paths: list[Path]) -> tuple[int, str]:
    return max((len(lines(path)), path.name) for path in paths)


def widest(paths: list[Path]) -> tuple[int, str]:
    return max((len(line), f"{path.name}:{i}") for path in paths for i, line in enumerate(lines(path), 1))


def worst(paths: list[Path], measure) -> tuple[int, str]:
    """The largest of a measure of functions, and where."""
    trees = ((path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths)
    functions = ((path, node) for path, tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return max((measure(node), f"{path.name}:{node.name}") for path, node in functions)


def length(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def parameters(node: ast.FunctionDef) -> int:
    """self and cls are none; *args and **options are one each."""
    of = node.args
    names = [one.arg for one in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + (of.vararg is not None) + (of.kwarg is not None)


# --- imports


def imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, anywhere in its file. Names without `minioscar.`."""
    names = {module_name(path): path for path in python("minioscar")}
    return {name: set(imported(name, path, set(names))) - {name} for name, path in names.items()}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(name: str, path: Path, names: set[str]) -> Iterator[str]:
    inside = [*name.split("."), ""] if path.name == "__init__.py" else name.split(".")  # the last is the module itself
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["minioscar", *filter(None, inside[: len(inside) - node.level])] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            found = [(module, alias.name) for alias in node.names]
        else:
            continue
        for module, item in found:
            if module.partition(".")[0] in ("tests", "benchmarks", "tools"):
                yield module
            elif module.partition(".")[0] == "minioscar":
                module = module.partition(".")[2]
                both = f"{module}.{item}".strip(".")
                yield both if both in names else module


def floor(name: str) -> int:
    """Counted from the top: of the module itself, else of its package. Raises KeyError for one that has none."""
    floors = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    for room in (name, name.partition(".")[0]):
        if room in floors:
            return floors[room]
    raise KeyError(f"{name} has no floor in tools/counts.py")


def rising(graph: dict[str, set[str]]) -> list[str]:
    """Imports that point up, or out of the package."""
    known = {name for names in FLOORS for name in names}
    inside = {(a, b) for a, targets in graph.items() for b in targets}
    return sorted(f"{a} -> {b}" for a, b in inside if b.partition(".")[0] not in known or floor(b) < floor(a))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; none where there is none."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (walk(other, [*trail, name]) for other in sorted(graph.get(name, ())))), [])
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def main() -> int:
    from minioscar.tables import markdown

    found, graph = counts(), imports()
    rows = [[c.what, f"{c.found:,}", f"{c.limit:,}", c.where] for c in found]
    print(*markdown(["", "now", "limit", "where"], rows), sep="\n")
    arrows, wrong = sum(map(len, graph.values())), rising(graph)
    print(f"\n{len(graph)} modules, {arrows} imports; {'; '.join(wrong) or 'none points up'}")
    print(f"circle: {' -> '.join(circle(graph)) or 'none'}")
    return int(any(c.found > c.limit for c in found) or bool(wrong or circle(graph)))


if __name__ == "__main__":
    sys.exit(main())
