"""Generation drift: how long a greedy continuation with a quantized cache stays what it is without one, and the KL
along the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..cache import Cache
from ..engine import Engine
from ..sampling import RowSampling
from ..tables import markdown
from .teacher_forcing import Done, divergence, log_softmax, teacher_forced

STRETCHES = 8  # of the continuation, for the KL along the way


@dataclass
class Drift:
    """One scheme over the windows of a text."""

    kv: str
    # per window: the first of the tokens 1, 2 ... that is another one; None if none is
    first_difference: list[int | None]
    same_tokens: float  # share of the positions at which the likeliest token is the unquantized run's
    kl: list[float]  # mean KL(unquantized || this) over each of STRETCHES equal parts of the continuation


def greedy(engine: Engine, ids: Sequence[int], count: int, done: Done) -> list[int]:
    """`count` tokens after ids, each the likeliest; an end token is a token like any other here."""
    cache = Cache(engine.config, engine.scheme, 1, len(ids) + count, engine.ops)
    tokens = engine.model.step(np.array(ids), cache, cache.batch_for([0], [len(ids)]))[0].tolist()
    done(len(ids))
    decoder = engine.ops.decoder(engine.model, cache, [RowSampling()])
    decoder.feed([0], tokens)
    while len(tokens) < count:
        decoder.launch([0])
        tokens += decoder.read()[0].tolist()
        done(1)
    return tokens


def drift(
    engines: Sequence[Engine], windows: Sequence[Sequence[int]], count: int, done: Done = lambda tokens: None
) -> dict:
    """The object `drift` of `eval --json`: engines[0], unquantized, continues each prompt, the others follow it.

    `count` tokens are compared, those after token 0, which comes out of the prefill and is the same in every scheme.
    Until its first different token, a scheme's own continuation and the unquantized one are the same; so feeding the
    latter to the scheme finds that token without generating twice, and past it still compares predictions from the same
    words.
    """
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in engines]
    for prompt in windows:
        # the first is the prefill's, which quantizes nothing
        ids = [*prompt, *greedy(engines[0], prompt, count + 1, done)]
        truth: np.ndarray | None = None
        for engine, runs in zip(engines, found, strict=True):
            ours = log_softmax(np.concatenate(list(teacher_forced(engine, ids, len(prompt), done))))
            truth = ours if truth is None else truth
            runs.append((divergence(truth, ours), ours.argmax(axis=1) == truth.argmax(axis=1)))
    rows = []
    for engine, runs in zip(engines, found, strict=True):
        kl, same = (np.array(part) for part in zip(*runs, strict=True))  # [windows, count]
        first = [None if row.all() else int(row.argmin()) + 1 for row in same]
        along = [float(part.mean()) for part in np.array_split(kl, min(STRETCHES, count), axis=1)]
        rows.append(asdict(Drift(engine.scheme.name, first, float(same.mean()), along)))
    return {"tokens": count, "results": rows}


def cost(engines: Sequence[Engine], windows: int, prompt: int, count: int) -> int:
    """Tokens that `drift` will send through models, for a progress bar."""
    return windows * (len(engines) + 1) * (prompt + count)


def table(report: dict) -> str:
    """The report as a Markdown table."""
    count, results, rows = report["tokens"], report["results"], []
    parts = len(results[0]["kl"])
    stretches = [f"KL {count * i // parts}–{count * (i + 1) // parts}" for i in range(parts)]
    for row in results:
        first = float(np.median([count if n is None else n for n in row["first_difference"]]))
        first = f"{first:.0f}" if first < count else f"none in {count}"
        rows.append([row["kv"], first, f"{row['same_tokens']:.3f}", *(f"{kl:.4f}" for kl in row["kl"])])
    title = (
        f"Greedy continuation, {count} tokens: the first that differs from the unquantized run's (median over the "
        "windows)."
    )
    return "\n".join([title, "", *markdown(["kv", "first difference", "same token", *stretches], rows)])
