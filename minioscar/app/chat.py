"""The `chat` command: a conversation in a terminal, or on a pipe, one message a line.

stdout carries the answers; everything else goes to stderr. Editing and history are the readline of Python's standard
library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..cache import cache_bytes
from ..errors import Failure, UserError, said
from ..oscar import SCHEMES
from ..storage import strict_json as json
from ..storage.files import ZEROS, expand, replacing, stdin, stdin_as_text
from ..tables import size
from ..towers.media import KINDS, Medium, hidden
from .conversation import Conversation

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'
HELP = f"""\
/image FILE   a picture in front of the next message
/audio FILE   a sound in front of it
/video FILE   a video in front of it
/retry        another answer to the last message
/undo         take the last message and its answer back
/reset        begin anew (the system message or the document of --cache stays)
/save FILE    write the conversation: FILE.safetensors with its cache, for chat --cache; FILE.json its messages
/stats        context, cache and speed
/help         this
/exit         leave; so does Ctrl-D
{QUOTES}           begins and ends a message of several lines; behind a \\ at its end, too, a line goes on
Ctrl-C        stops an answer; what there is of it stays part of the conversation"""
CUT = {"length": "raise --max-tokens", "context": "the context is full, /reset begins anew"}


class Lines:
    """Messages from the user: with editing and history where this is a terminal."""

    def __init__(self) -> None:
        stdin()  # refused at once where it is closed
        self.terminal, self.begun = sys.stdin.isatty(), False
        self.editing = self.terminal and sys.stdout.isatty()
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        # ~ stays where there is no home
        self.history = None if state.startswith("~") else Path(state) / "minioscar" / "history"

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Reads the history of earlier conversations and writes this one's behind it."""
        readline = _readline() if self.editing else None
        if readline and self.history:
            with contextlib.suppress(OSError):
                readline.read_history_file(self.history)
        try:
            yield
        finally:
            if readline and self.history:
                # a home that cannot be written costs the history, no more
                with contextlib.suppress(OSError, UserError, Failure):
                    self.history.parent.mkdir(parents=True, exist_ok=True)
                    readline.set_history_length(1000)
                    with replacing(self.history, mode=0o600) as partial:
                        readline.write_history_file(partial)

    def message(self) -> str:
        """One message. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C, UserError for text that is not
        UTF-8."""
        try:
            text = self._message()
            text.encode()
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"standard input cannot be read ({why}); give it a file or a pipe (< F)") from None
        except UnicodeError:
            raise UserError("the message is not valid Unicode (was it UTF-8?); convert it to UTF-8") from None
        if "\0" in text:
            raise UserError(f"the message {ZEROS}")
        return text

    def _message(self) -> str:
        line = self._line(PROMPT)
        quoted = line.lstrip().startswith(QUOTES)
        lines = [line.lstrip().removeprefix(QUOTES) if quoted else line]
        with contextlib.suppress(EOFError):  # then the message is what there is
            while not lines[-1].rstrip().endswith(QUOTES) if quoted else lines[-1].endswith("\\"):
                lines[-1] = lines[-1] if quoted else lines[-1][:-1]
                lines.append(self._line(MORE))
        text = "\n".join(lines)
        return text.rstrip().removesuffix(QUOTES).strip("\n") if quoted else text

    def _line(self, prompt: str) -> str:
        if self.editing:
            return input(prompt)
        if self.terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        elif not self.begun:
            stdin_as_text()
            self.begun = True
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


def _readline() -> Any:
    try:
        import readline
    except ImportError:  # Windows
        return None
    with contextlib.suppress(Exception):  # libedit has no such setting
        readline.parse_and_bind("set enable-bracketed-paste on")  # lines that are pasted stay one message
    return readline


class Stop:
    """Ctrl-C while an answer is written asks it to stop behind its newest token, which keeps the cache whole; a second
    one, or one before the first token, interrupts at once.
    """

    def __init__(self) -> None:
        self.asked = self.writing = False

    def __enter__(self) -> Stop:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_: object) -> None:
        if self.asked or not self.writing:
            raise KeyboardInterrupt
        self.asked = True


def talk(conversation: Conversation, options: dict[str, Any], quiet: bool = False) -> None:
    """Reads messages and prints answers until the user leaves. quiet: prints no answers. Errors end it only on a
    pipe."""
    lines = Lines()
    if lines.terminal:
        _say(
            f"{conversation.context} tokens of context, {conversation.engine.scheme.name} cache; /help lists the "
            "commands"
        )
    with lines.remembered():
        while True:
            try:
                text = lines.message()
                if text.startswith("/") and lines.terminal:
                    if not command(conversation, text, options):
                        break
                elif text.strip():
                    answer(conversation, conversation.say(text, **options), quiet)
            except EOFError:
                break
            except KeyboardInterrupt:  # at the prompt; `answer` takes care of its own
                if not lines.terminal:
                    raise
                _say("\n(Ctrl-D or /exit leaves)")
            except (UserError, Failure) as error:
                if not lines.terminal:
                    raise
                _say(f"minioscar: {' '.join(said(error, 'chat').split())}")
    if lines.terminal:
        _say("")


def answer(
    conversation: Conversation, answer: Generator[str, None, None], quiet: bool = False, again: bool = False
) -> None:
    """One turn, or another answer in it; how it went goes to stderr."""
    with Stop() as stop, contextlib.closing(answer) as pieces:
        try:
            for piece in pieces:
                stop.writing = True
                if not quiet:
                    print(piece, end="", flush=True)
                if stop.asked:
                    break
        except KeyboardInterrupt:
            stop.asked = True
    if not quiet:
        print(flush=True)
    if stop.asked and not stop.writing:
        left = "the old one stays" if again else "the message is not part of the conversation"
        _say(f"[interrupted before the answer began; {left}]")
        return
    last, note = conversation.last, ""
    if stop.asked:
        note = "; stopped"
    elif last.finish_reason in CUT:
        note = f"; cut: {CUT[last.finish_reason]}"
    read = f"{last.prefilled_tokens} tokens read, {last.new_tokens} written ({last.tokens_per_s:.1f} a second)"
    _say(f"[{used(conversation)}; {read}{note}]")


def used(conversation: Conversation) -> str:
    held, context = len(conversation.held), conversation.context
    return f"context {held} of {context} ({held / context:.0%})"


def summary(conversation: Conversation) -> dict[str, Any]:
    """The object of `chat --json`."""
    engine = conversation.engine
    return {
        "messages": hidden(conversation.messages, Medium.to_json), "kv": engine.scheme.name, "device": engine.ops.name,
        "context": conversation.context,
        "context_used": len(conversation.held),
    }


def command(conversation: Conversation, line: str, options: dict[str, Any]) -> bool:
    """Runs a /command; False if it is the one that leaves. Raises UserError for one that is not there."""
    name, _, argument = line.strip().partition(" ")
    commands: dict[str, Callable[[], None]] = {
        **{f"/{kind}": partial(show, conversation, kind, argument.strip()) for kind in KINDS},
        "/retry": lambda: retry(conversation, options),
        "/undo": lambda: undo(conversation),
        "/reset": lambda: reset(conversation),
        "/save": lambda: save(conversation, argument.strip()),
        "/stats": lambda: _say(stats(conversation)),
        "/help": lambda: _say(HELP),
    }
    if name in ("/exit", "/quit"):
        return False
    if name not in commands:
        raise UserError(f"there is no {name}; /help lists the commands, a space in front makes it a message")
    if argument and name not in ("/save", "/image", "/audio", "/video"):
        raise UserError(f"{name} takes nothing behind it; a space in front makes the line a message")
    commands[name]()
    return True


def show(conversation: Conversation, kind: str, path: str) -> None:
    if not path:
        raise UserError(f"/{kind}: name a file")
    media = conversation.show(path, kind)
    _say(f"[{media[0].name}: {sum(medium.tokens for medium in media)} tokens, with the next message]")


def retry(conversation: Conversation, options: dict[str, Any]) -> None:
    again = conversation.retry(**options)
    if options["sampling"].temperature == 0:
        _say("[temperature 0 is greedy: the answer will be the same; chat --temperature 0.7 draws others]")
    answer(conversation, again, again=True)


def undo(conversation: Conversation) -> None:
    conversation.undo()
    _say(f"[taken back; {len(conversation.messages)} messages are left]")


def reset(conversation: Conversation) -> None:
    conversation.reset()
    _say(f"[begun anew; {used(conversation)}]")


def save(conversation: Conversation, path: str) -> None:
    if path.endswith(".json"):
        text = json.dumps(hidden(conversation.messages, Medium.to_json), indent=1, ensure_ascii=False) + "\n"
        with replacing(path, inputs=conversation.engine.model_files) as partial:
            partial.write_text(text, encoding="utf-8")
    elif path.endswith(".safetensors"):
        conversation.save(path)
    else:
        raise UserError(
            f"/save {path}: name a file that ends in .safetensors (with the cache, for chat --cache) or .json (the "
            "messages)"
        )
    _say(f"[saved {path}, {size(os.path.getsize(expand(path)))}]")


def stats(conversation: Conversation) -> str:
    engine, last = conversation.engine, conversation.last
    ours, bf16 = (
        cache_bytes(engine.config, scheme, 1, conversation.context) for scheme in (engine.scheme, SCHEMES["bf16"])
    )
    lines = [
        f"{used(conversation)}, {len(conversation.messages)} messages",
        f"{engine.scheme.name} cache on {engine.ops.name}: {size(ours)} for the whole context, {bf16 / ours:.2f}x "
        "less than bf16",
        f"memory free: {size(engine.ops.free_bytes())}",
    ]
    if last:
        read = f"{last.prefilled_tokens} of its prompt's {last.prompt_tokens} tokens read in {last.prefill_s:.2f} s"
        lines.append(
            f"last answer: {read}, {last.new_tokens} written in {last.decode_s:.2f} s ({last.tokens_per_s:.1f} a "
            "second)"
        )
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
