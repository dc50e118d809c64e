"""Answers as they come: text of tokens as it becomes certain, stop strings, log-probabilities, why one has ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from .options import Options
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of the probability that the model itself gave a token, before temperature and filters."""

    token_id: int
    token: str  # its text; empty without a tokenizer, or for a special token
    logprob: float
    top: tuple[Logprob, ...] = ()  # the likeliest tokens of the same position


@dataclass
class Generation:
    """What one prompt became. Times are of the whole batch it was in, in seconds."""

    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # a stop string's tokens included, an end token not
    # "stop": an end token, stop id or stop string; "length": max_tokens; "context": it is full
    finish_reason: str | None = None
    kv: str = ""
    kv_bytes: int = 0  # of the whole cache
    device: str = ""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefilled_tokens: int = 0  # of the prompt's; the others were in the cache already
    logprobs: list[Logprob] | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        """Decode steps per second; the first token belongs to the prefill. 0 if there was only that one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s and self.new_tokens > 1 else 0.0


def begun(text: str, stop: str) -> int:
    """Characters at the end of the text that are the beginning of `stop`, and not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class StopText:
    """Lets text through until a stop string comes, which it swallows; what may be the beginning of one waits.

    The stop string that is complete first counts, the longest if several are, however the text is split into chunks.
    tokenizer: of the special tokens whose names are within stop strings. They are no text: while it is looked at,
    each is half of a surrogate pair, which no text has.
    """

    def __init__(self, stops: Collection[str], tokenizer: Tokenizer | None = None):
        special = tokenizer.specials_in("\0".join(stops)) if tokenizer and stops else {}
        free = (half for half in map(chr, range(0xD800, 0xE000)) if not any(half in stop for stop in stops))
        self.marks = dict(zip(special.values(), free, strict=False))
        for name, i in special.items():
            stops = [stop.replace(name, self.marks[i]) for stop in stops]
        self.stops, self.pending, self.hit = tuple(stops), "", False

    def add(self, chunk: str, token: int | None = None) -> str:
        text = self.pending + chunk + self.marks.get(token, "")
        matches = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        self.hit = bool(matches)
        waits = max((begun(text, stop) for stop in self.stops), default=0)
        end = min(matches)[1] if matches else len(text) - waits
        self.pending = "" if matches else text[end:]
        return self._shown(text[:end])

    def flush(self) -> str:
        """The text that waited, once no more follows."""
        pending, self.pending = self.pending, ""
        return self._shown(pending)

    def _shown(self, text: str) -> str:
        return text.translate(dict.fromkeys(map(ord, self.marks.values()))) if self.marks else text


class Answer:
    """One answer as it comes: tokens go into `result`, text comes out as it becomes certain.

    ends: the token ids that end it. before: tokens whose text goes on in the answer (`Prompts.continued`).
    """

    def __init__(
        self, options: Options, ends: Collection[int], result: Generation, tokenizer: Tokenizer | None,
        before: Sequence[int] = (),
    ):
        self.options, self.ends, self.result, self.tokenizer = options, ends, result, tokenizer
        self.stream = tokenizer.stream(before) if tokenizer else None
        self.stops = StopText(options.stop, tokenizer)

    def add(self, token: int, logits: np.ndarray | None, is_full: bool) -> str:
        """The text that has become certain with the next token; with the last one `result.finish_reason` is set.

        logits: float32 [vocab], what it was drawn from, where log-probabilities are asked for. is_full: the row of the
        cache has no room for it.
        """
        result, text, is_end = self.result, "", token in self.ends
        if is_end:
            result.finish_reason = "stop"
        else:
            result.token_ids.append(int(token))
            if result.logprobs is not None:
                result.logprobs.append(logprob(logits, int(token), self.options.logprobs, self.tokenizer))
            if len(result.token_ids) == self.options.max_tokens:
                result.finish_reason = "length"
            elif is_full:
                result.finish_reason = "context"
            text = self.stream.add(token) if self.stream else ""
        return self._ended(text, None if is_end else token) if result.finish_reason else self._shown(text, token)

    def end(self, reason: str) -> str:
        """Ends it here; the text that waited."""
        self.result.finish_reason = reason
        return self._ended("", None)

    def _ended(self, text: str, token: int | None) -> str:
        text = self._shown(text + (self.stream.flush() if self.stream else ""), token)
        if not self.stops.hit:
            rest = self.stops.flush()
            self.result.text += rest
            text += rest
        return text

    def _shown(self, text: str, token: int | None) -> str:
        if token is None or self.result.new_tokens > self.options.min_tokens:
            text = self.stops.add(text, token)
        if self.stops.hit:
            self.result.finish_reason = "stop"
        self.result.text += text
        return text


def logprob(logits: np.ndarray, token: int, k: int, tokenizer: Tokenizer | None) -> Logprob:
    """Of a token, and of the k likeliest beside it; logits float32 [vocab]."""
    top = likeliest(logits, token, k)
    first, *others = (Logprob(i, tokenizer.token_text(i) if tokenizer else "", value) for i, value in top)
    return Logprob(first.token_id, first.token, first.logprob, tuple(others))


def likeliest(logits: np.ndarray, token: int, k: int) -> list[tuple[int, float]]:
    """(id, log-probability) of `token`, then of the k likeliest tokens in order; logits float32 [vocab], natural
    logarithms."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    k = min(k, len(x))
    top = np.argpartition(-x, k - 1)[:k] if k else np.empty(0, int)
    top = top[np.lexsort((top, -x[top]))]
    return [(i, max(float(x[i]), -9999.0)) for i in (token, *top.tolist())]  # JSON has no infinity
