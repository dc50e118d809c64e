"""Text <-> ids, and the tokens that are more than text: where an answer ends, what a chat template writes.

`tokenizers` does the work. Decoded text is what people read: special tokens (<|im_end|>, </s>) are left out of it,
added tokens that are not special (<think>, <tool_call>) stay.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minioscar import chat_template
from minioscar.chat_template import Message
from minioscar.checks import TEXT, whole
from minioscar.detokenizer import Detokenizer
from minioscar.errors import ChatTemplateError, UserError, one_line, shown
from minioscar.storage import foreign
from minioscar.storage import strict_json as json
from minioscar.storage.files import decoded

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Tokenizer classes whose post-processor transformers 4.57 builds from add_bos_token and add_eos_token; the value is the
# default of the first. Others, such as PreTrainedTokenizerFast and Qwen2Tokenizer, leave it as tokenizer.json has it,
# whatever the two say.
ADDS_BOS = dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"), True)
ADDS_BOS |= {"GPTNeoXTokenizer": False}
CLASS_OF_MODEL = dict.fromkeys(("llama", "mistral"), "LlamaTokenizer")  # where no file names the class


class Tokenizer:
    """The tokenizer of a model folder. Raises UserError for files that are missing, damaged, or contradict one
    another."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tokenizer = _load(self.folder)
        files = ("tokenizer_config", "special_tokens_map", "chat_template", "config", "generation_config")
        config, legacy, template, model, generation = (_json(self.folder / f"{name}.json") for name in files)
        self._templates = chat_template.find(self.folder, config, template)
        self._named = _named(config, legacy)
        try:
            special = _special(self._named, config, legacy)
            self._add_tokens(_added_tokens(self.folder, config, special), special)
        except UnicodeEncodeError as error:
            place = self.folder / "tokenizer_config.json"
            raise UserError(f"{place}: the token {error.object!r} is not valid Unicode; fetch it again") from None
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self.bos_token, self.eos_token = self._named.get("bos_token"), self._named.get("eos_token")
        models = [c for c in (generation, model, model.get("text_config")) if isinstance(c, dict)]
        self.bos_id: int | None = self._id(self.bos_token)
        if self.bos_id is None:
            self.bos_id = next((min(ids) for c in models if (ids := _ids(c.get("bos_token_id")))), None)
        # An answer ends at whatever any file calls an end: a fine-tune may leave the base model's token in some of
        # them.
        named = [_content(c.get(f"{name}_token")) for c in (config, legacy) for name in ("eos", "eot", "eom")]
        ends = [_ids(c.get("eos_token_id")) for c in models] + [_ids(self._id(token)) for token in named]
        size = next((n for c in models if type(n := c.get("vocab_size")) is int), self._tokenizer.get_vocab_size())
        self.eos_ids: frozenset[int] = frozenset(i for i in frozenset().union(*ends) if 0 <= i < size)
        self._add_bos_and_eos(config, model)
        try:
            self.stream()
        except ValueError as error:
            raise UserError(f"{self.folder / 'tokenizer.json'}: {error}; use a newer minioscar") from None

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def special_id(self, text: str) -> int | None:
        """The id of the special token whose text is exactly this; None if there is none."""
        try:
            found = self._id(text)
        except (TypeError, UnicodeEncodeError):
            return None
        return found if found in self._special else None

    def specials_in(self, text: str) -> dict[str, int]:
        """The special tokens that a text holds the names of, the longest names first, and their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        found = {token.content: i for i, token in added.items() if token.special and token.content in text}
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))

    def _add_tokens(self, wanted: dict[int, Any], special: dict[str, Any]) -> None:
        """Adds the tokens, by id, that tokenizer.json lacks or has with other flags; then special ones that are only
        named.

        That is what transformers does. The library numbers them in order: raises UserError where a token cannot get its
        id.
        """
        library, known = self._tokenizer, self._tokenizer.get_added_tokens_decoder()
        wanted, new = dict(sorted(wanted.items())), {}
        for i, token in wanted.items():
            found = library.token_to_id(token.content)  # another id than i: tokenizer.json is right, as in transformers
            if found is None:
                new[i] = token.content
            token.special |= token.content in special or found in known and known[found].special
        texts, have = {token.content for token in wanted.values()}, {token.content: token for token in known.values()}
        named = [have.get(text, token) for text, token in special.items() if text not in texts]
        for token in named:
            token.special = True
        taken = {i: library.id_to_token(i) for i in new}
        library.add_tokens([*wanted.values(), *named])
        for i, text in new.items():
            if (found := library.token_to_id(text)) != i:
                why = f"that is {taken[i]!r}" if taken[i] else f"the next free id is {found}"
                raise UserError(
                    f"{self.folder}: the added token {text!r} has id {i}, in tokenizer.json {why}; fetch both again"
                )

    def _add_bos_and_eos(self, config: dict[str, Any], model: dict[str, Any]) -> None:
        """add_bos_token and add_eos_token, for the classes that heed them."""
        from tokenizers import processors

        kind = config.get("tokenizer_class") or model.get("tokenizer_class")
        default = ADDS_BOS.get(str(kind).removesuffix("Fast")) if kind else None
        flags = {name: config.get(f"add_{name}_token") for name in ("bos", "eos")}
        asked = {name: flag for name, flag in flags.items() if isinstance(flag, bool)}
        if default is None and (kind or not asked or model.get("model_type") not in CLASS_OF_MODEL):
            return
        added = {"bos": default is not False, "eos": False} | asked
        tokens = {}
        for name, usual in (("bos", "<s>"), ("eos", "</s>")):
            if added[name]:
                text = self._named.get(f"{name}_token", None if f"{name}_token" in config else usual)
                if self._id(text) is None:
                    return  # a token that does not exist cannot be added
                tokens[name] = (text, self._id(text))
        bos, eos = ([f"{tokens[name][0]}:0"] if name in tokens else [] for name in ("bos", "eos"))
        template = processors.TemplateProcessing(single=[*bos, "$A:0", *eos], special_tokens=list(tokens.values()))
        self._tokenizer.post_processor = template

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
        ids = [whole("token id", i, lambda i: 0 <= i < 2**32, "a number from 0 on") for i in ids]
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self, before: Sequence[int] = (), first: bool = True) -> Detokenizer:
        """A detokenizer for one new sequence, behind the tokens `before`; first=False: behind any text."""
        return Detokenizer(self._tokenizer, self._special, before, first)

    def to_json(self) -> str:
        """As tokenizer.json has it, with all that was added to it."""
        return self._tokenizer.to_str()

    def token_id(self, text: str) -> int | None:
        """The id of the token of exactly this text, special or added; None if there is none."""
        return self._id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token is of a text, half a character if it is one; of a special token none."""
        return self.stream(first=False).bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        """What the token is in the middle of a text: " Paris", where `decode` of a text that begins with it has
        "Paris"."""
        stream, token_id = self.stream(first=False), whole(
            "token id", token_id, lambda i: 0 <= i < 2**32, "a number from 0 on"
        )
        return stream.add(token_id) + stream.flush()

    def complete(self, text: str, ids: Sequence[int]) -> str:
        """The text of an answer, without a last character whose bytes are not all among its ids."""
        if not text.endswith("\ufffd"):
            return text
        cut = []
        for n in range(4):  # a run of byte tokens is spoilt by its last bytes: it may be whole without them
            stream = self.stream()
            cut.append("".join(map(stream.add, ids[: len(ids) - n])))
            rest = stream.flush()
            if n == 0 and cut[0] + rest != text:
                return text  # a stop string ended it
            if "\ufffd" not in rest:
                return cut[n] + rest
        return cut[0]

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
        if not (isinstance(messages, list | tuple) and not messages) and (why := chat_template.malformed(messages)):
            raise UserError(f"messages cannot be rendered: {why}")
        extra = dict(template or {})
        name = extra.pop("chat_template", "default")
        if not isinstance(name, str) or name not in self._templates:
            if isinstance(name, str) and name == "default":
                raise ChatTemplateError(f"{self.folder}: the model has no chat template")
            names = ", ".join(sorted(self._templates)) or "none"
            raise UserError(f"{self.folder}: there is no chat template {shown(name)}; it has: {names}")
        variables = {**self._named, "add_generation_prompt": add_generation_prompt}
        if tools:
            variables["tools"] = tools
        try:
            return chat_template.render(self._templates[name], messages, variables, extra)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None
        except Exception as error:  # a template is a program: it may end in any exception
            reason = one_line(error)
            raise ChatTemplateError(f"{self.folder}: the chat template failed ({reason})") from error

    def prompt_ids(self, text: str, chat: bool, template: Mapping[str, Any] | None = None) -> list[int]:
        """chat: the text as a user's message, through the template, which writes BOS itself.

        Else the text with BOS as the tokenizer adds it, but not twice where the text begins with it.
        """
        if chat:
            return self.encode(self.chat([{"role": "user", "content": text}], template=template))
        ids = self.encode(text, add_special_tokens=True)
        return ids[1:] if self.bos_id is not None and ids[:2] == [self.bos_id] * 2 else ids

    def rendered_ids(self, text: str, adds_bos: bool) -> list[int]:
        """Of what a chat template wrote. adds_bos: with BOS where the text does not begin with it, as the processors of
        models with towers do: LLaVA's templates write none."""
        return self.prompt_ids(text, chat=False) if adds_bos else self.encode(text)


# --- files


def _load(folder: Path) -> Any:
    from tokenizers import Tokenizer as Library

    path = folder / "tokenizer.json"
    if not path.is_file():
        absent = "the folder has no tokenizer.json, the only one that is read; fetch it with the model"
        raise UserError(f"{folder}: {foreign.tokenizer(folder) or absent}")
    try:
        tokenizer = Library.from_str(decoded(path.read_bytes(), str(path)))  # with a byte order mark, or in UTF-16, too
    except Exception as error:  # the library raises plain Exception
        if found := foreign.content(path):
            raise UserError(f"{path}: not a readable tokenizer but {found}") from None
        raise UserError(f"{path}: not a readable tokenizer ({one_line(error)}); fetch it again") from error
    tokenizer.no_truncation()  # some files carry the settings of their training
    tokenizer.no_padding()
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    """The object in the file, or {} if there is no such file."""
    return json.read_object(path, "the tokenizer needs it") if os.path.lexists(path) else {}


def _content(token: Any) -> str | None:
    """A token is written as a string or as an object with its flags."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _named(config: dict[str, Any], legacy: dict[str, Any]) -> dict[str, str | list[str]]:
    """transformers' special_tokens_map: names that templates know the special tokens by; several are
    additional_special_tokens.

    Of tokenizer_config.json and special_tokens_map.json the newer form is preferred, which has added_tokens_decoder.
    """
    order = (legacy, config) if "added_tokens_decoder" in config else (config, legacy)
    both = {name: value for c in order for name, value in c.items() if value}
    extra = both.get("extra_special_tokens")
    named = extra if isinstance(extra, dict) else {}
    tokens = {name: both.get(name) for name in NAMED} | named
    found = {name: text for name, token in tokens.items() if (text := _content(token))}
    more = [c.get(key) for c in order for key in ("additional_special_tokens", "extra_special_tokens")]
    listed = [token for tokens in more if isinstance(tokens, list) for token in tokens]
    texts = dict.fromkeys(text for token in listed if (text := _content(token)))
    return found | ({"additional_special_tokens": list(texts)} if texts else {})


def _special(named: dict[str, str | list[str]], *files: dict[str, Any]) -> dict[str, Any]:
    """tokenizers.AddedToken of every named special token by its text, with the flags of the files that write it as an
    object."""
    from tokenizers import AddedToken

    entries = [
        entry for file in files for value in file.values() for entry in (value if isinstance(value, list) else [value])
    ]
    flags = {text: _flags(entry) for entry in entries if isinstance(entry, dict) and (text := _content(entry))}
    texts = [text for value in named.values() for text in (value if isinstance(value, list) else [value])]
    return {text: AddedToken(text, **flags.get(text, {}) | {"special": True}) for text in texts}


def _flags(entry: dict[str, Any]) -> dict[str, bool]:
    return {flag: entry[flag] for flag in FLAGS if isinstance(entry.get(flag), bool)}


def _added_tokens(folder: Path, config: dict[str, Any], special: Container[str]) -> dict[int, Any]:
    """tokenizers.AddedToken by id, of tokenizer_config.json and of added_tokens.json where that says nothing else."""
    from tokenizers import AddedToken

    found, decoder = {}, config.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if not (isinstance(entry, dict) and _content(entry) and key.isdecimal() and len(key) < 10):
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has no token under {key!r}; fetch it again"
            )
        found[int(key)] = AddedToken(entry["content"], **_flags(entry))
    texts, older, place = {token.content for token in found.values()}, {}, folder / "added_tokens.json"
    for text, i in _json(place).items():
        if type(i) is not int or not 0 <= i < 10**9 or i in older:
            also = f", as has {older[i].content!r}" if i in older else ""
            raise UserError(f"{place}: the token {text!r} has the id {i!r}{also}; fetch it again")
        if text and text not in texts:
            older[i] = AddedToken(text, special=text in special)
    return older | found
