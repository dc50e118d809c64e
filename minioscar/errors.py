"""The two ways a command can end badly; the command line turns them into one line on stderr and an exit code."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Wrong use or wrong input (exit code 2): the message names the thing, the reason and the way out, in one line."""


class TooLarge(UserError):
    """A picture, a sound or a video with more tokens than are accepted. code: what the server's answer calls it."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.code = f"{kind}_too_large"  # of pictures as OpenAI has it


class Failure(Exception):
    """The work itself failed (exit code 1): a download that broke off, a card that ran out of memory."""


class ChatTemplateError(UserError):
    """A prompt that cannot be rendered as a chat: the message says so for every caller, `said` for one command."""

    ways = {"generate": "use --raw", "cache": "use --raw", "chat": "use generate --raw"}

    def __init__(self, reason: str, command: str = "generate"):
        super().__init__(f"{reason}; {self.ways[command]} (in Python: generate(..., chat=False))")
        self.reason = reason


def said(error: BaseException, command: str) -> str:
    """What a command prints of an error."""
    known = isinstance(error, ChatTemplateError) and command in error.ways
    return f"{error.reason}; {error.ways[command]}" if known else str(error)


def one_line(error: BaseException) -> str:
    """What another library says is wrong, in a line of an error; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def shown(value: Any) -> str:
    """A value in a line of an error: short, whatever it is."""
    try:
        # a number of NumPy's without its type
        text = str(value) if getattr(value, "shape", None) == () else repr(value)
    except Exception:  # Python prints no number of more than 4,300 digits
        return f"({type(value).__name__})"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."
