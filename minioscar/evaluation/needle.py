"""Passkey retrieval: five digits hidden in a long text, asked for through the quantized cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cache import Cache
from ..engine import Engine
from ..errors import UserError
from ..oscar import WINDOW
from ..tables import markdown
from .teacher_forcing import Done, next_flush

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
HIDDEN, QUESTION = "\n\nNote: the secret passkey is {}.\n\n", "\n\nNote: the secret passkey is"
ANSWER_TOKENS = 8
REPEATS = 2  # passkeys at each length and depth
MARGIN = 64  # positions beyond a haystack, for question and answer
# More than any scheme keeps as sinks, and in its window.
FIRST, LAST = WINDOW, 2 * WINDOW
SHORTEST = FIRST + LAST + 1


@dataclass(frozen=True)
class Trial:
    length: int  # tokens of the haystack, the needle among them
    depth: float  # `plant`
    passkey: str


def trials(lengths: Sequence[int], depths: Sequence[float], repeats: int) -> list[Trial]:
    """Every length, depth and repeat with five digits of its own, the same in every run."""
    rng = np.random.default_rng(0)
    return [Trial(n, d, str(rng.integers(10_000, 100_000))) for n in lengths for d in depths for _ in range(repeats)]


def plant(haystack: Sequence[int], needle: Sequence[int], length: int, depth: float) -> list[int]:
    """`length` tokens: the haystack's first, with the needle put in at `depth`. Raises UserError without room.

    Depth 0 begins after FIRST tokens, which a scheme may keep in BF16 as sinks, and depth 1 ends before the LAST, which
    it may still have in its window: at every depth the needle is read from the packed part.
    """
    room = length - FIRST - LAST - len(needle)
    if room < 0:
        raise UserError(f"{length} tokens are too few to hide a text in their packed part; use {length - room}")
    at = FIRST + round(depth * room)
    return [*haystack[:at], *needle, *haystack[at : length - len(needle)]]


def retrieved(answer: str, passkey: str) -> bool:
    """Whether the first number in the answer is the passkey, digit for digit."""
    found = re.search(r"\d+", answer)
    return found is not None and found[0] == passkey


def ask(engine: Engine, haystack: Sequence[int], question: Sequence[int], done: Done = lambda tokens: None) -> str:
    """The greedy answer. The haystack is prefilled; the question comes after, so that it sees the needle as the cache
    kept it."""
    feed = np.array(question)
    cache = Cache(engine.config, engine.scheme, 1, len(haystack) + len(feed) + ANSWER_TOKENS, engine.ops)
    engine.model.forward(np.array(haystack), cache, cache.batch_for([0], [len(haystack)]))
    done(len(haystack))
    tokens: list[int] = []
    while len(tokens) < ANSWER_TOKENS:
        # a longer one would attend past a flush
        chunk, feed = np.split(feed, [next_flush(cache) - int(cache.lengths[0])])
        token = engine.model.step(chunk, cache, cache.batch_for([0], [len(chunk)]))[0]
        if not len(feed):
            tokens += token.tolist()
            feed = token
    return engine.tokenizer.decode(tokens)


def needle(
    engines: Sequence[Engine], haystack: Sequence[int], lengths: Sequence[int], done: Done = lambda tokens: None
) -> dict:
    """The object `needle` of `eval --json`: the share of passkeys found, per scheme, overall and for each length and
    depth.

    lengths are rounded up to whole blocks of WINDOW tokens.
    """
    lengths = blocks(lengths)
    cases, encode = trials(lengths, DEPTHS, REPEATS), engines[0].tokenizer.encode
    texts = [plant(haystack, encode(HIDDEN.format(case.passkey)), case.length, case.depth) for case in cases]
    rows = []
    for engine in engines:
        hits = [
            retrieved(ask(engine, text, encode(QUESTION), done), case.passkey)
            for case, text in zip(cases, texts, strict=True)
        ]
        found = np.array(hits).reshape(len(lengths), len(DEPTHS), REPEATS).mean(axis=2)
        rows.append(
            {"kv": engine.scheme.name, "exact_match": float(found.mean()), "by_length_and_depth": found.tolist()}
        )
    return {"lengths": lengths, "depths": list(DEPTHS), "repeats": REPEATS, "results": rows}


def blocks(lengths: Sequence[int]) -> list[int]:
    """Each length rounded up to whole blocks of WINDOW tokens, once, in order."""
    return sorted({-(-n // WINDOW) * WINDOW for n in lengths})


def cost(engines: Sequence[Engine], lengths: Sequence[int]) -> int:
    """Tokens that `needle` will prefill, for a progress bar."""
    return len(engines) * len(DEPTHS) * REPEATS * sum(blocks(lengths))


def table(report: dict) -> str:
    """The report as a Markdown table: a column a length, over all depths."""
    lengths, each, rows = report["lengths"], len(report["depths"]) * report["repeats"], []
    for row in report["results"]:
        shares = [float(np.mean(depths)) for depths in row["by_length_and_depth"]]
        rows.append([row["kv"], *(f"{share:.0%}" for share in [*shares, row["exact_match"]])])
    title = f"Passkeys found, of {each} at each length ({len(report['depths'])} depths)."
    return "\n".join([title, "", *markdown(["kv", *(f"{n:,} tokens" for n in lengths), "all"], rows)])
