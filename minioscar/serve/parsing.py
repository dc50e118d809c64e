"""What an answer consists of: thoughts, text and calls of tools, told apart while it comes.

A parser takes text and gives parts, (kind, value): ("reasoning", text), ("content", text), ("call", Call). No text is
lost: what looks like a call and is none is content.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from json import JSONDecoder
from typing import Any

from ..answers import begun
from ..storage import strict_json as json

Part = tuple[str, Any]
THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON


class Thoughts:
    """Thoughts stand at the beginning, between <think> and </think>. is_thinking: the prompt has opened them."""

    def __init__(self, is_thinking: bool):
        self.state, self.held = "thinking" if is_thinking else "start", ""

    def add(self, text: str) -> list[Part]:
        parts: list[Part] = []
        self.held += text
        if self.state == "start":
            text = self.held.lstrip()
            if text.startswith(THINK):
                self.state, self.held = "thinking", text[len(THINK) :]
            elif not THINK.startswith(text):
                self.state = "said"
        if self.state == "thinking":
            thought, mark, rest = self.held.partition(THOUGHT)
            end = len(thought) - (0 if mark else begun(thought, THOUGHT))
            parts.append(("reasoning", thought[:end]))
            self.held = rest if mark else thought[end:]
            self.state = "between" if mark else "thinking"
        if self.state == "between":
            self.held = self.held.lstrip("\n")
            self.state = "said" if self.held else "between"
        if self.state == "said":
            parts.append(("content", self.held))
            self.held = ""
        return parts

    def flush(self) -> list[Part]:
        held, self.held = self.held, ""
        return [("reasoning" if self.state == "thinking" else "content", held)]


class HermesCalls:
    """Calls stand between <tool_call> and </tool_call>; white space between and before them is none of the text."""

    def __init__(self) -> None:
        self.held, self.is_inside, self.has_called = "", False, False

    def add(self, text: str) -> list[Part]:
        parts: list[Part] = []
        self.held += text
        while True:
            found, mark, rest = self.held.partition(CALLED if self.is_inside else CALL)
            if not mark:
                break
            parts += _called(found, CALL + found + CALLED) if self.is_inside else [("content", found.rstrip())]
            self.is_inside, self.held, self.has_called = not self.is_inside, rest, self.is_inside
        if not self.is_inside:
            end = len(self.held) - begun(self.held, CALL)
            end = len(self.held[:end].rstrip())
            parts.append(("content", self.held[:end]))
            self.held = self.held[end:]
        return parts

    def flush(self) -> list[Part]:
        held, self.held = self.held, ""
        if self.is_inside:
            return _called(held, CALL + held)
        return [] if self.has_called and not held.strip() else [("content", held)]


class LlamaCalls:
    """An answer that begins with { is one call, or several with semicolons between, if it can be read as such."""

    def __init__(self) -> None:
        self.held, self.is_text = "", False

    def add(self, text: str) -> list[Part]:
        self.held += text
        begins = self.held.lstrip()
        self.is_text = self.is_text or bool(begins) and not begins.startswith("{")
        held, self.held = (self.held, "") if self.is_text else ("", self.held)
        return [("content", held)]

    def flush(self) -> list[Part]:
        held, self.held, parts, decoder = self.held, "", [], JSONDecoder()
        rest = held.strip()
        while rest:
            try:
                _, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return [("content", held)]
            parts += _called(rest[:end], "")
            rest = rest[end:].lstrip(" ;\n")
        return parts if all(kind == "call" for kind, _ in parts) else [("content", held)]


def _called(text: str, whole: str) -> list[Part]:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return [("content", whole)]
    arguments = call.get("arguments", call.get("parameters", {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return [("call", Call(call["name"], written))]


class Parser:
    """thinking: whether the prompt has opened thoughts, None: the model has none. calls: their form, None: there are no
    tools."""

    def __init__(self, thinking: bool | None, calls: str | None):
        self.thoughts = None if thinking is None else Thoughts(thinking)
        self.calls = None if calls is None else LlamaCalls() if calls == "llama3" else HermesCalls()

    def add(self, text: str) -> list[Part]:
        return self._joined(self._calls(self.thoughts.add(text) if self.thoughts else [("content", text)]))

    def flush(self) -> list[Part]:
        parts = self._calls(self.thoughts.flush() if self.thoughts else [])
        return self._joined([*parts, *(self.calls.flush() if self.calls else [])])

    def _calls(self, parts: Iterable[Part]) -> list[Part]:
        found: list[Part] = []
        for kind, value in parts:
            found += self.calls.add(value) if self.calls and kind == "content" else [(kind, value)]
        return found

    @staticmethod
    def _joined(parts: list[Part]) -> list[Part]:
        return [part for part in parts if part[1] != ""]


def is_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends within thoughts."""
    return prompt.rstrip().endswith(THINK)
