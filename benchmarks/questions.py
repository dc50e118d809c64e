"""Questions of a data set about pictures or sounds -> a model's answers, in a file that a run which broke off goes on
with. Greedy, one question at a time."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minioscar.engine import Engine
from minioscar.errors import UserError


@dataclass(frozen=True)
class Question:
    """number: of its row in the data set. sources: names or bytes of the files it is about, all of one kind."""

    number: int
    kind: str
    sources: tuple[Any, ...]
    text: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        media = [{"type": self.kind, self.kind: source} for source in self.sources]
        text = [{"type": "text", "text": self.text}] if self.text else []
        return [{"role": "user", "content": [*media, *text]}]


def some(rows: Sequence[Any], limit: int | None) -> list[Any]:
    """At most so many of them, evenly: data sets are sorted by kind."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def missing(path: Path) -> UserError:
    return UserError(f"{path} is not there; --data must be the folder into which the data set's files were unpacked")


def ask(engine: Engine, questions: Sequence[Question], file: Path, about: dict[str, Any]) -> dict[int, str]:
    """The answers by number; those that `file` holds are not asked again. about: `max_tokens`, and what else makes
    answers other ones. A question that cannot be asked (a sound beyond the context) has the answer "", and is said.

    Raises UserError for a model that does not read what they are about, and for a file of other questions.
    """
    kinds = {question.kind for question in questions} - set(engine.config.towers)
    if kinds:
        raise UserError(f"this model reads no {kinds.pop()}s; take one that does")
    texts = json.dumps([(one.number, one.text, len(one.sources)) for one in questions]).encode()
    head = {**about, "kv": engine.scheme.name, "questions": hashlib.sha256(texts).hexdigest()}
    answers = {line["number"]: line["answer"] for line in _begun(file, head)}
    waiting = [question for question in questions if question.number not in answers]
    with open(file, "a", encoding="utf-8") as out:
        for question in tqdm(waiting, desc=f"{file.stem}", unit="question", leave=False):
            line: dict[str, Any] = {"number": question.number, "answer": ""}
            try:
                answer = engine.generate(question.messages, max_tokens=about["max_tokens"])
                line |= {"answer": answer.text, "prompt_tokens": answer.prompt_tokens, "ends": answer.finish_reason}
            except UserError as error:
                line["error"] = str(error)
                print(f"[question {question.number} counts as wrong: {error}]", file=sys.stderr, flush=True)
            print(json.dumps(line), file=out, flush=True)
            answers[question.number] = line["answer"]
    return answers


def _begun(file: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of an earlier run; begins the file where there was none, and leaves out a line that broke off."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    whole = [line for line in lines if _is_whole(line)]
    if whole and (found := json.loads(whole[0])) != head:
        other = next(name for name in {**found, **head} if found.get(name) != head.get(name))
        why = f"{other} {found.get(other)!r} there, {head.get(other)!r} here"
        raise UserError(f"{file} has answers of another run ({why}); name another --out, or remove it")
    file.write_text("".join(f"{line}\n" for line in whole or [json.dumps(head)]), encoding="utf-8")
    return [json.loads(line) for line in whole[1:]]


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
