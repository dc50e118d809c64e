"""Text as it comes out of the model token by token.

The decoder of tokenizer.json is a chain of steps over the list of all tokens. Here each step takes one token at a time
and keeps what it has to know of those before: streamed text is decoded text for every chain, at a cost per token that
does not grow.

`tokenizers.decoders.DecodeStream` decodes its newest tokens again and again instead. It drops the last bytes of an
answer where they are no whole character, shows bytes that are no UTF-8 only once valid text follows (and decodes all of
them again with each token), and shows a character of byte tokens that a bad byte behind it takes back: `decode` makes
U+FFFD of the whole run then.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from os.path import commonprefix
from typing import Any

from .storage import strict_json as json

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
TAIL = 64  # tokens of a prompt that can matter to the text behind it: a character's bytes, a run of byte tokens


def complete(stream: Callable[[], Detokenizer], text: str, ids: Sequence[int]) -> str:
    """The text of an answer, without a last character whose bytes are not all among its ids. stream:
    `Tokenizer.stream`."""
    if not text.endswith("\ufffd"):
        return text
    cut = []
    for n in range(4):  # a run of byte tokens is spoilt by its last bytes: it may be whole without them
        detokenizer = stream()
        cut.append("".join(map(detokenizer.add, ids[: len(ids) - n])))
        rest = detokenizer.flush()
        if n == 0 and cut[0] + rest != text:
            return text  # a stop string ended it
        if "\ufffd" not in rest:
            return cut[n] + rest
    return cut[0]


class Detokenizer:
    """`add` returns the text that has become certain with a token, `flush` the rest: together `Tokenizer.decode` of all
    ids.

    No piece ends within a UTF-8 character. before: tokens in front, whose text is not returned: then the pieces are
    decode(before + ids) without decode(before), which keeps SentencePiece's space between a prompt and its
    continuation. first=False: some text is in front.
    """

    def __init__(self, library: Any, special: frozenset[int], before: Sequence[int] = (), first: bool = True):
        self._library, self._special = library, special
        first = first and not any(self._token(i) is not None for i in before[:-TAIL])
        self._steps = _steps(library.decoder, first)
        shown = self._text(before[-TAIL:])
        whole = Detokenizer(library, special, first=first)._text(before[-TAIL:], last=True) if before else ""
        self._skip = whole[len(shown) :]  # text of `before` that waits in a step

    def add(self, token_id: int) -> str:
        """New complete text, often of several tokens, possibly none."""
        return self._unseen(self._text([token_id]))

    def flush(self) -> str:
        """The rest, once no token follows: half a character becomes U+FFFD, as `decode` has it."""
        return self._unseen(self._text([], last=True))

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token in the middle of a text, also where they are no whole characters."""
        token = self._token(token_id)
        if token is None:
            return b""
        if any(isinstance(step, _Bytes) for step in self._steps):
            return _token_bytes(token)
        if any(isinstance(step, _ByteTokens) for step in self._steps) and BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
        return (self.add(token_id) + self.flush()).encode()

    def _token(self, token_id: int) -> str | None:
        return None if token_id in self._special else self._library.id_to_token(int(token_id))

    def _text(self, ids: Iterable[int], last: bool = False) -> str:
        tokens = [token for i in ids if (token := self._token(i)) is not None]
        for step in self._steps:
            tokens = [out for token in tokens for out in step.add(token)] + (step.end() if last else [])
        return "".join(tokens)

    def _unseen(self, piece: str) -> str:
        if self._skip and piece:
            n = len(commonprefix([self._skip, piece]))
            self._skip = self._skip[n:] if n == len(piece) else ""
            return piece[n:]
        return piece


def _steps(decoder: Any, first: bool) -> list[_Step]:
    """The steps of a decoder. Raises ValueError for a kind that is not known."""
    if decoder is None:
        return [_Spaced(first)]
    from tokenizers import Regex, decoders

    def pattern(d: dict[str, Any]) -> Any:
        return d["pattern"].get("String") or Regex(d["pattern"]["Regex"])

    make = {
        "BPEDecoder": lambda d: _Suffix(d["suffix"]),
        "ByteFallback": lambda d: _ByteTokens(),
        "ByteLevel": lambda d: _Bytes(),
        "CTC": lambda d: _Distinct(decoders.CTC(d["pad_token"], d["word_delimiter_token"], d["cleanup"])),
        "Fuse": lambda d: _Step(),
        "Metaspace": lambda d: _AfterFirst(
            decoders.Metaspace(d["replacement"], d["prepend_scheme"], d["split"]), first
        ),
        "Replace": lambda d: _Each(decoders.Replace(pattern(d), d["content"])),
        "Strip": lambda d: _Each(decoders.Strip(d["content"], d["start"], d["stop"])),
        "WordPiece": lambda d: _AfterFirst(decoders.WordPiece(d["prefix"], d["cleanup"]), first),
    }
    steps, fused = [], False
    for d in _flat(json.loads(decoder.__getstate__())):
        if d["type"] not in make:
            raise ValueError(f"decoder {d['type']} is not known")
        if fused and d["type"] == "Strip":
            steps.append(_StripText(d["content"], d["start"] if first else 0, d["stop"]))
        elif fused and d["type"] == "Replace" and d["pattern"].get("String"):
            steps.append(_ReplaceText(d["pattern"]["String"], d["content"]))
        elif fused and d["type"] != "Fuse":
            steps.append(_Whole(make[d["type"]](d)))
        else:
            steps.append(make[d["type"]](d))
        fused = fused or d["type"] in ("ByteLevel", "Fuse")
    return steps


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    inner = decoder["decoders"] if decoder["type"] == "Sequence" else None
    return [decoder] if inner is None else [d for one in inner for d in _flat(one)]


class _Step:
    """One step: tokens in, tokens out. This one changes nothing, as Fuse: behind it the tokens are pieces of one
    text."""

    def add(self, token: str) -> list[str]:
        return [token]

    def end(self) -> list[str]:
        return []


class _Each(_Step):
    """A decoder that takes every token by itself."""

    def __init__(self, decoder: Any):
        self.decoder = decoder

    def add(self, token: str) -> list[str]:
        return [self.decoder.decode([token])]


class _AfterFirst(_Each):
    """A decoder that treats the first token of a text otherwise than the others."""

    def __init__(self, decoder: Any, first: bool):
        super().__init__(decoder)
        self.first = first

    def add(self, token: str) -> list[str]:
        tokens, self.first = [token] if self.first else ["", token], False
        return [self.decoder.decode(tokens)]


class _Spaced(_Step):
    """No decoder: spaces between the tokens."""

    def __init__(self, first: bool):
        self.first = first

    def add(self, token: str) -> list[str]:
        space, self.first = "" if self.first else " ", False
        return [space + token]


class _Distinct(_Each):
    """CTC: a token that repeats the one before it counts once."""

    previous: str | None = None

    def add(self, token: str) -> list[str]:
        repeated, self.previous = token == self.previous, token
        return [] if repeated else super().add(token)


class _Suffix(_Step):
    """The mark at a word's end is a space, but in the last token nothing."""

    def __init__(self, suffix: str):
        self.suffix, self.held = suffix, []

    def add(self, token: str) -> list[str]:
        out, self.held = [held.replace(self.suffix, " ") for held in self.held], [token]
        return out if self.suffix in token else [*out, *self.end()]

    def end(self) -> list[str]:
        out, self.held = [held.replace(self.suffix, "") for held in self.held], []
        return out


class _ByteTokens(_Step):
    """<0xE2> and its like become characters a run at a time: one bad byte spoils its whole run."""

    def __init__(self) -> None:
        self.run = b""

    def add(self, token: str) -> list[str]:
        if BYTE_TOKEN.fullmatch(token):
            self.run += bytes.fromhex(token[3:5])
            return []
        return [*self.end(), token]

    def end(self) -> list[str]:
        run, self.run = self.run, b""
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _Bytes(_Step):
    """Byte-level BPE: every character of a token is a byte."""

    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: str) -> list[str]:
        return [self.utf8.decode(_token_bytes(token))]

    def end(self) -> list[str]:
        return [self.utf8.decode(b"", final=True)]


class _StripText(_Step):
    """Up to `start` of a character from the beginning of the text, up to `stop` from its end."""

    def __init__(self, content: str, start: int, stop: int):
        self.content, self.start, self.stop, self.held = content, start, stop, ""

    def add(self, token: str) -> list[str]:
        while self.start and token:
            self.start = self.start - 1 if token[0] == self.content else 0
            token = token[1:] if token[0] == self.content else token
        text = self.held + token
        end = len(text) - min(self.stop, len(text) - len(text.rstrip(self.content)))
        self.held = text[end:]
        return [text[:end]]


class _ReplaceText(_Step):
    """A string of the text is another one; what may be its beginning waits."""

    def __init__(self, pattern: str, content: str):
        self.pattern, self.content, self.held = pattern, content, ""

    def add(self, token: str) -> list[str]:
        *before, rest = (self.held + token).split(self.pattern)
        n = next(n for n in range(min(len(self.pattern) - 1, len(rest)), -1, -1) if rest.endswith(self.pattern[:n]))
        self.held = rest[len(rest) - n :]
        return [self.content.join([*before, rest[: len(rest) - n]])]

    def end(self) -> list[str]:
        return [self.held]


class _Whole(_Step):
    """A step that would need the whole text at once gets it, at the end: no model is known that has one."""

    def __init__(self, step: _Step):
        self.step, self.held = step, []

    def add(self, token: str) -> list[str]:
        self.held.append(token)
        return []

    def end(self) -> list[str]:
        return [*self.step.add("".join(self.held)), *self.step.end()]


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte: itself if printable in Latin-1, else from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """An added token may hold characters outside the alphabet: then it stands for itself."""
    try:
        return bytes(BYTES[c] for c in token)
    except KeyError:
        return token.encode()
