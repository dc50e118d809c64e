"""Many prompts from a JSONL file, answered in batches, in their order; a bad line spoils none of the others.

A line is a JSON string, or an object with "prompt" (text) or "messages" (a chat), and perhaps "system", "id", which
comes back, and settings of its own (`SETTINGS`). A line of the result is the object of `generate --json` with "line"
(from 1) and "id", or {"line", "id", "error"}; with --stream {"line", "id", "piece"} for each piece of the text come
before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..answers import Generation
from ..arguments import is_chat
from ..chat_template import Message, malformed
from ..config import Config
from ..errors import Failure, UserError, one_line, said, shown
from ..options import Options
from ..plans import BATCH_TOKENS
from ..prompt_cache import PromptCache, continued
from ..sampling import Sampling
from ..storage import strict_json
from ..storage.hub import resolve
from ..towers import pictures, sound, video
from ..towers.media import media_of, opened

if TYPE_CHECKING:
    from ..engine import Engine

SAMPLING = [one.name for one in fields(Sampling)]
SETTINGS = [*SAMPLING, *(one.name for one in fields(Options) if one.name not in ("sampling", "graph"))]
KEYS = ["prompt", "messages", "id", "system", *SETTINGS]


@dataclass(frozen=True)
class Line:
    """prompt is None where error says why. settings: the line's own, by name; options: what they make of those for all,
    once checked."""

    number: int
    prompt: str | list[Message] | None = None
    error: str | None = None
    id: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Options | None = None

    def head(self) -> dict[str, Any]:
        return {"line": self.number} | ({} if self.id is None else {"id": self.id})


def parse(lines: Iterable[bytes]) -> Iterator[Line]:
    """Every line that is not blank, from 1 on, whatever it holds."""
    for number, raw in enumerate(lines, 1):
        raw = raw.removeprefix(b"\xef\xbb\xbf").strip()
        if raw:
            yield _line(number, raw)


def _line(number: int, raw: bytes) -> Line:
    id = None
    try:
        value = json.loads(raw.decode())
        if isinstance(value, dict):
            strict_json.check(value.get("id"))
            id = value.get("id")
        strict_json.check(value)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return Line(number, error=f"not JSON in UTF-8: {one_line(error)}", id=id)
    try:
        value = {"prompt": value} if isinstance(value, str) else value
        return Line(
            number, _prompt(value), id=id,
            settings={name: value[name] for name in SETTINGS if value.get(name) is not None}
        )
    except UserError as error:
        return Line(number, error=str(error), id=id)


def _prompt(value: Any) -> str | list[Message]:
    """Of a line. Raises UserError for anything but one prompt, and for a key that no line has."""
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise UserError('needs to be a string, or an object with either "prompt" or "messages"')
    for name in value:
        if name not in KEYS:
            near = get_close_matches(name, KEYS, 1)
            way_out = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(KEYS)}"
            raise UserError(f"there is no key {shown(name)}; {way_out}")
    if "prompt" in value and not (isinstance(value["prompt"], str) and value["prompt"]):
        raise UserError('"prompt" must be text, and not empty')
    if "messages" in value and (why := malformed(value["messages"])):
        raise UserError(f'"messages" must be a list of objects {{"role": text, "content": text}}: {why}')
    system, messages = value.get("system"), value.get("messages")
    if system is None:
        return messages or value["prompt"]
    if not isinstance(system, str):
        raise UserError('"system" must be text')
    if messages and messages[0]["role"] == "system":
        raise UserError('"system" and a system message in "messages" say the same; leave one of them out')
    return [{"role": "system", "content": system}, *(messages or [{"role": "user", "content": value["prompt"]}])]


def prepared(media: Sequence[Mapping[str, Any]], model: str) -> list[Mapping[str, Any]]:
    """These parts as the model reads them. Raises UserError for what is no picture, sound or video, before a model is
    looked for, and for what is not for this model, before its weights are read."""
    for part in media:
        file = part[part["type"]]
        if part["type"] == "image":
            pictures.opened(file, file, says=False)  # it is opened again, for the model
        elif part["type"] == "audio":
            sound.opened(file, file, math.inf)
        else:
            with video.opened(file, file):
                pass
    if not media:
        return []
    towers = Config.from_folder(resolve(model, weights=False)).towers
    [message] = opened([{"role": "user", "content": media}], towers)
    return message["content"]


def with_media(media: Sequence[Mapping[str, Any]], prompt: str, cache: PromptCache | None) -> list[Message]:
    """A text behind pictures, sounds and videos, parts of a user's message: the first one, or what follows those of a
    prompt cache."""
    if cache is not None and cache.messages is None:
        why = "needs a chat, but this prompt cache holds plain text; make it again without --raw"
        kind = next(part["type"] for part in media if part["type"] != "text")
        raise UserError(f"--{kind} {why}")
    text = [{"type": "text", "text": prompt}] if prompt else []
    return continued([] if cache is None else cache.messages, [*media, *text])


def configured(options: Options, settings: Mapping[str, Any]) -> Options:
    """The options for all, and what a line says itself. Raises UserError as `Options` does."""
    sampling = {name: value for name, value in settings.items() if name in SAMPLING}
    rest = {name: value for name, value in settings.items() if name not in SAMPLING}
    return replace(options, sampling=replace(options.sampling, **sampling), **rest)


def answers(
    engine: Engine, lines: Iterable[Line], *, batch: int, options: Options,
    piece: Callable[[Line, int, str], None] | None = None,
    **how: Any,
) -> Iterator[tuple[Line, list[Generation]]]:
    """Each line with its answers (as many as its `n`), or with its error and none, in order.

    `batch` prompts run at a time. One that does not fit spoils no others; a batch that does not fit into memory is
    halved. piece: is told the text as it comes, with its line and answer. how: ctx, chat, cache and template, as
    `Engine.start` takes them.
    """
    lines = iter(lines)
    while group := list(islice(lines, batch)):
        checked = [_checked(engine, line, options, how) for line in group]
        good = [line for line in checked if line.error is None]
        done = dict(zip((line.number for line in good), _answered(engine, good, piece, how), strict=True))
        yield from (done.get(line.number, (line, [])) for line in checked)


def _checked(engine: Engine, line: Line, options: Options, how: Mapping[str, Any]) -> Line:
    if line.error is not None:
        return line
    try:
        line = replace(line, options=configured(options, line.settings))
        line = replace(line, prompt=engine.opened(line.prompt))
        ids = engine.encode(line.prompt, *(how.get(name) for name in ("chat", "cache", "template")))
        media = media_of(line.prompt) if is_chat(line.prompt) else ()
        engine.capacity([ids], line.options, how.get("ctx"), how.get("cache"), media)
        return line
    except UserError as error:
        return replace(line, error=said(error, "generate"))


def _answered(
    engine: Engine, lines: Sequence[Line], piece: Callable[[Line, int, str], None] | None, how: Mapping[str, Any]
) -> list[tuple[Line, list[Generation]]]:
    if not lines:
        return []
    each = [(line, i) for line in lines for i in range(line.options.n)]
    sequences, begun = [line.number * BATCH_TOKENS + i for line, i in each], False  # draws do not depend on the batch
    try:
        run = engine.start(
            [line.prompt for line in lines], options=[line.options for line in lines], sequences=sequences, **how
        )
        for answer, text in run:
            if piece and text:
                begun = True
                piece(*each[answer], text)
    except (UserError, Failure) as error:
        if len(lines) == 1:
            return [(replace(lines[0], error=str(error)), [])]
        half, piece = len(lines) // 2, None if begun else piece  # what has been told is not told again
        return [*_answered(engine, lines[:half], piece, how), *_answered(engine, lines[half:], piece, how)]
    return [(line, run.results[first : first + line.options.n]) for line, first in zip(lines, run.first, strict=True)]
