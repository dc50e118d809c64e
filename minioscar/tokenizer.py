"""Text <-> ids, the chat template, and text as it comes out of the model token by token.

`tokenizers` does the work. Decoded text is what people read: special tokens (<|im_end|>, </s>) are left out of it,
added tokens that are not special (<think>, <tool_call>) stay.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from minioscar import foreign
from minioscar import strict_json as json
from minioscar.errors import UserError

MAX_CHAT = 64 << 20  # characters a chat template may write: far above any context, far below memory


class Tokenizer:
    """The tokenizer of a model folder. Raises UserError for files that are missing or damaged."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tokenizer = _load(self.folder)
        self._config = _json(self.folder / "tokenizer_config.json")
        model, generation = _json(self.folder / "config.json"), _json(self.folder / "generation_config.json")
        self._chat_template = _chat_template(self.folder, self._config)
        self._special = frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)
        self.bos_token, self.eos_token = (_content(self._config.get(f"{name}_token")) for name in ("bos", "eos"))
        self.bos_id: int | None = self._id(self.bos_token, model.get("bos_token_id"))
        ids = next((ids for ids in (_ids(c.get("eos_token_id")) for c in (generation, model)) if ids), None)
        eos_id = self._id(self.eos_token, None)
        self.eos_ids: frozenset[int] = ids or frozenset(() if eos_id is None else (eos_id,))

    def _id(self, token: str | None, default: Any) -> int | None:
        try:
            found = None if token is None else self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: the token {token!r} is not valid Unicode; fetch it again") from None
        return found if found is not None else min(_ids(default), default=None)

    def special_id(self, text: str) -> int | None:
        """The id of the special token whose text is exactly this; None if there is none."""
        try:
            found = self._tokenizer.token_to_id(text)
        except UnicodeEncodeError:
            return None
        return found if found in self._special else None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of the text. add_special_tokens: also those that tokenizer.json puts around a text, such as BOS."""
        try:
            text.encode()
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except UnicodeEncodeError:  # half a surrogate pair: what Python makes of command line bytes that are not UTF-8
            raise UserError("the text is not valid Unicode (was it UTF-8?); convert it to UTF-8") from None
        except Exception as error:  # the library raises plain Exception, for instance if there is no token for unknown text
            raise UserError(f"{self.folder}: the tokenizer cannot encode this text ({' '.join(str(error).split())[:200]})") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids without special tokens; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self) -> Detokenizer:
        """A detokenizer for one new sequence."""
        return Detokenizer(self._tokenizer, self._special)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, template: Mapping[str, Any] | None = None
    ) -> str:
        """The messages ({"role", "content"}) as one prompt, by the model's own template, which also gets the variables of `template`.

        Raises UserError if that fails.
        """
        if self._chat_template is None:
            raise UserError(f"{self.folder}: the model has no chat template; use --raw")
        tokens = {name: token for name, token in (("bos_token", self.bos_token), ("eos_token", self.eos_token)) if token is not None}
        try:
            variables = {**tokens, **(template or {}), "messages": messages, "add_generation_prompt": add_generation_prompt}
            return _render(self._chat_template, **variables)
        except Exception as error:  # a template is a program: it may end in any exception
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{self.folder}: the chat template failed ({reason}); use --raw") from error

    def prompt_ids(self, text: str, chat: bool) -> list[int]:
        """chat: the text as a user's message, through the template, which writes BOS itself. Else the text with BOS as usual."""
        if chat:
            return self.encode(self.chat([{"role": "user", "content": text}]))
        return self.encode(text, add_special_tokens=True)


class Detokenizer:
    """Text as its tokens arrive: `add` returns what has become certain, `flush` the rest.

    All returned pieces together are `Tokenizer.decode` of all ids, and no piece ends within a UTF-8 character. A token
    costs what it is long, however long the text before it is.
    """

    def __init__(self, tokenizer: Any, special: frozenset[int]) -> None:
        from tokenizers.decoders import ByteLevel

        self._tokenizer, self._special = tokenizer, special
        byte_level = isinstance(tokenizer.decoder, ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace") if byte_level else None
        self._context: list[int] = []  # the last token that was printed: the next one is not the first of the text
        self._pending: list[int] = []  # bytes of characters that may go on

    def add(self, token_id: int) -> str:
        """New complete text, often of several tokens, possibly none."""
        token_id = int(token_id)
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        if self._utf8:
            return self._utf8.decode(_token_bytes(token))
        self._pending.append(token_id)
        # The byte tokens of SentencePiece become characters a run at a time: one bad byte spoils its whole run.
        return "" if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) else self.flush()

    def flush(self) -> str:
        """The rest, once no token follows: half a character becomes U+FFFD, as `decode` has it."""
        if self._utf8:
            return self._utf8.decode(b"", final=True)
        if not self._pending:
            return ""
        before, after = (self._tokenizer.decode(ids) for ids in (self._context, self._context + self._pending))
        self._context, self._pending = self._pending[-1:], []
        return after[len(before) :]


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE: itself if printable in Latin-1, else from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """An added token may hold characters outside the alphabet: then it stands for itself."""
    try:
        return bytes(_BYTES[c] for c in token)
    except KeyError:
        return token.encode()


# --- files


def _load(folder: Path) -> Any:
    from tokenizers import Tokenizer as Library

    path = folder / "tokenizer.json"
    if not path.is_file():
        why = foreign.tokenizer(folder) or "the folder has no tokenizer.json, the only one that is read; fetch it with the model"
        raise UserError(f"{folder}: {why}")
    try:
        tokenizer = Library.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        if found := foreign.content(path):
            raise UserError(f"{path}: not a readable tokenizer but {found}") from None
        raise UserError(f"{path}: not a readable tokenizer ({' '.join(str(error).split())[:200]}); fetch it again") from error
    tokenizer.no_truncation()  # some files carry the settings of their training
    tokenizer.no_padding()
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    """The object in the file, or {} if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if found := foreign.content(path):
            raise UserError(f"{path}: not readable as JSON: it is {found}") from None
        raise UserError(f"{path}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} where an object is needed; fetch it again")
    return value


def _content(token: Any) -> str | None:
    """A token is written as a string or as an object with its flags."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool))


# --- chat template


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """From chat_template.jinja, else chat_template.json, else tokenizer_config.json, where it may be one of several by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable ({error}); fetch it again") from error
    template = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _render(template: str, **variables: Any) -> str:
    """The template, in jinja2's sandbox, with what Hugging Face templates expect to find there."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # jinja2's own escapes HTML

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    pieces, size = [], 0
    for piece in environment.from_string(template).generate(tools=None, documents=None, **variables):
        size += len(piece)
        if size > MAX_CHAT:
            raise ValueError(f"it writes more than {MAX_CHAT} characters")
        pieces.append(piece)
    return "".join(pieces)
