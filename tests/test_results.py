"""README, docs and figures say what the committed measurements say, and their examples are true."""

from __future__ import annotations

import doctest
import re
from xml.etree import ElementTree

import pytest

from tools import figures, pareto, plot, render


def test_tables_are_rendered_from_their_json(pytestconfig):
    used = set()
    for page in render.PAGES:
        text = (pytestconfig.rootpath / page).read_text()
        used |= {block[2] for block in render.BLOCK.finditer(text)}
        assert render.rendered(text) == text, f"{page}: run `make results`"
    assert used == set(render.TABLES)


def test_figures_show_what_their_script_draws_and_every_figure_is_shown(pytestconfig):
    """Their texts, lines and boxes: another version of matplotlib may draw the same with other bytes."""
    pages = "".join(page.read_text() for page in (pytestconfig.rootpath / "docs").rglob("*.md"))
    drawn = {figures.OUT / f"{name}.svg": figure for name, figure in figures.all_drawn().items()}
    for path, figure in {**drawn, pareto.RESULTS / "pareto.svg": pareto.drawn()}.items():
        assert plot.saved_content(path) == plot.content(figure), f"{path.name}: run `make results`"
        ElementTree.parse(path)
        assert f"{path.parent.name}/{path.name})" in pages
    assert set(figures.OUT.iterdir()) == set(drawn)


def test_a_figure_is_the_same_bytes_every_time_and_its_text_is_text(tmp_path):
    for name in "ab":
        plot.save(plot.styled(figures.path)({}), tmp_path / f"{name}.svg")
    saved = (tmp_path / "a.svg").read_text()
    assert saved == (tmp_path / "b.svg").read_text() and ">tokenizer.py</text>" in saved
    assert "<dc:date>" not in saved and "<path id=\"DejaVu" not in saved


@pytest.mark.long
@pytest.mark.parametrize("page", ["reading.md", "method.md", "using.md"])
def test_the_examples_of_the_docs_are_true(pytestconfig, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(pytestconfig.rootpath / "docs" / page)
    result = doctest.testfile(path, module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


def test_links_of_the_docs_lead_somewhere(pytestconfig):
    root = pytestconfig.rootpath
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_front_is_what_no_other_scheme_beats_in_both_bits_and_kl():
    assert pareto.front(
        {"a": [3, 0.2, 0], "b": [2, 0.5, 0], "c": [2.5, 0.6, 0], "d": [4, 0.1, 0]}
    ) == [(2, 0.5), (3, 0.2), (4, 0.1)]
