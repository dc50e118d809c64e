"""Answers that follow a grammar: JSON by a schema, or calls of tools, by llguidance's masks of allowed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import one_line
from ..penalties import mask_words
from ..storage import strict_json as json
from ..tokenizer import Tokenizer
from .errors import ApiError, wrong
from .jobs import GrammarError
from .messages import Tool
from .parsing import THOUGHT

MAX_SCHEMA, MAX_DEPTH = 64 << 10, 32  # characters of a schema, and how deep it may be nested
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
# As json.dumps writes it: where white space is free, small models write it without end
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Compiles grammars for one model. vocab: tokens that the model has logits for."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self.tokenizer, self.vocab = tokenizer, vocab
        self._library: Any = None

    def json(self, schema: Any, param: str, thinking: bool) -> Callable[[], Grammar]:
        """Makes matchers of a schema. thinking: the answer begins within thoughts, which are free. Raises ApiError for
        what is no schema."""
        check_schema(schema, param)
        text = json.dumps(written(schema))
        return self._compiled(lambda library: library.LLMatcher.grammar_from_json_schema(text), param, thinking)

    def calls(self, tools: Sequence[Tool], form: str, several: bool, thinking: bool) -> Callable[[], Grammar]:
        """Makes matchers of one call of one of these tools, or of several calls."""
        for tool in tools:
            check_schema(tool.parameters, "tools")
        lark = calls_grammar(tools, form, several)
        return self._compiled(lambda library: library.LLMatcher.grammar_from_lark(lark), "tools", thinking)

    def _compiled(self, grammar_of: Callable[[Any], str], param: str, thinking: bool) -> Callable[[], Grammar]:
        library, tokens = self._loaded()
        try:
            grammar = grammar_of(library)
            matcher = library.LLMatcher(tokens, grammar, log_level=0)
            probe = matcher.deep_copy()
            if not probe.is_error():
                probe.compute_bitmask()  # finds out what is too complex to follow
            why = reason(probe) if probe.is_error() else ""
        except (ValueError, TypeError) as error:
            why = one_line(error)
        if why:
            raise wrong(param, f"the schema cannot be followed: {why}")
        after = self.tokenizer.token_id(THOUGHT) if thinking else None
        return lambda: Grammar(matcher.deep_copy(), self.vocab, after)

    def _loaded(self) -> tuple[Any, Any]:
        if self._library is None:
            try:
                import llguidance
                import llguidance.numpy  # noqa: F401
            except ImportError:
                missing = "structured output needs llguidance on the server: pip install 'minioscar[structured]'"
                raise ApiError(400, missing, code="not_installed") from None
            ends = sorted(i for i in self.tokenizer.eos_ids if i < self.vocab)
            if not ends:
                raise ApiError(400, "this model has no end token, so no grammar can end its answers")
            tokens = llguidance.LLTokenizer(self.tokenizer.to_json(), n_vocab=self.vocab, eos_token=ends)
            self._library = llguidance, tokens
        return self._library


class Grammar:
    """The state of one answer. after: the token behind which it begins to hold (None: from the beginning)."""

    def __init__(self, matcher: Any, vocab: int, after: int | None):
        self.matcher, self.after, self.is_done = matcher, after, False
        self.bits = np.zeros((1, mask_words(vocab)), np.int32)

    def mask(self) -> np.ndarray | None:
        from llguidance.numpy import fill_next_token_bitmask

        if self.after is not None:
            return None
        fill_next_token_bitmask(self.matcher, self.bits)
        self._check()
        return self.bits[0].copy()

    def take(self, token: int) -> None:
        if self.after is not None:
            self.after = None if token == self.after else self.after
            return
        self.matcher.consume_token(token)
        self._check()
        self.is_done = self.matcher.is_stopped()


    def _check(self) -> None:
        if self.matcher.is_error():
            raise GrammarError(f"the schema is too complex to follow: {reason(self.matcher)}")


def reason(matcher: Any) -> str:
    """What is wrong, without the state of the parser."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())[:300]


def written(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, with how its JSON is to be written."""
    return {**schema, "x-guidance": WRITTEN}


def check_schema(schema: Any, param: str) -> None:
    """Raises ApiError for what is no schema, or more of one than is read."""
    if not isinstance(schema, dict):
        raise wrong(param, f"{param} must hold a JSON schema, which is an object")
    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise wrong(param, f"the schema in {param} is longer than {MAX_SCHEMA} characters")
    if depth(schema) > MAX_DEPTH:
        raise wrong(param, f"the schema in {param} is nested more than {MAX_DEPTH} deep")


def depth(value: Any) -> int:
    deepest, rest = 0, [(value, 1)]
    while rest:
        value, at = rest.pop()
        deepest = max(deepest, at)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += [(item, at + 1) for item in inner]
    return deepest


def calls_grammar(tools: Sequence[Tool], form: str, several: bool) -> str:
    """In llguidance's dialect of Lark. Each tool has a rule of its own, so that references within its schema hold."""
    is_llama = form == "llama3"
    before, key, after = ("", "parameters", "") if is_llama else ("<tool_call>\n", "arguments", "\n</tool_call>")
    between = '"; "' if is_llama else r'"\n"'
    rules = []
    for i, tool in enumerate(tools):
        begin = f'{before}{{"name": {json.dumps(tool.name)}, "{key}": '
        schema = written(tool.parameters or NO_PARAMETERS)
        rules.append(f"call_{i}: {json.dumps(begin)} arguments_{i} {json.dumps('}' + after)}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    one = "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))
    return "\n".join([f"start: call ({between} call)*" if several else "start: call", one, *rules])
