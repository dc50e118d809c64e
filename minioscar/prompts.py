"""Many prompts from a JSONL file, answered in batches, in their order; a bad line spoils none of the others.

A line is a JSON string, or an object with "prompt" (text) or "messages" (a chat), and perhaps "id", which comes back. A line of the
result is the object of `generate --json` with "line" (from 1) and "id", or {"line", "id", "error"}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from .errors import Failure, UserError
from .generation import Generation, Options
from .prompt_cache import Message, PromptCache, well_formed

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Line:
    """prompt is None where error says why."""

    number: int
    prompt: str | list[Message] | None = None
    error: str | None = None
    id: Any = None

    def head(self) -> dict[str, Any]:
        return {"line": self.number} | ({} if self.id is None else {"id": self.id})


def parse(lines: Iterable[bytes]) -> Iterator[Line]:
    """Every line that is not blank, from 1 on, whatever it holds."""
    for number, raw in enumerate(lines, 1):
        raw = raw.removeprefix(b"\xef\xbb\xbf").strip()
        if raw:
            yield _line(number, raw)


def _line(number: int, raw: bytes) -> Line:
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return Line(number, error=f"not JSON in UTF-8: {' '.join(str(error).split())[:200]}")
    if isinstance(value, str):
        value = {"prompt": value}
    id = value.get("id") if isinstance(value, dict) else None
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        return Line(number, error='needs to be a string, or an object with either "prompt" or "messages"', id=id)
    if "prompt" in value:
        prompt, good = value["prompt"], isinstance(value["prompt"], str) and value["prompt"]
        return Line(number, prompt, id=id) if good else Line(number, error='"prompt" must be text, and not empty', id=id)
    if not well_formed(value["messages"]):
        return Line(number, error='"messages" must be a list of objects {"role": text, "content": text}', id=id)
    return Line(number, value["messages"], id=id)


def answers(
    engine: Engine, lines: Iterable[Line], *, batch: int, options: Options, ctx: int | None = None, chat: bool | None = None,
    cache: PromptCache | None = None,
) -> Iterator[tuple[Line, list[Generation]]]:
    """Each line with its answers (`options.n`), or with its error and none, in order.

    `batch` prompts run at a time. One that does not fit spoils no others; a batch that does not fit into memory is halved.
    """
    lines = iter(lines)
    while group := list(islice(lines, batch)):
        checked = [_checked(engine, line, options, ctx, chat, cache) for line in group]
        good = [line for line in checked if line.error is None]
        done = dict(zip((line.number for line in good), _answered(engine, good, options, ctx, chat, cache), strict=True))
        yield from (done.get(line.number, (line, [])) for line in checked)


def _checked(engine: Engine, line: Line, options: Options, ctx: int | None, chat: bool | None, cache: PromptCache | None) -> Line:
    if line.error is None:
        try:
            engine.capacity([engine.encode(line.prompt, chat, cache)], options, ctx, cache)
        except UserError as error:
            return Line(line.number, error=str(error), id=line.id)
    return line


def _answered(engine: Engine, lines: Sequence[Line], options: Options, *rest: Any) -> list[tuple[Line, list[Generation]]]:
    if not lines:
        return []
    ctx, chat, cache = rest
    try:
        sequences = [line.number * options.n + i for line in lines for i in range(options.n)]  # draws do not depend on the batch
        run = engine.start([line.prompt for line in lines], options=options, ctx=ctx, chat=chat, cache=cache, sequences=sequences)
        for _ in run:
            pass
    except (UserError, Failure) as error:
        if len(lines) == 1:
            return [(Line(lines[0].number, error=str(error), id=lines[0].id), [])]
        half = len(lines) // 2
        return [*_answered(engine, lines[:half], options, *rest), *_answered(engine, lines[half:], options, *rest)]
    return [(line, run.results[i * options.n : (i + 1) * options.n]) for i, line in enumerate(lines)]
