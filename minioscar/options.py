"""What is asked of a prompt: how many tokens, drawn how, until what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .checks import TEXT, whole
from .errors import UserError, shown
from .sampling import Sampling
from .tokenizer import Tokenizer

MAX_TOKENS = 256


@dataclass(frozen=True)
class Options:
    """What is asked of a prompt. None is the default. Raises UserError for a wrong type and for what cannot be.

    max_tokens: new tokens at most. stop: the text ends before the first of these strings. logprobs: report the
    log-probability of every new token, and of this many likeliest ones beside it (None: do not). n: answers to each
    prompt, drawn independently. graph: on a GPU a decode step is one CUDA graph; False launches its kernels one by one,
    for debugging, and gives the same bits. stop_ids: token ids that end an answer as the model's own end tokens do.
    min_tokens: no end before so many new tokens: until then end tokens cannot be drawn, and stop strings are looked for
    behind them. ignore_eos: the model's end tokens are tokens like others.
    """

    max_tokens: int = MAX_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    logprobs: int | None = None
    n: int = 1
    graph: bool = True
    stop_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        given = {
            name: default if (value := getattr(self, name)) is None else value for name, default in DEFAULTS.items()
        }
        for name, low, want in (
            ("max_tokens", 1, "at least 1"), ("n", 1, "at least one answer"),
            ("min_tokens", 0, "0 (off) or a positive number"),
        ):
            given[name] = whole(name, given[name], low.__le__, want)
        if self.logprobs is not None:
            given["logprobs"] = whole("logprobs", self.logprobs, lambda k: 0 <= k <= 100, "0 ... 100 likeliest tokens")
        for name in ("stop", "stop_ids"):
            given[name] = _sequence(name, given[name])
        if not all(isinstance(s, str) and s for s in given["stop"]):
            raise UserError(f"stop {shown(list(given['stop']))} must be a list of strings, none of them empty")
        given["stop_ids"] = tuple(
            whole("stop_ids", i, lambda i: i >= 0, "token ids of the model") for i in given["stop_ids"]
        )
        for name in ("graph", "ignore_eos"):
            if not isinstance(given[name], bool | np.bool_):
                raise UserError(f"{name} {shown(given[name])} must be true or false")
            given[name] = bool(given[name])
        if not isinstance(given["sampling"], Sampling):
            raise UserError(f"sampling {shown(given['sampling'])} must be a minioscar.Sampling")
        if given["min_tokens"] > given["max_tokens"]:
            least, most = shown(given["min_tokens"]), shown(given["max_tokens"])
            raise UserError(f"min_tokens {least} is more than max_tokens {most}; raise max_tokens")
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @property
    def adjusts(self) -> bool:
        """Whether tokens are drawn from other logits than the model's."""
        return self.sampling.penalizes or self.min_tokens > 0

    def ends(self, tokenizer: Tokenizer | None, vocab: int) -> frozenset[int]:
        """The token ids that end an answer. A stop string that is a special token's text is that token, whose text
        nobody ever sees.

        Raises UserError for stop_ids that the model does not have.
        """
        if wrong := [i for i in self.stop_ids if i >= vocab]:
            raise UserError(f"stop id {wrong[0]} is not a token of this model; its tokens are 0 ... {vocab - 1}")
        special = (tokenizer.special_id(text) for text in self.stop) if tokenizer else ()
        eos = tokenizer.eos_ids if tokenizer and not self.ignore_eos else ()
        ends = frozenset((*self.stop_ids, *eos, *(i for i in special if i is not None)))
        if self.min_tokens and len([end for end in ends if end < vocab]) == vocab:
            none_left = "leaves no token to draw: all of this model's are stop ids; leave some out"
            raise UserError(f"min_tokens {self.min_tokens} {none_left}")
        return ends


def for_each(options: Options | Sequence[Options] | None, prompts: int) -> list[Options]:
    """One for every prompt, from one for all of them or from as many. Raises UserError for anything else."""
    if options is None or isinstance(options, Options):
        return [options or Options()] * prompts
    found = list(options) if isinstance(options, Sequence) else [options]
    if not all(isinstance(one, Options) for one in found):
        raise UserError(f"options {shown(options)} must be a minioscar.Options, or a list with one for each prompt")
    if len(found) != prompts:
        raise UserError(
            f"there are {len(found)} options for {prompts} prompts; give one for all of them, or one for each"
        )
    return found


def first_answers(options: Sequence[Options]) -> list[int]:
    """Where the answers to each prompt begin among those to all."""
    return [sum(one.n for one in options[:i]) for i in range(len(options))]


DEFAULTS = {"sampling": Sampling()} | {
    f.name: f.default for f in fields(Options) if f.name not in ("sampling", "logprobs")
}


def _sequence(name: str, value: Any) -> tuple:
    if isinstance(value, TEXT | Mapping) or not isinstance(value, Iterable) or getattr(value, "shape", None) == ():
        raise UserError(f"{name} {shown(value)} must be a list of {'strings' if name == 'stop' else 'token ids'}")
    return tuple(value)
