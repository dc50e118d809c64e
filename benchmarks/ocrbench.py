"""OCRBench (arXiv 2305.07895): 1,000 questions about text in pictures; its files and its score.

Two forms are read: `OCRBench.json` beside the folder `OCRBench_Images`, as github.com/Yuliang-Liu/MultimodalOCR has
them, and the parquet of huggingface.co/datasets/echo840/OCRBench, with the pictures in it. The prompt is the question,
behind the picture; a prediction is right where it contains an answer, as the repository's example.py counts it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minioscar.errors import UserError, one_line

from .questions import Question, missing

MAX_TOKENS = 100  # example.py's
QUESTIONS = 1000  # of the whole data set, which is what a score is of
RECOGNITION = (
    "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition", "Handwriting Recognition",
    "Digit String Recognition", "Non-Semantic Text Recognition",
)  # fmt: skip
GROUPS = {  # as the paper reports them
    "Text Recognition": RECOGNITION, "Scene Text-centric VQA": ("Scene Text-centric VQA",),
    "Doc-oriented VQA": ("Doc-oriented VQA",), "Key Information Extraction": ("Key Information Extraction",),
    "Handwritten Mathematical Expression Recognition": ("Handwritten Mathematical Expression Recognition",),
}  # fmt: skip
TYPES = {kind for kinds in GROUPS.values() for kind in kinds}


@dataclass(frozen=True)
class Row:
    """source: of the picture, a file's name or bytes. dataset: where it is from; HME100k counts in its own way."""

    number: int
    source: Any
    question: str
    answers: tuple[str, ...]
    dataset: str
    type: str

    @property
    def asked(self) -> Question:
        return Question(self.number, "image", (self.source,), self.question)


def rows(folder: Path) -> list[Row]:
    """Raises UserError for what is not there or not of one of the two forms."""
    found = [path for name in ("OCRBench.json", "OCRBench/OCRBench.json") if (path := folder / name).is_file()]
    tables = sorted(folder.rglob("*.parquet"))
    if not found and not tables:
        raise UserError(f"{folder} has neither OCRBench.json nor parquet files; --data must be OCRBench's folder")
    read = _of_json(found[0], folder) if found else [row for table in tables for row in _of_parquet(table)]
    made = [Row(i, *row) for i, row in enumerate(read)]
    for row in made:
        if row.type not in TYPES:
            raise UserError(f"question {row.number} of {folder} has the type {row.type!r}, which OCRBench has not")
        if not row.answers or not all(row.answers):
            raise UserError(f"question {row.number} of {folder} has no answer; get the file again")
    return made


def _of_json(path: Path, folder: Path) -> list[tuple[Any, ...]]:
    pictures = next((one for one in (folder, path.parent) if (one / "OCRBench_Images").is_dir()), None)
    if pictures is None:
        raise missing(folder / "OCRBench_Images")
    try:
        found = [
            (str(pictures / "OCRBench_Images" / row["image_path"]), row["question"].strip(), _several(row["answers"]),
             row["dataset_name"], row["type"])
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not OCRBench.json ({one_line(error)}); get it again") from None
    for source, *_ in found:
        if not Path(source).is_file():
            raise missing(Path(source))
    return found


def _of_parquet(path: Path) -> list[tuple[Any, ...]]:
    table = parquet(path, ("image", "question", "answer", "dataset", "question_type")).to_pylist()
    return [
        (row["image"]["bytes"], row["question"].strip(), _several(row["answer"]), row["dataset"], row["question_type"])
        for row in table
    ]


def parquet(path: Path, columns: Sequence[str]) -> Any:
    """pyarrow.Table. Raises UserError where it cannot be read, or lacks one of the columns."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install 'minioscar[benchmarks]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({one_line(error)}); get it again") from None
    if lacking := [name for name in columns if name not in table.column_names]:
        raise UserError(f"{path} has no column {lacking[0]!r}; it is of another data set, or of another version")
    return table


def _several(answers: Any) -> tuple[str, ...]:
    return (answers,) if isinstance(answers, str) else tuple(answers)


def is_right(row: Row, predicted: str) -> bool:
    """Whether one of the answers is in what the model said: without regard to case, or of formulas (HME100k) to
    spaces."""
    is_formula = row.dataset == "HME100k"

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if is_formula else text.lower()

    return any(plain(answer) in plain(predicted) for answer in row.answers)


def scored(asked: Sequence[Row], answers: Mapping[int, str]) -> dict[str, Any]:
    """score: right answers, of `questions`; by_group: the same of each, [right, questions]."""
    right = {row.number: is_right(row, answers[row.number]) for row in asked}
    groups = {name: [row for row in asked if row.type in kinds] for name, kinds in GROUPS.items()}
    by_group = {name: [sum(right[row.number] for row in of), len(of)] for name, of in groups.items()}
    return {"score": sum(right.values()), "questions": len(asked), "by_group": by_group}
