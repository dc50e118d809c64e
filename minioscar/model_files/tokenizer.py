"""tokenizer.json and what other files of a folder say of its tokens: names, flags, ends. As transformers reads them."""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

from .. import chat_template
from ..errors import UserError, one_line
from ..storage import foreign
from ..storage import strict_json as json
from ..storage.files import decoded

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Tokenizer classes whose post-processor transformers 4.57 builds from add_bos_token and add_eos_token; the value is the
# default of the first. Others, such as PreTrainedTokenizerFast and Qwen2Tokenizer, leave it as tokenizer.json has it,
# whatever the two say.
ADDS_BOS = dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"), True)
ADDS_BOS |= {"GPTNeoXTokenizer": False}
CLASS_OF_MODEL = dict.fromkeys(("llama", "mistral"), "LlamaTokenizer")  # where no file names the class


class TokenizerFiles(NamedTuple):
    library: Any  # tokenizers.Tokenizer, with all that the files add to it
    templates: dict[str, str]  # chat templates by name
    named: dict[str, str | list[str]]  # special tokens by the names that templates have for them
    special: frozenset[int]
    bos_id: int | None
    eos_ids: frozenset[int]


def read_folder(folder: Path) -> TokenizerFiles:
    """Raises UserError for files that are missing, damaged, or contradict one another."""
    library = _library(folder)
    files = ("tokenizer_config", "special_tokens_map", "chat_template", "config", "generation_config")
    config, legacy, template, model, generation = (_json(folder / f"{name}.json") for name in files)
    templates = chat_template.find(folder, config, template)
    named = _named(config, legacy)
    try:
        special = _special(named, config, legacy)
        _add_tokens(folder, library, _added_tokens(folder, config, special), special)
    except UnicodeEncodeError as error:
        place = folder / "tokenizer_config.json"
        raise UserError(f"{place}: the token {error.object!r} is not valid Unicode; fetch it again") from None
    specials = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)
    models = [c for c in (generation, model, model.get("text_config")) if isinstance(c, dict)]
    bos_id = _id(library, named.get("bos_token"))
    if bos_id is None:
        bos_id = next((min(ids) for c in models if (ids := _ids(c.get("bos_token_id")))), None)
    # An answer ends at whatever any file calls an end: a fine-tune may leave the base model's token in some of them.
    texts = [_content(c.get(f"{name}_token")) for c in (config, legacy) for name in ("eos", "eot", "eom")]
    ends = [_ids(c.get("eos_token_id")) for c in models] + [_ids(_id(library, text)) for text in texts]
    size = next((n for c in models if type(n := c.get("vocab_size")) is int), library.get_vocab_size())
    eos_ids = frozenset(i for i in frozenset().union(*ends) if 0 <= i < size)
    _add_bos_and_eos(library, named, config, model)
    return TokenizerFiles(library, templates, named, specials, bos_id, eos_ids)


def _id(library: Any, token: str | None) -> int | None:
    return None if token is None else library.token_to_id(token)


def _library(folder: Path) -> Any:
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


def _add_tokens(folder: Path, library: Any, wanted: dict[int, Any], special: dict[str, Any]) -> None:
    """Adds the tokens, by id, that tokenizer.json lacks or has with other flags; then special ones that are only
    named.

    That is what transformers does. The library numbers them in order: raises UserError where a token cannot get its
    id.
    """
    known, wanted, new = library.get_added_tokens_decoder(), dict(sorted(wanted.items())), {}
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
                f"{folder}: the added token {text!r} has id {i}, in tokenizer.json {why}; fetch both again"
            )


def _add_bos_and_eos(library: Any, named: dict[str, Any], config: dict[str, Any], model: dict[str, Any]) -> None:
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
            text = named.get(f"{name}_token", None if f"{name}_token" in config else usual)
            if _id(library, text) is None:
                return  # a token that does not exist cannot be added
            tokens[name] = (text, library.token_to_id(text))
    bos, eos = ([f"{tokens[name][0]}:0"] if name in tokens else [] for name in ("bos", "eos"))
    template = processors.TemplateProcessing(single=[*bos, "$A:0", *eos], special_tokens=list(tokens.values()))
    library.post_processor = template
