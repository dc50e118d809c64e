"""README, docs and figures say what the committed measurements say, and their examples are true."""

from __future__ import annotations

import doctest
import html
import json
import re
from xml.etree import ElementTree

import pytest

from tools import figures, pareto, render


def test_tables_are_rendered_from_their_json(pytestconfig):
    used = set()
    for page in render.PAGES:
        text = (pytestconfig.rootpath / page).read_text()
        used |= {block[2] for block in render.BLOCK.finditer(text)}
        assert render.rendered(text) == text, f"{page}: run `make results`"
    assert used == set(render.TABLES)


def test_figures_are_what_their_script_draws_and_every_figure_is_shown(pytestconfig, tmp_path):
    docs = pytestconfig.rootpath / "docs"
    figures.draw(tmp_path)
    pages = "".join(page.read_text() for page in docs.rglob("*.md"))
    for name in figures.all_drawn():
        assert (tmp_path / f"{name}.svg").read_text() == (figures.OUT / f"{name}.svg").read_text(), "run `make results`"
        ElementTree.fromstring((tmp_path / f"{name}.svg").read_text())
        assert f"figures/{name}.svg)" in pages
    assert {path.stem for path in figures.OUT.iterdir()} == set(figures.all_drawn())


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


def test_pareto_plot_shows_the_committed_numbers():
    description = re.search(r"<dc:description>(.*?)</dc:description>", (pareto.RESULTS / "pareto.svg").read_text(), re.DOTALL)
    assert json.loads(html.unescape(description[1])) == pareto.points(), "run `make results`"
    assert pareto.front({"a": [3, 0.2, 0], "b": [2, 0.5, 0], "c": [2.5, 0.6, 0], "d": [4, 0.1, 0]}) == [(2, 0.5), (3, 0.2), (4, 0.1)]
