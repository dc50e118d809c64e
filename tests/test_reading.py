"""Pages that are drawn and read: what is on them, which cells are asked for, and what the reader makes of them."""

from __future__ import annotations

import hashlib
import io
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minioscar import engine as engines
from minioscar.app import cli
from minioscar.engine import Engine
from minioscar.errors import UserError
from minioscar.evaluation import pages, reading
from minioscar.evaluation.pages import Page
from minioscar.layer_cache import PackedCache
from minioscar.rope import Rope
from minioscar.towers.media import Features
from minioscar.towers.qwen_vision import QwenVision
from tools.reader_page import example

ROOT = Path(__file__).parents[1]
READER = ROOT / "weights" / "reader"
SCHEMES = ("bf16", "int2", "int2-compact", "oscar", "kivi", "quarot", "int4", "k4v2")
LEAST = dict.fromkeys(("bf16", "int4"), 0.97) | dict.fromkeys(("int2", "int2-compact", "k4v2"), 0.93)
LEAST |= {"oscar": 0.87, "kivi": 0.7, "quarot": 0.7}


def page_of(seed: int, rows: int = 15, columns: int = 22, cells: int = 40) -> Page:
    return pages.page(rows, columns, cells, np.random.default_rng(seed))


# --- pages


def test_a_page_is_the_same_in_every_run_and_no_label_is_twice_on_it():
    assert page_of(3) == page_of(3) != page_of(4)
    cells = page_of(3).cells
    assert len({cell.label for cell in cells}) == len({cell.box for cell in cells}) == 40
    assert all(len(cell.value) == pages.VALUE and not set("IO") & set(cell.text) for cell in cells)


def test_every_glyph_is_in_its_square_and_differs_from_all_others():
    for size in pages.SIZES:
        drawn = {symbol: pages.glyph(symbol, size).astype(int) for symbol in (*pages.SYMBOLS, ":")}
        for a, b in product(drawn, drawn):
            assert (abs(drawn[a] - drawn[b]).sum() > 5 * 255) == (a != b), (size, a, b)
        for symbol, glyph in drawn.items():
            assert not glyph[0].any() and not glyph[-1].any() and not glyph[:, 0].any() and glyph.max() > 200, symbol


@pytest.mark.parametrize("seed", range(6))
def test_the_tokens_of_a_cell_are_those_that_its_ink_touches(seed):
    """And no ink lies anywhere else, nor on another cell's."""
    whole = page_of(seed, rows=6, columns=5 + seed, cells=3)
    ink = np.asarray(pages.drawn(whole)) != whole.paper
    assert ink.shape == (6 * pages.TOKEN, (5 + seed) * pages.TOKEN)
    alone = [Page(whole.rows, whole.columns, (cell,), whole.size, whole.paper, whole.ink) for cell in whole.cells]
    each = [np.asarray(pages.drawn(page)) != whole.paper for page in alone]
    assert (sum(map(np.asarray, each)) == ink).all()
    for cell, seen in zip(whole.cells, each, strict=True):
        y, x = np.nonzero(seen)
        tokens = set((y // pages.TOKEN * whole.columns + x // pages.TOKEN).tolist())
        first, last = whole.tokens_of(cell)[0], whole.tokens_of(cell)[-1]
        assert tokens <= set(whole.tokens_of(cell)) and last - first <= whole.columns + 4


@pytest.mark.parametrize("cells", [0, 6 * 5 + 1])
def test_a_page_without_room_is_refused(cells):
    with pytest.raises(ValueError, match="no room"):
        pages.page(7, 20, cells, np.random.default_rng(0))


@pytest.mark.parametrize("tokens", [300, 301, 517, 625, 1000, 1024, 1480, 2000, 4000])
def test_a_size_becomes_a_page_that_is_nearly_square_and_has_margins(tokens):
    rows, columns = reading.shape_of(tokens)
    assert 0.97 * tokens <= rows * columns <= tokens and columns % 4 and abs(math.log(rows / columns)) < 0.35


def test_training_draws_the_same_pages(tmp_path):
    """tools/reader_pages.py draws them again, many at once, in torch."""
    torch = pytest.importorskip("torch")
    from tools.reader_pages import LETTER0, Maker, glyphs

    maker, page = Maker(glyphs(tmp_path / "glyphs.npy", "cpu"), 0), page_of(5)
    font = pages.SIZES.index(page.size)
    shades = iter([font, page.paper, page.ink])
    maker.whole = lambda low, high, *shape: torch.full(shape, next(shades))
    text = torch.tensor([[[pages.SYMBOLS.index(symbol) for symbol in cell.label + cell.value] for cell in page.cells]])
    y, x = (torch.tensor([[getattr(cell, name) for cell in page.cells]]) for name in "yx")
    drawn = (maker.draw(text, y, x, (page.rows, page.columns), True)[0].numpy() + 1) * 127.5
    assert LETTER0 == 10 and abs(drawn - np.asarray(pages.drawn(page)).astype(int)).max() < 1e-3


# --- refused


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (READER, ["--images", "300", "--needle", "--drift", "4"], "leave --needle, --drift out"),
        ("smollm2-135m", ["--images"], "reads no images"),
        (READER, ["--images", "299"], "--images 299 is out of range; it must be from 300 to 4000"),
        (READER, ["--images", "300,9999"], "--images 9999 is out of range"),
        (READER, ["--images", "300", "--pages", "0"], "--pages 0 is out of range"),
        (READER, ["--images", "many"], "write --images"),
        (READER, ["--images", ""], "--images names no size"),
        (READER, ["--images", "300", "--kv", "int5"], "'int5' is not a scheme"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(model, options, why, capsys):
    code, said = cli.main(["eval", str(model), *options]), capsys.readouterr()
    assert code and why in said.err and said.err.count("\n") == 1 and not said.out


# --- the reader


@pytest.fixture(scope="module")
def readers() -> dict[str, Engine]:
    return {kv: engines.load(READER, kv, "cpu") for kv in SCHEMES}


@pytest.fixture(scope="module")
def report(readers) -> dict:
    return reading.reading([*readers.values()], [300, 625], 2)


def test_no_cell_is_asked_for_that_a_scheme_has_exactly(readers):
    """The places in the row of every glyph's tokens are packed in each, and sinks in none."""
    for one in reading.exams([*readers.values()], [300, 500, 1000], 1):
        first = one.ids.index(one.medium.ids[0])
        for engine, cell in product(readers.values(), one.cells):
            tokens, scheme = one.page.tokens_of(cell), engine.scheme
            end = scheme.packed_tokens(len(one.ids)) if scheme.quantized else len(one.ids)
            assert scheme.sinks <= first + tokens[0] and first + tokens[-1] < end
        assert 0 < len(one.cells) <= reading.QUESTIONS and one.answers.shape == (len(one.cells), 3 + pages.VALUE)


@pytest.mark.long
def test_the_reader_reads(report):
    """Bounds from what docs/pictures.md measured over many more questions."""
    rows = {row["kv"]: row for row in report["results"]}
    assert report["tokens"] == [300, 625] and sum(report["questions"]) > 36
    for kv, least in LEAST.items():
        assert rows[kv]["exact_match"] >= least, (kv, rows[kv])
    assert max(rows[kv]["exact_match"] for kv in ("kivi", "quarot")) < rows["int2"]["exact_match"]
    assert rows["bf16"]["packed"] == [0, 0] and rows["oscar"]["packed"] == [256, 512]


@pytest.mark.parametrize("kv", ["int2", "oscar"])
def test_answers_are_read_from_the_packed_cache(readers, kv, monkeypatch):
    """With the packed part zeroed nothing is read."""
    (one,) = reading.exams([*readers.values()], [625], 1)
    assert reading.read(readers[kv], one).all(axis=1).mean() > 0.5
    packed = PackedCache.packed
    monkeypatch.setattr(PackedCache, "packed", lambda *args: tuple(np.zeros_like(x) for x in packed(*args)))
    assert not reading.read(readers[kv], one).all(axis=1).any()


@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_a_question_among_others_is_answered_as_alone_by_the_way_that_users_go(readers, kv):
    """A prompt cache of the page, and one answer after the other."""
    engine = readers[kv]
    (one,) = reading.exams([*readers.values()], [300], 1)
    file = io.BytesIO()
    pages.drawn(one.page).save(file, "PNG")
    right = reading.read(engine, one).all(axis=1).tolist()
    cache = engine.prefill([reading.message_of(file.getvalue(), "")])
    for cell, expected in zip(one.cells, right, strict=True):
        found = engine.generate(f"{cell.label}?", cache=cache, max_tokens=pages.VALUE + 1)
        assert (found.text == cell.value) == expected, (cell, found.text)


@pytest.mark.parametrize(
    ("shape", "why"), [((66, 66), "as 4[0-9]*, not 4356 tokens"), ((2, 5), "no cell that .* use --images 20")]
)
def test_a_page_that_would_be_resized_or_is_not_packed_is_refused(readers, shape, why):
    page = Page(*shape, (pages.Cell("A1", "2222", 0, 0, (0, 0)),), 16, 255, 0)
    with pytest.raises(UserError, match=why):
        reading.exam([readers["bf16"], readers["int2"]], page)


def test_eval_prints_a_column_for_every_size_and_the_same_as_json(capsys):
    arguments = ["eval", str(READER), "--kv", "oscar", "--images", "400,300,400", "--pages", "1"]
    cli.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    cli.main(arguments)
    table = capsys.readouterr().out
    assert [row["kv"] for row in found["images"]["results"]] == ["bf16", "oscar"]
    assert reading.table(found["images"]) == table.rstrip("\n") and table.count("\n") == 6
    assert found["images"]["tokens"] == [300, 399] and "399 tokens" in table


def test_the_page_beside_the_reader_is_what_its_tool_draws_and_is_read():
    """README's example. Another FreeType may draw a few shades otherwise."""
    page, file = example(), READER / "page.png"
    with Image.open(file) as image:
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(pages.drawn(page)).astype(int))
    assert difference.mean() < 1
    cell = page.cells[0]
    answer = engines.load(READER, "int2", "cpu").generate([reading.message_of(str(file), f"{cell.label}?")])
    assert answer.text == cell.value


def test_the_reader_is_what_its_training_wrote():
    report = json.loads((READER / "report.json").read_text())
    data = (READER / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == report["sha256"] and len(data) == report["bytes"] < 4.2e6


@pytest.mark.parametrize("what", ["DeepStack", "rows and columns", "places in a page", "order of pixels"])
def test_a_reader_with_one_thing_wrong_does_not_read(readers, monkeypatch, what):
    """So that it reads says that these are right."""
    engine = readers["bf16"]
    (one,) = reading.exams([*readers.values()], [625], 1)
    good = reading.read(engine, one).mean()
    engine.model.encoder.kept.clear()
    if what == "DeepStack":
        encode = QwenVision.encode
        monkeypatch.setattr(QwenVision, "encode", lambda *args: Features(encode(*args).embeddings))
    elif what == "rows and columns":
        tables_at = Rope.tables_at
        monkeypatch.setattr(Rope, "tables_at", lambda rope, places: tables_at(rope, places[[0, 2, 1]]))
    elif what == "places in a page":
        tables_at = Rope.tables_at
        monkeypatch.setattr(Rope, "tables_at", lambda rope, places: tables_at(rope, places[[0, 0, 0]]))
    else:
        patches = QwenVision.patches
        monkeypatch.setattr(QwenVision, "patches", lambda *args: patches(*args)[:, ::-1])
    bad = reading.read(engine, one).mean()
    engine.model.encoder.kept.clear()
    assert good > 0.9 and bad < 0.25
