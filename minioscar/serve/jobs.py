"""What the scheduler is asked for, and what it tells of it while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from ..answers import Answer, Generation, Logprob, logprob
from ..errors import Failure
from ..options import Options
from ..sampling import RowSampling
from ..tokenizer import Tokenizer
from ..towers.media import Medium, words
from .blocks import chained_keys


class Busy(Failure):
    """The queue is full, or the server ends: the same request may be answered later."""


class Late(Busy):
    """A request has waited, or its prompt was read, for longer than the server allows."""


class GrammarError(Failure):
    """The grammar of an answer turned out to be too complex to go on."""


class Matcher(Protocol):
    """What an answer may go on with, by a grammar."""

    is_done: bool  # nothing may follow

    def mask(self) -> np.ndarray | None:
        """The tokens allowed next, int32 [mask_words(vocab)]; None: all."""
        ...

    def take(self, token: int) -> None:
        """The answer goes on with this token. Raises GrammarError, as `mask` does."""
        ...


@dataclass(frozen=True)
class Event:
    """News of one answer. text: what has become certain; token: the new one (None: an end token, or no token at all);
    finish_reason: of `Generation`, with the last event of the answer; error: nothing more comes of the whole job."""

    index: int
    text: str = ""
    token: int | None = None
    logprob: Logprob | None = None
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass
class Job:
    """A prompt and its options.n answers, which draw as sequences `sequence`, `sequence` + 1 and so on.

    bias: as in `RowSampling`. matcher: makes the grammar of one answer. continued: the text goes on in the answer
    (`Prompts`). cache_prompt=False: nothing that is cached is used. prompt_logprobs: log-probabilities of the
    prompt's tokens, and so many likeliest ones beside them, go into `scored`. reads_only: there are no answers, only
    those. tell: takes events, on a thread of the caller's. media: of the prompt.
    """

    ids: list[int]
    options: Options
    tell: Callable[[Event], None] = lambda event: None
    sequence: int = 0
    bias: Sequence[tuple[int, float]] = ()
    matcher: Callable[[], Matcher] | None = None
    continued: bool = False
    cache_prompt: bool = True
    prompt_logprobs: int | None = None
    reads_only: bool = False
    media: Sequence[Medium] = ()

    cached: int = 0  # tokens of the prompt that were in the cache
    scored: list[Logprob | None] = field(default_factory=list)
    is_cancelled: bool = False
    created: float = field(default_factory=time.monotonic)
    begun: float = 0.0  # when its first token was there

    @property
    def rows(self) -> int:
        return self.options.n

    @cached_property
    def usable(self) -> list[int]:
        """The tokens that need not be fed where they are cached: the last one is, for its logits."""
        return self.ids[:-1] if self.cache_prompt and self.prompt_logprobs is None else []

    def score(self, start: int, logits: np.ndarray, tokenizer: Tokenizer | None) -> None:
        """Log-probabilities of the prompt's tokens behind those that a piece from `start` holds; its logits, float32
        [tokens, vocab]."""
        if not start:
            self.scored.append(None)  # nothing says how likely the first one is
        following = self.ids[start + 1 : start + 1 + len(logits)]
        for of_token, token in zip(logits, following, strict=False):
            self.scored.append(logprob(of_token, token, self.prompt_logprobs, tokenizer))

    @cached_property
    def keys(self) -> list[bytes]:
        """Of the whole blocks of these."""
        return list(chained_keys(self.usable))


class Row:
    """A slot of the cache, what it holds, and the answer that runs in it (None: it is free).

    held: tokens, of which the first `cache.lengths[slot]` are in the cache. in_flight: steps that are launched and not
    read; the slot belongs to its answer until there are none. state: "free", "read" (its prompt is being read), "wait"
    (for another row to read it), "step", "leave".
    """

    def __init__(self, slot: int):
        self.slot, self.state = slot, "free"
        self.held: list[int] = []
        self.in_flight = self.used = 0
        self.is_matched = False
        self.job: Job | None = None
        self.answer: Answer | None = None
        self.matcher: Matcher | None = None
        self.index = 0

    def swap(self, other: Row) -> None:
        """Two free rows, of which what they hold has changed places."""
        self.held, self.used, other.held, other.used = other.held, other.used, self.held, self.used

    def begin(self, job: Job, index: int) -> None:
        self.job, self.index, self.answer, self.matcher = job, index, None, None
        self.state, self.is_matched = "wait" if index else "read", False

    def start(self, tokenizer: Tokenizer | None, vocab: int) -> RowSampling:
        """Its answer begins, behind a prompt that was read; how it draws."""
        job, options = self.job, self.job.options
        ends = options.ends(tokenizer, vocab)
        result = Generation(
            len(job.ids), prefilled_tokens=len(job.ids) - job.cached, logprobs=None if options.logprobs is None else []
        )
        self.answer = Answer(options, ends, result, tokenizer, job.ids if job.continued else ())
        self.matcher = job.matcher() if job.matcher else None
        self.held, self.state = list(job.ids), "step"
        known = sorted(end for end in ends if end < vocab)
        sequence, said = job.sequence + self.index, words(job.ids)
        return RowSampling(options.sampling, sequence, said, known, options.min_tokens, job.bias)

    @property
    def is_synchronous(self) -> bool:
        """Whether the host has to see a step before the next one can be launched."""
        return self.job is not None and (self.matcher is not None or self.job.options.logprobs is not None)

    def leave(self) -> None:
        """Its answer has ended; what it holds may serve other prompts."""
        self.job = self.answer = self.matcher = None
        self.state = "leave" if self.in_flight else "free"
