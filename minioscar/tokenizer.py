"""Text <-> ids, and the tokens that are more than text: where an answer ends, what a chat template writes.

`tokenizers` does the work; what a folder's files say of tokens is in model_files/tokenizer.py. Decoded text is what
people read: special tokens (<|im_end|>, </s>) are left out of it, added tokens that are not special (<think>,
<tool_call>) stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import chat_template
from .chat_template import Message
from .checks import TEXT, whole
from .detokenizer import Detokenizer
from .errors import UserError, one_line, shown
from .model_files.tokenizer import read_folder

ID = range(2**32)  # what the library takes


class Tokenizer:
    """The tokenizer of a model folder. Raises UserError for files that are missing, damaged, or contradict one
    another."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        found = read_folder(self.folder)
        self._tokenizer, self._templates, self._named, self._special = found[:4]
        self.bos_id, self.eos_ids = found.bos_id, found.eos_ids
        try:
            self.stream()
        except ValueError as error:
            raise UserError(f"{self.folder / 'tokenizer.json'}: {error}; use a newer minioscar") from None

    def special_id(self, text: str) -> int | None:
        """The id of the special token whose text is exactly this; None if there is none."""
        try:
            found = self.token_id(text)
        except (TypeError, UnicodeEncodeError):
            return None
        return found if found in self._special else None

    def specials_in(self, text: str) -> dict[str, int]:
        """The special tokens that a text holds the names of, the longest names first, and their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        found = {token.content: i for i, token in added.items() if token.special and token.content in text}
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of the text. add_special_tokens: also those that the tokenizer puts around a text, such as BOS."""
        if not isinstance(text, str):
            raise UserError(f"only text has token ids, not {shown(text)}")
        try:
            text.encode()
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except UnicodeEncodeError:  # half a surrogate pair: what Python makes of command line bytes that are not UTF-8
            raise UserError("the text is not valid Unicode (was it UTF-8?); convert it to UTF-8") from None
        except Exception as error:  # the library raises plain Exception, as where there is no token for unknown text
            reason = one_line(error)
            raise UserError(f"{self.folder}: the tokenizer cannot encode this text ({reason})") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids without special tokens; bytes that are not UTF-8 become U+FFFD, ids without a token
        nothing."""
        if isinstance(ids, TEXT | Mapping) or not isinstance(ids, Iterable) or getattr(ids, "shape", None) == ():
            raise UserError(f"token ids must be a list of whole numbers, not {shown(ids)}")
        ids = [whole("token id", i, ID.__contains__, "a number from 0 on") for i in ids]
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self, before: Sequence[int] = (), first: bool = True) -> Detokenizer:
        """A detokenizer for one new sequence, behind the tokens `before`; first=False: behind any text."""
        return Detokenizer(self._tokenizer, self._special, before, first)

    def to_json(self) -> str:
        """As tokenizer.json has it, with all that was added to it."""
        return self._tokenizer.to_str()

    def token_id(self, text: str) -> int | None:
        """The id of the token of exactly this text, special or added; None if there is none."""
        return self._tokenizer.token_to_id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token is of a text, half a character if it is one; of a special token none."""
        return self.stream(first=False).bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        """What the token is in the middle of a text: " Paris", where `decode` of a text that begins with it has
        "Paris"."""
        token_id, stream = whole("token id", token_id, ID.__contains__, "a number from 0 on"), self.stream(first=False)
        return stream.add(token_id) + stream.flush()

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._templates

    @property
    def template(self) -> str:
        """The usual chat template; empty where there is none."""
        return self._templates.get("default", "")

    def chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True,
        template: Mapping[str, Any] | None = None, tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The messages as one prompt, by the model's own template. Raises ChatTemplateError, a UserError, if that
        fails.

        template: more variables for it (enable_thinking=False); chat_template is the name of one of several. tools:
        what the model may call, as OpenAI's API describes it.
        """
        variables = {**self._named, "add_generation_prompt": add_generation_prompt}
        if tools:
            variables["tools"] = tools
        return chat_template.chosen(self.folder, self._templates, messages, variables, dict(template or {}))

    def prompt_ids(self, text: str) -> list[int]:
        """Of a plain text, with BOS as the tokenizer adds it, but not twice where the text begins with it."""
        ids = self.encode(text, add_special_tokens=True)
        return ids[1:] if self.bos_id is not None and ids[:2] == [self.bos_id] * 2 else ids

    def rendered_ids(self, text: str, adds_bos: bool) -> list[int]:
        """Of what a chat template wrote. adds_bos: with BOS where the text does not begin with it, as the processors of
        models with towers do: LLaVA's templates write none."""
        return self.prompt_ids(text) if adds_bos else self.encode(text)
