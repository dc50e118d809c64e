"""The page at `/`, in headless Chromium, talking to a server with SmolLM2 on the CPU."""

from __future__ import annotations

import re

import pytest

from .browser import CHROMIUM, browser
from .serving import server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

SEND = "document.querySelector('#prompt').value = {!r}; document.querySelector('#send').click()"
IDLE = "document.querySelector('#stop').disabled && document.querySelector('article:last-child .tools')"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with server("smollm2-135m", "--slots", "2", "--ctx", "1024", "--api-key", "sesame") as running:
        with browser(tmp_path_factory.mktemp("profile")) as one:
            one.open(running.url.removesuffix("/v1") + "/")
            one.wait("document.querySelector('#state').textContent.includes('API key')")
            one.run("key.value = 'sesame'; key.onchange(); temperature.value = 0; temperature.onchange()")
            one.run("max_tokens.value = 24; max_tokens.onchange()")
            one.wait("document.querySelector('#state').textContent.includes('0 of 2 rows in use')")
            yield one


def test_a_conversation_is_streamed_with_its_figures_and_kept(page):
    page.run(SEND.format("What is the capital of France?"))
    page.wait("document.querySelector('article.assistant .text').textContent.length > 3")
    page.wait(IDLE)
    assert "Paris" in page.run("document.querySelector('article.assistant .text').textContent")
    line = page.run("document.querySelector('.figures').textContent")
    assert re.fullmatch(
        r"0 tokens from the cache, \d+ read in [\d.]+ s, \d+ written \([\d,]+ a second\); cache [\d.]+ MB, "
        r"BF16 would be [\d.]+",
        line,
    ), line
    title = page.run("document.querySelector('#list button').textContent")
    page.open(page.run("location.href"))
    assert page.run("document.querySelector('#list button').textContent") == title == "What is the capital of France?"
    assert "Paris" in page.run("document.querySelector('article.assistant .text').textContent")


def test_an_answer_is_stopped_regenerated_and_its_question_edited(page):
    page.run("document.querySelector('#new').click(); max_tokens.value = 900")
    page.run(SEND.format("Tell me a long story."))
    page.wait("document.querySelector('article.assistant .text').textContent.length > 20")
    page.run("document.querySelector('#stop').click()")
    page.wait(IDLE)
    assert page.run("document.querySelector('article.assistant .error').textContent") == "stopped"
    page.wait("document.querySelector('#state').textContent.includes('0 of 2 rows in use')")
    page.run("max_tokens.value = 4; document.querySelector('article.assistant .tools button').click()")
    page.wait(IDLE)
    assert page.run("document.querySelectorAll('article').length") == 2
    page.run("document.querySelector('article.user .tools button').click()")
    assert page.run("document.querySelector('#prompt').value") == "Tell me a long story."
    assert page.run("document.querySelectorAll('article').length") == 0


def test_what_a_model_says_is_never_html(page):
    said = "<img src=x onerror=boom()> **bold** `x<y`\\n\\n1. one\\n\\n```\\n<b>\\n```"
    page.run(f"var made = document.createElement('div'); markdown(made, '{said}')")
    assert page.run("made.querySelectorAll('img, b, script').length") == 0
    assert page.run("[...made.querySelectorAll('strong, code, li')].map(x => x.textContent).join('|')") == (
        "bold|x<y|one|<b>\n"[:-1]
    )


def test_nothing_is_loaded_from_anywhere_else(page):
    assert page.run("performance.getEntriesByType('resource').every(x => new URL(x.name).host === location.host)")
    assert not page.run("fetch('https://example.com').then(() => true, () => false)")
    assert page.run("document.documentElement.outerHTML.length") < 40_000


def test_dark_and_light_are_chosen_and_kept(page):
    before = page.run("getComputedStyle(document.body).backgroundColor")
    page.run("document.querySelector('#theme').click()")
    after = page.run("getComputedStyle(document.body).backgroundColor")
    page.open(page.run("location.href"))
    assert before != after == page.run("getComputedStyle(document.body).backgroundColor")
