"""Tool calls copied from a long context: names and arguments as they stood there, read through the quantized cache.

A context is a text with a numbered call at one of DEPTHS, which is asked for by its number. The true answer is fed
whatever the model would say: a greedy answer is the true one if and only if each of its tokens is the likeliest after
the true ones before it. So nothing has to be generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import Engine
from ..storage import strict_json as json
from ..tables import markdown
from .needle import DEPTHS, blocks, plant
from .teacher_forcing import Done, teacher_forced

SEED, REPEATS = 0, 4  # calls at each length and depth
MARGIN = 128  # positions beyond a context, for question and answer
ASKED, AFTER = "\n\nTool call {}:", "\n\n"
CITIES = "Oslo", "Lagos", "Quito", "Hanoi", "Turin", "Perth", "Cairo", "Lima"
PEOPLE = "Ada", "Boris", "Chen", "Dalia", "Emre", "Fatou", "Grete", "Hugo"
TOOLS: dict[str, dict[str, Sequence[Any]]] = {
    "get_weather": {"city": CITIES, "days": range(1, 15), "unit": ("celsius", "fahrenheit")},
    "book_table": {"city": CITIES, "guests": range(1, 12), "name": PEOPLE},
    "send_money": {"to": PEOPLE, "amount": range(10, 1000), "currency": ("EUR", "USD", "JPY", "INR")},
    "set_alarm": {"hour": range(24), "minute": range(60), "label": ("work", "train", "bread", "call")},
    "find_flight": {"from": CITIES[:4], "to": CITIES[4:], "day": range(1, 29)},
    "add_reminder": {"person": PEOPLE, "topic": ("rent", "birthday", "report", "dentist"), "day": range(1, 29)},
}


@dataclass(frozen=True)
class Call:
    number: int
    name: str
    arguments: dict[str, Any]

    def tokens(self, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int], int]:
        """The question; the answer; how many tokens of it say the name."""
        answer = f' {json.dumps({"name": self.name, "arguments": self.arguments})}'
        named = answer[: answer.index(self.name) + len(self.name)]
        return encode(ASKED.format(self.number)), encode(answer), len(encode(named))


def calls(count: int) -> list[Call]:
    """The same in every run."""
    rng = np.random.default_rng(SEED)

    def call() -> Call:
        name = list(TOOLS)[rng.integers(len(TOOLS))]
        arguments = {key: values[int(rng.integers(len(values)))] for key, values in TOOLS[name].items()}
        return Call(int(rng.integers(1000, 10_000)), name, arguments)

    return [call() for _ in range(count)]


def copied(
    engine: Engine, context: Sequence[int], call: Call, done: Done = lambda tokens: None
) -> tuple[bool, bool]:
    """Is the call's name copied, and all of it? The context is prefilled; the question comes after."""
    question, answer, named = call.tokens(engine.tokenizer.encode)
    logits = teacher_forced(engine, [*context, *question, *answer], len(context), done)
    right = np.concatenate(list(logits))[-len(answer) :].argmax(axis=1) == answer
    return bool(right[:named].all()), bool(right.all())


def tool_calls(
    engines: Sequence[Engine], haystack: Sequence[int], lengths: Sequence[int], done: Done = lambda tokens: None
) -> dict:
    """The object `tools` of `eval --json`: the share of names, and of calls with all arguments, that are copied, for
    each scheme, length and depth. lengths: tokens of a context, rounded up to whole blocks of WINDOW."""
    lengths, encode, contexts, rows = blocks(lengths), engines[0].tokenizer.encode, [], []
    where = [(length, depth) for length in lengths for depth in DEPTHS for _ in range(REPEATS)]
    cases = calls(len(where))
    for call, (length, depth) in zip(cases, where, strict=True):
        question, answer, _ = call.tokens(encode)
        contexts.append(plant(haystack, [*question, *answer, *encode(AFTER)], length, depth))
    for engine in engines:
        found = np.array([copied(engine, *case, done) for case in zip(contexts, cases, strict=True)])
        found = found.reshape(len(lengths), len(DEPTHS), REPEATS, 2).mean(axis=2)
        names, exact = (found[..., i] for i in range(2))
        rows.append({
            "kv": engine.scheme.name, "names": float(names.mean()), "exact": float(exact.mean()),
            "names_by_length_and_depth": names.tolist(), "exact_by_length_and_depth": exact.tolist(),
        })  # fmt: skip
    return {"lengths": lengths, "depths": list(DEPTHS), "repeats": REPEATS, "seed": SEED, "results": rows}


def cost(engines: Sequence[Engine], lengths: Sequence[int]) -> int:
    """Tokens that `tool_calls` will send through models, nearly, for a progress bar."""
    return len(engines) * len(DEPTHS) * REPEATS * sum(n + MARGIN // 2 for n in blocks(lengths))


def table(report: dict) -> str:
    """The report as a Markdown table: a column a length, over all depths."""
    rows = []
    for row in report["results"]:
        names, exact = (
            [*map(np.mean, row[f"{what}_by_length_and_depth"]), row[what]] for what in ("names", "exact")
        )
        cells = (f"{name:.0%} / {all_of_it:.0%}" for name, all_of_it in zip(names, exact, strict=True))
        rows.append([row["kv"], *cells])
    each = len(report["depths"]) * report["repeats"]
    title = (
        f"Tool calls copied, of {each} at each length ({len(report['depths'])} depths, seed {report['seed']}): names / "
        "names and all arguments."
    )
    return "\n".join([title, "", *markdown(["kv", *(f"{n:,} tokens" for n in report["lengths"]), "all"], rows)])
