"""Pages of labelled values (pages.py) read through the quantized cache: the object of `eval --images`.

A page goes the whole way: a PNG file, Pillow, the tower, M-RoPE, DeepStack, the cache. It is prefilled; the questions
come after, each alone behind the page, so that they see it as the cache kept it. Asked is only for cells that every
scheme of the run has packed: behind all sinks and in front of all windows.
As in tool_calls.py the true answer is fed whatever the model would say: a greedy answer is the true one if and only if
each of its tokens is the likeliest after the true ones before it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import gpus_of, scheme_named
from ..cache import Cache
from ..config import Config
from ..engine import Engine
from ..errors import UserError
from ..ops import backend
from ..oscar import Scheme
from ..pages import check_scheme
from ..parallel import shares
from ..parallel.cards import over
from ..storage.hub import resolve
from ..tables import markdown
from ..tokenizer import Tokenizer
from ..towers.media import Medium, media_of
from . import pages
from .fidelity import BASELINE, loaded, with_window
from .pages import Cell, Page
from .teacher_forcing import Done, next_flush

SEED = 0
FILL = 0.5, 1.0  # of a page's boxes that have a cell, from ... to
ROWS = 8  # questions that are read at once, a row of the cache each
QUESTIONS = 16  # most about a page
SMALLEST, LARGEST = 300, 4000  # tokens of a page
SPARE = 16  # positions behind a page, for a question and its answer


@dataclass(frozen=True)
class Exam:
    """A page, its prompt up to the question, and the cells that are asked for. answers: ids [questions, n] of question
    and answer, of which `asked` are the question's."""

    size: int  # that was asked for
    page: Page
    ids: list[int]
    medium: Medium
    cells: list[Cell]
    answers: np.ndarray
    asked: int


def shape_of(tokens: int) -> tuple[int, int]:
    """Rows and columns of the most square page of at most so many tokens, with a margin of one to three columns."""
    shapes = [(rows, tokens // rows) for rows in range(2, tokens // 5 + 1)]
    shapes = [(rows, columns - (columns % 4 == 0)) for rows, columns in shapes]
    return min((s for s in shapes if math.prod(s) > 0.97 * tokens), key=lambda s: abs(math.log(s[0] / s[1])))


def packed(engines: Sequence[Engine], length: int) -> range:
    """The places in a row of so many tokens that every quantized scheme has packed, and none as a sink."""
    schemes = [engine.scheme for engine in engines if engine.scheme.quantized]
    ends = [scheme.packed_tokens(length) for scheme in schemes]
    return range(max((scheme.sinks for scheme in schemes), default=0), min(ends, default=length))


def exams(engines: Sequence[Engine], sizes: Sequence[int], count: int) -> Iterator[Exam]:
    """`count` pages of each size; the same in every run with the same schemes."""
    for size in sizes:
        rng, (rows, columns) = np.random.default_rng([SEED, size]), shape_of(size)
        most = min(math.prod(pages.boxes_of(rows, columns)), len(pages.LETTERS) * len(pages.DIGITS))
        for _ in range(count):
            page = pages.page(rows, columns, round(most * rng.uniform(*FILL)), rng)
            yield exam(engines, page, size)


def exam(engines: Sequence[Engine], page: Page, size: int = 0) -> Exam:
    """Raises UserError for a model that reads no pictures, or resizes this one."""
    engine, file = engines[0], io.BytesIO()
    pages.drawn(page).save(file, "PNG")
    [message] = engine.opened([message_of(file.getvalue(), "")])
    [medium] = media_of([message])
    if medium.tokens != page.tokens:
        why = f"as {medium.tokens}, not {page.tokens} tokens"
        pixels = f"{page.columns * pages.TOKEN} x {page.rows * pages.TOKEN} pixels"
        raise UserError(f"this model reads a page of {pixels} {why}; use the reader")
    prompts = [engine.render([message_of(medium, text)]) for text in ("A", "B")]
    start = next(i for i, pair in enumerate(zip(*prompts, strict=True)) if pair[0] != pair[1])
    first, whole = prompts[0].index(medium.ids[0]), packed(engines, start)
    tokens = {cell: [first + i for i in page.tokens_of(cell)] for cell in page.cells}
    cells = [cell for cell in page.cells if tokens[cell][0] in whole and tokens[cell][-1] in whole]
    cells = cells[:QUESTIONS]  # they are in random order
    if not cells:
        way_out = f"use --images {2 * page.tokens}"
        raise UserError(f"a page of {page.tokens} tokens has no cell that all schemes pack; {way_out}")
    asked = [engine.render([message_of(medium, f"{cell.label}?")])[start:] for cell in cells]
    answers = [[*ids, *engine.tokenizer.encode(cell.value)] for ids, cell in zip(asked, cells, strict=True)]
    return Exam(size, page, prompts[0][:start], medium, cells, np.array(answers), len(asked[0]))


def message_of(image: Any, text: str) -> dict[str, Any]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts if text else parts[:1]}


def read(engine: Engine, exam: Exam, done: Done = lambda tokens: None) -> np.ndarray:
    """Which tokens of which answers are right; bool [questions, tokens of an answer]."""
    length, found = len(exam.ids), []
    cache = Cache(engine.config, engine.scheme, 1 + min(ROWS, len(exam.cells)), length + SPARE, engine.ops)
    batch = cache.batch_for([0], [length]).reading([exam.ids], [exam.medium])
    engine.model.forward(np.array(exam.ids), cache, batch)
    done(length)
    for start in range(0, len(exam.cells), ROWS):
        answers = exam.answers[start : start + ROWS]
        slots = range(1, 1 + len(answers))
        for slot in slots:
            cache.copy(0, slot)
        found.append(followed(engine, cache, slots, answers)[:, exam.asked - 1 :])
        done(answers.size)
    return np.concatenate(found) == exam.answers[:, exam.asked :]


def followed(engine: Engine, cache: Cache, slots: Sequence[int], ids: np.ndarray) -> np.ndarray:
    """The likeliest token behind each but the last of ids, [rows, n], all rows of one length: [rows, n - 1]."""
    at, found = 0, []
    while at < ids.shape[1] - 1:
        count = min(ids.shape[1] - 1 - at, next_flush(cache, slots[0]) - int(cache.lengths[slots[0]]))
        batch = cache.batch_for(slots, [count] * len(slots))
        logits = engine.model.forward(ids[:, at : at + count].ravel(), cache, batch, every=True)
        found.append(logits.argmax(axis=1).reshape(len(slots), count))
        at += count
    return np.concatenate(found, axis=1)


def evaluate(
    model: str, schemes: Sequence[str], sizes: Sequence[int], *, count: int, device: str = "auto",
    window: tuple[int, int] | None = None, progress: bool = False, gpus: int | None = None,
) -> dict:
    """The object of `eval --images --json`. count: pages of each size. gpus: over so many the model is split. Raises
    UserError as `fidelity.evaluate` does, and for a model that reads no pictures or a size that is out of range."""
    from tqdm import tqdm

    names = [BASELINE, *(name for name in dict.fromkeys(schemes) if name != BASELINE)]
    wanted = [with_window(scheme_named(name), window) for name in names]
    ops, folder, gpus = backend(device), resolve(model), gpus_of(gpus)
    config = Config.from_folder(folder)
    check(config, wanted, sizes, count)
    for scheme in wanted if gpus > 1 else ():
        shares.check(config, scheme, gpus)
    sizes, ops = sorted(set(sizes)), over(gpus, ops, config, wanted[0])
    engines = loaded(folder, wanted, [config], Tokenizer(folder), ops, progress)
    report = {"model": str(model), "device": ops.name, **({"window": list(window)} if window else {})}
    tokens = cost(engines, sizes, count)
    with tqdm(total=tokens, desc="eval: images", unit="token", leave=False, disable=None if progress else True) as bar:
        return report | {"images": reading(engines, sizes, count, bar.update)}


def check(config: Config, schemes: Sequence[Scheme], sizes: Sequence[int], count: int) -> None:
    """Raises UserError, before weights are read."""
    if "image" not in config.towers:
        raise UserError("this model reads no images; --images is for one that does, such as the reader")
    for scheme in schemes:
        check_scheme(config, scheme)
    if not sizes:
        raise UserError("--images names no size; write --images 300,1000")
    if count < 1:
        raise UserError(f"--pages {count} is out of range; it must be at least 1")
    most = min(LARGEST, config.max_context - SPARE)
    for size in sizes:
        if not SMALLEST <= size <= most:
            raise UserError(f"--images {size} is out of range; it must be from {SMALLEST} to {most} tokens")


def reading(
    engines: Sequence[Engine], sizes: Sequence[int], count: int, done: Done = lambda tokens: None
) -> dict:
    """The object `images` of `eval --json`: the share of answers, and of their symbols, that are right, for each scheme
    and size, and how many tokens of a page were packed in it."""
    for engine in engines[1:]:
        engine.model.encoder = engines[0].model.encoder  # the tower runs once for a page
    right: dict[str, list[list[np.ndarray]]] = {engine.scheme.name: [[] for _ in sizes] for engine in engines}
    lengths = [0] * len(sizes)
    for one in exams(engines, sizes, count):
        i = sizes.index(one.size)
        lengths[i] = len(one.ids)
        for engine in engines:
            right[engine.scheme.name][i].append(read(engine, one, done))
    shapes = [shape_of(size) for size in sizes]
    asked = [sum(map(len, found)) for found in right[engines[0].scheme.name]]
    rows = [
        row_of(engine, lengths, [np.concatenate(found) for found in right[engine.scheme.name]]) for engine in engines
    ]
    return {"seed": SEED, "tokens": [math.prod(shape) for shape in shapes], "shapes": shapes, "pages": count,
            "questions": asked, "results": rows}  # fmt: skip


def row_of(engine: Engine, lengths: Sequence[int], right: Sequence[np.ndarray]) -> dict:
    """right: of each size, bool [questions, tokens of an answer]; lengths: of its prompts, without a question."""
    scheme, exact, every = engine.scheme, [found.all(axis=1) for found in right], np.concatenate(right)
    share = float(every.all(axis=1).mean())
    return {
        "kv": scheme.name, "bits_per_element": scheme.bits_per_element(engine.config.head_dim), "exact_match": share,
        "exact_match_se": math.sqrt(share * (1 - share) / len(every)), "symbols": float(every.mean()),
        "exact_by_size": [float(found.mean()) for found in exact],
        "symbols_by_size": [float(found.mean()) for found in right],
        "packed": [max(scheme.packed_tokens(length) - scheme.sinks, 0) for length in lengths],
    }  # fmt: skip


def cost(engines: Sequence[Engine], sizes: Sequence[int], count: int) -> int:
    """Tokens that `reading` will send through models, nearly, for a progress bar."""
    return len(engines) * count * sum(size + SPARE // 2 * QUESTIONS for size in sizes)


def table(report: dict) -> str:
    """The report as a Markdown table: a column a size."""
    rows = []
    for row in report["results"]:
        cells = [f"{share:.1%}" for share in row["exact_by_size"]]
        cells += [f"{row['exact_match']:.1%} ± {row['exact_match_se']:.1%}", f"{row['symbols']:.1%}"]
        rows.append([row["kv"], f"{row['bits_per_element']:.3f}", *cells])
    asked = zip(report["tokens"], report["questions"], strict=True)
    title = f"Values read from pages, {report['pages']} of each size (seed {report['seed']})."
    head = ["kv", "bits/element", *(f"{n:,} tokens, {of} questions" for n, of in asked), "all", "symbols"]
    return "\n".join([title, "", *markdown(head, rows)])
