"""MMAU-Pro (arXiv 2508.13992): questions about sounds; its files, its rules for instructions, and what its own judge
reads and writes.

The data set (huggingface.co/datasets/gamma-lab-umd/MMAU-Pro) is `test.parquet` and, out of `data.zip`, the sounds that
its column `audio_path` names. Its evaluation (github.com/sonalkum/MMAUPro, evaluate_mmau_pro_comprehensive.py) has open
answers judged by Qwen2.5-7B-Instruct, matches choices by NV-Embed-v2, and checks instructions by rules. The rules are
here; both models are left to that script: the answers are written as the parquet that it takes, and what it makes of
them is read. Choices are asked as NVIDIA's NeMo-Skills asks them, below the question with a letter each; the authors
have published no prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minioscar.errors import UserError
from minioscar.storage.files import replacing

from .ocrbench import parquet
from .questions import Question, missing

MAX_TOKENS = 1024  # the authors have published none
OPEN, FOLLOWING = "open", "instruction following"
ANSWERS = "model_output"  # the column that their script reads
COLUMNS = "id", "audio_path", "question", "answer", "choices", "category", "task_identifier", "kwargs"
Rule = Callable[[str, Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Row:
    """task, settings: of an instruction, what is checked."""

    number: int
    sounds: tuple[str, ...]
    question: str
    category: str
    choices: tuple[str, ...] = ()
    task: str | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def asked(self) -> Question:
        is_closed = self.category not in (OPEN, FOLLOWING) and len(self.choices) > 1
        choices = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(self.choices)] if is_closed else []
        text = "\n".join([f"{self.question}\n", *choices]) if choices else self.question
        return Question(self.number, "audio", self.sounds, text)


def rows(folder: Path, categories: Sequence[str] = (OPEN, FOLLOWING)) -> list[Row]:
    """Of these categories; of all, where there are none. Raises UserError for what is not there."""
    if not (path := folder / "test.parquet").is_file():
        raise missing(path)
    found = [
        Row(i, tuple(str(folder / name) for name in _list(row["audio_path"])), row["question"] or "", row["category"],
            tuple(_list(row["choices"])), row["task_identifier"], row["kwargs"])
        for i, row in enumerate(parquet(path, COLUMNS).to_pylist())
        if not categories or row["category"] in categories
    ]  # fmt: skip
    if not found:
        raise UserError(f"{path} has no questions of {' and '.join(map(repr, categories))}")
    for row in found:
        if not row.sounds or (gone := next((name for name in row.sounds if not Path(name).is_file()), None)):
            raise missing(Path(gone if row.sounds else path))
        if row.category == FOLLOWING and (row.task not in RULES or not isinstance(row.settings, Mapping | None)):
            raise UserError(f"question {row.number} of {path} asks for {row.task!r}, for which there is no rule")
    if any("Sentences" in (row.task or "") for row in found):
        sentences("It is checked. Before long work.")
    return found


def _list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [str(one) for one in value]


# --- instructions that are followed


@cache
def _splitter() -> Callable[[str], list[str]]:
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        way_out = "pip install 'minioscar[benchmarks]' and python -m nltk.downloader punkt_tab"
        raise UserError(f"counting sentences needs nltk and its data: {way_out}") from None
    return nltk.tokenize.sent_tokenize


def sentences(text: str) -> int:
    return len(_splitter()(text))


def _letters(text: str, keep: str = "") -> str:
    return re.sub(f"[^a-zA-Z{keep}]", "", text).lower()


def _listed(text: str) -> list[str]:
    return text.lower().split(", ")


def _capitals(text: str) -> int:
    return sum(word.isupper() for word in text.split())


def _occurrences(text: str, keyword: str) -> int:
    return len(re.findall(rf"\b{re.escape(keyword.lower())}\b", text.lower()))


def _differ(text: str) -> bool:
    parts = [part.strip().lower() for part in text.split("******")]
    return len(parts) == 2 and parts[0] != parts[1]


def _pieces(text: str, splitter: str) -> int:
    """That are not blank; spaces around a splitter belong to it."""
    return sum(bool(piece.strip()) for piece in re.split(rf"\s*{re.escape(splitter)}\s*", text.strip()))


def _within(count: Callable[[str], int]) -> dict[str, Rule]:
    return {
        "at least": lambda text, of: count(text) >= of.get("N", 0),
        "at most": lambda text, of: count(text) <= of.get("N", 0),
        "range": lambda text, of: of.get("N1", 0) <= count(text) <= of.get("N2", 999),
    }


def _is(count: Callable[[str], int]) -> Rule:
    return lambda text, of: count(text) == of.get("N", 0)


def _reaches(pattern: str) -> Rule:
    return lambda text, of: len(re.findall(pattern, text)) >= of.get("N", 0)


RULES: dict[str, Rule] = {  # by `task_identifier`; the settings are those of `kwargs`
    "Include Keywords": lambda text, of: all(word in text.lower() for word in _listed(of.get("keywords", ""))),
    "Forbidden Words": lambda text, of: not any(w in text.lower() for w in _listed(of.get("forbidden_words", ""))),
    "Keyword Frequency": lambda text, of: _occurrences(text, of.get("keyword", "")) == of.get("N", 0),
    "Number Paragraphs": _is(lambda text: sum(bool(part.strip()) for part in text.split("***"))),
    "Number Bullets": _is(lambda text: len(re.findall(r"(?:^|\n)\s*\*\s+", text))),
    "Number Placeholder": _reaches(r"\[[^\]]+\]"),
    "Minimum Number Highlighted Section": _reaches(r"\*([^*]+)\*"),
    "Multiple Sections": lambda text, of: _pieces(text, of.get("section_splitter", "")) == of.get("N", 0),
    "Postscript": lambda text, of: _letters(of.get("postscript_marker", "")) in _letters(text),
    "Start Checker": lambda text, of: _letters(text, " ").startswith(_letters(of.get("start_phrase", ""), " ")),
    "End Checker": lambda text, of: _letters(text, " ").endswith(_letters(of.get("end_phrase", ""), " ")),
    "Repeat Prompt": lambda text, of: text.strip().lower().startswith(of["question"].strip().lower()),
    "Title": lambda text, of: re.search("<<[^>]+>>", text) is not None,
    "Two Responses": lambda text, of: _differ(text),
    "All Uppercase": lambda text, of: text.isupper(),
    "All Lowercase": lambda text, of: text.islower(),
    "Quotation": lambda text, of: (said := text.strip()).startswith('"') and said.endswith('"'),
    "No Commas": lambda text, of: "," not in text,
    **{f"Number Words ({how})": rule for how, rule in _within(lambda text: len(text.split())).items()},
    **{f"Number Sentences ({how})": rule for how, rule in _within(sentences).items()},
    **{f"All-capital Words ({how})": rule for how, rule in _within(_capitals).items()},
}


def follows(row: Row, answer: str) -> bool:
    """Whether an answer is as the spoken instruction wants it."""
    given = {name: value for name, value in (row.settings or {}).items() if value is not None}
    return RULES[row.task](answer, {**given, "question": row.question})


# --- what their script reads and writes


def write(folder: Path, asked: Sequence[Row], answers: Mapping[int, str], out: Path) -> bool:
    """The rows that were asked, as the data set has them, with the column that their script evaluates. Returns whether
    the file was there with the same answers, so that what the script made of it still holds."""
    import pyarrow
    import pyarrow.parquet

    said = [answers[row.number] for row in asked]
    if out.is_file() and parquet(out, [ANSWERS])[ANSWERS].to_pylist() == said:
        return True
    table = parquet(folder / "test.parquet", COLUMNS).take([row.number for row in asked])
    table = table.append_column(ANSWERS, pyarrow.array(said, pyarrow.string()))
    with replacing(out) as path:
        pyarrow.parquet.write_table(table, path)
    return False


def scored(asked: Sequence[Row], answers: Mapping[int, str], out: Path | None) -> dict[str, Any]:
    """aif: instructions that were followed, by the rules here, a share. open, good: their judge's mean mark as a share
    of 5 and the share of marks of at least 4; None: not judged yet. out: of `write`, where these answers stand in it.
    """
    following = [follows(row, answers[row.number]) for row in asked if row.category == FOLLOWING]
    judged = None if out is None else judgement(out)
    return {
        "questions": len(asked), "aif": sum(following) / len(following) if following else None,
        "open": None if judged is None else judged["avg_overall"] / 5,
        "good": None if judged is None else judged["good_response_rate"],
    }  # fmt: skip


def judgement(out: Path) -> dict[str, float] | None:
    """What their script, run in the folder of `out`, made of its open questions; None where it has not run. Raises
    UserError."""
    path = out.with_name(f"{out.stem}_comprehensive_results.json")
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["category_results"][OPEN]["metrics"]
        return {name: float(found[name]) for name in ("avg_overall", "good_response_rate")}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what the evaluation script writes of open questions; run it again") from None
