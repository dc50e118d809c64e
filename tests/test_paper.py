"""The runners of OCRBench and MMAU-Pro, on a few rows made by hand in the forms of their files: what is read, what is
asked, how it is scored, what is written for their own judge. The data sets themselves are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mmau_pro, ocrbench, paper, questions
from benchmarks.mmau_pro import RULES, Row, follows
from minioscar.errors import UserError

from . import test_llava_and_omni as omni
from . import test_picture_prompts as vl
from .test_bad_media import wav

pyarrow = pytest.importorskip("pyarrow", reason="the extra benchmarks is not installed")
pytest.importorskip("pyarrow.parquet")
seeing = vl.folder  # a fixture: a Qwen3-VL with random weights

OCR = [
    {"dataset_name": "IIIT5K", "id": 1, "image_path": "IIIT5K/a.png", "question": "what is written in the image?",
     "answers": "CENTRE", "type": "Regular Text Recognition"},
    {"dataset_name": "HME100k", "id": 2, "image_path": "HME/b.png", "question": " Write the formula. ",
     "answers": ["x ^ { 2 }", "x ^ 2"], "type": "Handwritten Mathematical Expression Recognition"},
    {"dataset_name": "docVQA", "id": 3, "image_path": "IIIT5K/a.png", "question": "which year?",
     "answers": ["in\n1997"], "type": "Doc-oriented VQA"},
]  # fmt: skip
NO_SETTINGS = dict.fromkeys(("N", "N1", "N2", "keyword", "keywords"))
MMAU: list[dict[str, Any]] = [
    {"id": "o", "audio_path": ["data/a.wav"], "question": "t05", "answer": "t06", "choices": [], "category": "open",
     "task_identifier": None, "kwargs": None},
    {"id": "i", "audio_path": ["data/b.wav"], "question": "t07", "answer": None, "choices": None,
     "category": "instruction following", "task_identifier": "Number Words (at most)",
     "kwargs": NO_SETTINGS | {"N": 9}},
    {"id": "c", "audio_path": ["data/a.wav", "data/b.wav"], "question": "t08", "answer": "t02",
     "choices": ["t01", "t02"], "category": "music", "task_identifier": None, "kwargs": None},
]  # fmt: skip


@pytest.fixture
def ocr(tmp_path: Path) -> Path:
    for row in OCR:
        path = tmp_path / "ocr" / "OCRBench_Images" / row["image_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(vl.saved(vl.png((64, 48)), "PNG"))
    (tmp_path / "ocr" / "OCRBench.json").write_text(json.dumps(OCR))
    return tmp_path / "ocr"


@pytest.fixture
def mmau(tmp_path: Path) -> Path:
    (tmp_path / "mmau" / "data").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "mmau" / "data" / f"{name}.wav").write_bytes(wav(omni.sound(0.5)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MMAU), tmp_path / "mmau" / "test.parquet")
    return tmp_path / "mmau"


def refused(work, *given: Any) -> str:
    with pytest.raises(UserError) as error:
        work(*given)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- OCRBench


def test_both_forms_of_ocrbench_are_the_same_questions(ocr: Path, tmp_path: Path) -> None:
    by_json = ocrbench.rows(ocr)
    assert [row.question for row in by_json] == ["what is written in the image?", "Write the formula.", "which year?"]
    assert by_json[1].answers == ("x ^ { 2 }", "x ^ 2") and by_json[0].answers == ("CENTRE",)
    (tmp_path / "hf" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([
        {"dataset": row["dataset_name"], "question": row["question"], "question_type": row["type"],
         "answer": [row["answers"]] if isinstance(row["answers"], str) else row["answers"],
         "image": {"bytes": (ocr / "OCRBench_Images" / row["image_path"]).read_bytes(), "path": ""}}
        for row in OCR
    ]), tmp_path / "hf" / "data" / "test-00000-of-00001.parquet")  # fmt: skip
    by_table = ocrbench.rows(tmp_path / "hf")
    for one, other in zip(by_json, by_table, strict=True):
        assert Path(one.source).read_bytes() == other.source
        assert (one.question, one.answers, one.dataset, one.type) == (
            other.question, other.answers, other.dataset, other.type
        )  # fmt: skip
    (ocr / "OCRBench").mkdir()
    (ocr / "OCRBench.json").rename(ocr / "OCRBench" / "OCRBench.json")  # as the repository has it
    assert ocrbench.rows(ocr) == by_json


@pytest.mark.parametrize(("row", "said", "right"), [
    (0, "It says: centre!", True), (0, "cent re", False), (0, "", False),
    (1, "x^2", True), (1, "X^2", False), (1, "it is x ^{2} .", True), (1, "x\n^ 2", True),
    (2, "It was IN 1997.", True), (2, "1997", False), (2, "in\n1997", True),
])  # fmt: skip
def test_a_prediction_is_right_where_it_contains_an_answer(ocr: Path, row: int, said: str, right: bool) -> None:
    assert ocrbench.is_right(ocrbench.rows(ocr)[row], said) is right


def test_ocrbench_from_files_to_the_table_beside_the_paper(seeing, ocr, tmp_path, capsys, monkeypatch) -> None:
    """The model says nothing of use; of two answers that are put into its mouth the score is 1 of 3."""
    argv = ["ocrbench", str(seeing), "--data", str(ocr), "--out", str(tmp_path / "out"), "--kv", "bf16,int2",
            "--device", "cpu", "--max-tokens", "4"]  # fmt: skip
    assert paper.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| method | m here | paper: LLaVA-v1.6-7B | paper: Qwen3-VL-8B | paper: Qwen3-VL-4B |"
    assert lines[2] == "| 16 bit | 0 | 536 | 858 | 852 |" and "| OScaR |  | 519 | 856 | 838 |" in lines
    assert "| `int2` | 0 |  |  |  |" in lines and "3 questions, not the 1000 of the benchmark" in lines[-1]
    file = tmp_path / "out" / "ocrbench-m-bf16.jsonl"
    written = file.read_text().splitlines()
    assert len(written) == 4 and all(json.loads(line)["answer"] for line in written[1:])
    file.write_text("\n".join([*written[:2], json.dumps({"number": 2, "answer": "in 1997"}), '{"number": 1, "ans']))
    asked = []
    monkeypatch.setattr(questions.tqdm, "__iter__", lambda bar: iter(asked.extend(bar.iterable) or bar.iterable))
    assert paper.main(argv[:-4] + ["--device", "cpu", "--max-tokens", "4"]) == 0
    assert [one.number for one in asked] == [1]  # of bf16 what had broken off, of int2 nothing
    assert capsys.readouterr().out.splitlines()[2] == "| 16 bit | 1 | 536 | 858 | 852 |"
    found = json.loads((tmp_path / "out" / "ocrbench-m-bf16.json").read_text())
    assert (found["score"], found["questions"], found["of"]) == (1, 3, 3)
    assert found["by_group"]["Doc-oriented VQA"] == [1, 1] and found["by_group"]["Text Recognition"] == [0, 1]
    assert paper.main([*argv[:-1], "5"]) == 2
    assert "answers of another run (max_tokens 4 there, 5 here)" in capsys.readouterr().err


def test_what_is_wrong_with_the_files_is_said_before_a_model_is_loaded(ocr, mmau, tmp_path, capsys) -> None:
    (ocr / "OCRBench_Images" / "HME" / "b.png").unlink()
    assert paper.main(["ocrbench", "no-such-model", "--data", str(ocr)]) == 2
    assert "HME/b.png is not there; --data must be the folder" in capsys.readouterr().err
    assert "neither OCRBench.json nor parquet" in refused(ocrbench.rows, mmau.parent / "none")
    (ocr / "OCRBench.json").write_text(json.dumps([{**OCR[0], "type": "Reading"}]))
    assert "has the type 'Reading', which OCRBench has not" in refused(ocrbench.rows, ocr)
    (ocr / "OCRBench.json").write_text("[{}]")
    assert "is not OCRBench.json ('image_path'" in refused(ocrbench.rows, ocr)
    assert "has no column 'image'" in refused(ocrbench.rows, mmau)
    (mmau / "data" / "b.wav").unlink()
    assert "b.wav is not there" in refused(mmau_pro.rows, mmau)
    (mmau / "test.parquet").write_bytes(b"PAR1 no parquet")
    assert "cannot be read as parquet" in refused(mmau_pro.rows, mmau)
    for more, why in ((["--limit", "0"], "--limit 0"), (["--kv", "int3"], "--kv 'int3'"), (["--all"], "of mmau-pro")):
        assert why in refused(paper.parsed, ["ocrbench", "m", "--data", str(tmp_path), *more])


def test_a_model_that_does_not_read_pictures_is_refused(ocr, smollm2_like, tmp_path) -> None:
    why = refused(questions.ask, smollm2_like, [ocrbench.rows(ocr)[0].asked], tmp_path / "a.jsonl", {"max_tokens": 1})
    assert why == "this model reads no images; take one that does" and not (tmp_path / "a.jsonl").exists()


@pytest.fixture
def smollm2_like(tmp_path: Path):
    from .tiny import load, write_talker

    return load(write_talker(tmp_path / "text", 1), "bf16")


def test_some_of_the_questions_are_spread_over_all_of_them() -> None:
    assert questions.some(range(10), 4) == [0, 2, 5, 7] and questions.some(range(3), None) == [0, 1, 2]


# --- MMAU-Pro


def test_questions_with_choices_list_them_and_others_are_asked_as_they_are(mmau: Path) -> None:
    assert [row.category for row in mmau_pro.rows(mmau)] == ["open", "instruction following"]
    found = mmau_pro.rows(mmau, ())
    assert [row.asked.text for row in found] == ["t05", "t07", "t08\n\nA. t01\nB. t02"]
    assert [Path(name).name for name in found[2].asked.sources] == ["a.wav", "b.wav"]


FOLLOWED = [  # task, settings, an answer that follows, one that does not
    ("Include Keywords", {"keywords": "Rain, wind"}, "wind and RAIN", "rain"),
    ("Forbidden Words", {"forbidden_words": "rain, Wind"}, "sun", "a WINDOW"),
    ("Keyword Frequency", {"keyword": "Bell", "N": 2}, "bell, BELL. bells", "bell"),
    ("Number Paragraphs", {"N": 2}, "a *** b ***  ", "a *** b *** c"),
    ("Number Bullets", {"N": 2}, "* a\n  * b", "a * b * c"),
    ("Number Placeholder", {"N": 2}, "[a] [b c] [d]", "[a] []"),
    ("Minimum Number Highlighted Section", {"N": 2}, "*a* and *b*", "*a*"),
    ("Multiple Sections", {"section_splitter": "Section", "N": 2}, "Section a Section b", "a Section b Section c"),
    ("Postscript", {"postscript_marker": "P.S."}, "x\np.s. y", "x"),
    ("Start Checker", {"start_phrase": "My answer:"}, "my answer, is", "It is my answer"),
    ("End Checker", {"end_phrase": "the end."}, "This is The End", "the end of it"),
    ("Repeat Prompt", {}, " Name it. A bell", "A bell"),
    ("Title", {}, "<<Bells>> ring", "<>"),
    ("Two Responses", {}, "a****** b", "a****** A"),
    ("All Uppercase", {}, "A 1!", "A b"),
    ("All Lowercase", {}, "a 1!", "A b"),
    ("Quotation", {}, ' "a" ', '"a" b'),
    ("No Commas", {}, "a; b", "a, b"),
    ("Number Words (at least)", {"N": 2}, "a b", "a"),
    ("Number Words (at most)", {"N": 2.0}, "a b", "a b c"),
    ("Number Words (range)", {"N1": 2, "N2": 3}, "a b c", "a"),
    ("Number Sentences (at least)", {"N": 2}, "A. B.", "A."),
    ("Number Sentences (at most)", {"N": 1}, "A.", "A. B."),
    ("Number Sentences (range)", {"N1": 2, "N2": 2}, "A. B.", "A. B. C."),
    ("All-capital Words (at least)", {"N": 2}, "A BC d", "A bc"),
    ("All-capital Words (at most)", {"N": 1}, "A bc", "A BC"),
    ("All-capital Words (range)", {"N1": 1, "N2": 2}, "A BC d", "a"),
]


@pytest.mark.parametrize(("task", "settings", "good", "bad"), FOLLOWED)
def test_an_instruction_is_followed_or_not(task: str, settings: dict, good: str, bad: str, monkeypatch) -> None:
    """Settings of other tasks are None there, as a struct of parquet has them."""
    monkeypatch.setattr(mmau_pro, "_splitter", lambda: lambda text: text.rstrip(".").split(". "))  # nltk's has data
    row = Row(0, ("a.wav",), "name it.", mmau_pro.FOLLOWING, task=task, settings={**NO_SETTINGS, **settings})
    assert follows(row, good) and not follows(row, bad)


def test_every_rule_is_tested_and_an_unknown_one_is_refused(mmau: Path) -> None:
    assert {task for task, *_ in FOLLOWED} == set(RULES)
    rows = [MMAU[0], MMAU[1] | {"task_identifier": "Whistle"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), mmau / "test.parquet")
    assert "question 1 of" in refused(mmau_pro.rows, mmau) and "'Whistle'" in refused(mmau_pro.rows, mmau)


def test_mmau_pro_from_files_to_their_judge_and_the_table(mmau: Path, tmp_path: Path, capsys) -> None:
    model = tmp_path / "Omni2.5"
    model.mkdir()
    omni.folder(model, "qwen3-omni")
    out = tmp_path / "out"
    argv = ["mmau-pro", str(model), "--data", str(mmau), "--out", str(out), "--kv", "bf16", "--device", "cpu"]
    argv += ["--max-tokens", "4"]
    assert paper.main(argv) == 0
    printed = capsys.readouterr()
    assert "| 16 bit | – | – | 100.0 | 66.2 | 27.8 | 87.4 |" in printed.out.splitlines()
    assert "open answers are not judged: run MMAU-Pro's own script on" in printed.err
    table = pyarrow.parquet.read_table(out / "mmau-pro-Omni2.5-bf16.parquet")
    assert table.column_names == [*MMAU[0], "model_output"] and table["id"].to_pylist() == ["o", "i"]
    lines = (out / "mmau-pro-Omni2.5-bf16.jsonl").read_text().splitlines()[1:]
    assert table["model_output"].to_pylist() == [json.loads(line)["answer"] for line in lines]
    marks = {"avg_overall": 3.31, "good_response_rate": 0.278}
    judged = {"category_results": {"open": {"type": "openended", "count": 1, "metrics": marks}}}
    (out / "mmau-pro-Omni2.5-bf16_comprehensive_results.json").write_text(json.dumps(judged))
    assert paper.main(argv) == 0
    assert "| 16 bit | 66.2 | 27.8 | 100.0 | 66.2 | 27.8 | 87.4 |" in capsys.readouterr().out.splitlines()
    lines[0] = json.dumps({"number": 0, "answer": "another"})  # what was judged is not what stands there now
    head = (out / "mmau-pro-Omni2.5-bf16.jsonl").read_text().splitlines()[0]
    (out / "mmau-pro-Omni2.5-bf16.jsonl").write_text("\n".join([head, *lines]))
    assert paper.main(argv) == 0
    assert "| 16 bit | – | – | 100.0 | 66.2 | 27.8 | 87.4 |" in capsys.readouterr().out.splitlines()


def test_a_question_that_cannot_be_asked_counts_as_wrong_and_is_said(mmau: Path, tmp_path: Path, capsys) -> None:
    import numpy as np

    (mmau / "data" / "a.wav").write_bytes(wav(np.zeros(60 * 100), rate=100))  # the context holds 39 s
    model = tmp_path / "m"
    model.mkdir()
    omni.folder(model, "qwen3-omni")
    argv = ["mmau-pro", str(model), "--data", str(mmau), "--out", str(tmp_path), "--kv", "bf16", "--device", "cpu"]
    assert paper.main([*argv, "--max-tokens", "2"]) == 0
    assert "[question 0 counts as wrong: " in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "mmau-pro-m-bf16.jsonl").read_text().splitlines()[1:]]
    assert lines[0]["answer"] == "" and "60 s long" in lines[0]["error"] and lines[1]["answer"]
