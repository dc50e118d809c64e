"""One batch of prompts being answered: prefill, then step by step, text as it comes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from . import memory
from .batch import Batch
from .cache import Cache
from .decoding import Decoder
from .errors import UserError
from .model import Model
from .options import Options, first_answers, for_each
from .sampling import RowSampling, likeliest, next_token
from .tokenizer import Tokenizer
from .towers.media import Medium, words

T = TypeVar("T")
SHOW_PREFILL = 1024  # a prompt this long takes seconds on a CPU: progress is shown


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


class Encoded(NamedTuple):
    """A prompt as token ids. is_chat: the chat template wrote it."""

    ids: list[int]
    is_chat: bool
    media: tuple[Medium, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """What a run reads. ids: whole prompts, whose first row of the cache may hold the first `cache.lengths[row]` tokens
    already.

    logits, float32 [vocab]: what follows a prompt that the cache holds to its last token. continued: prompts whose text
    goes on in the answer, with SentencePiece's space between the two; to others, and without it, the answer is a text
    of its own.
    """

    ids: list[list[int]]
    logits: np.ndarray | None = None
    continued: Sequence[bool] | None = None
    media: Sequence[Medium] = ()  # of all prompts


class Run:
    """One batch being generated: iterate for (index of the answer, chunk of text), read `results` at any time.

    options: one for all prompts, or one for each. The n answers to a prompt stand together, in the cache and in
    `results`. sequences: the number under which each answer draws its random numbers. progress: show on stderr how far
    a long prompt is read.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer | None, prompts: Prompts, cache: Cache,
        options: Options | Sequence[Options], sequences: Sequence[int] | None = None, progress: bool = False,
    ):
        self.model, self.tokenizer, self.progress, self.ids = model, tokenizer, progress, prompts.ids
        self.logits, continued, ids, vocab = prompts.logits, prompts.continued, prompts.ids, model.config.vocab_size
        self.media = prompts.media
        self.cache: Cache | None = cache  # None once a run that did not fit into memory has freed it
        self.decoder: Decoder | None = None
        self.begun = False
        options = for_each(options, len(ids))
        self.first = first_answers(options)
        asked = [i for i, one in enumerate(options) for _ in range(one.n)]  # the prompt of each answer
        self.options = [options[i] for i in asked]  # of each answer, as what follows
        said = list(map(words, ids))
        before = [said[i] if continued is not None and continued[i] else () for i in asked]
        sequences = range(len(asked)) if sequences is None else sequences
        ends = [one.ends(self.tokenizer, vocab) for one in self.options]
        self.rows = [
            RowSampling(one.sampling, sequence, said[i], sorted(end for end in ends if end < vocab), one.min_tokens)
            for i, one, ends, sequence in zip(asked, self.options, ends, sequences, strict=True)
        ]
        self.results = [
            Generation(
                len(ids[i]), kv=model.scheme.name, kv_bytes=cache.nbytes, device=model.ops.name,
                prefilled_tokens=len(ids[i]) - int(cache.lengths[self.first[i]]),
                logprobs=None if options[i].logprobs is None else [],
            )
            for i in asked
        ]
        self.answers = [
            Answer(*of, self.tokenizer, before) for *of, before in zip(
                self.options, ends, self.results, before, strict=True
            )
        ]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        if self.begun:
            raise UserError("a run is iterated once; start another")
        self.begun = True
        results, before = self.results, time.perf_counter()
        logits = self.prefill()
        first = [next_token(*drawing, 0) for drawing in zip(logits, self.rows, strict=True)]
        for result in results:
            result.prefill_s = time.perf_counter() - before
        yield from self._accept(range(len(results)), first, logits)
        if any(not result.finish_reason for result in results):
            for slots, tokens, logits, spent in self._steps(first):
                for slot in slots:
                    results[slot].decode_s += spent * (results[slot].finish_reason is None)
                yield from self._accept(slots, tokens, logits)

    def _accept(
        self, slots: Sequence[int], tokens: Sequence[int], logits: np.ndarray | None
    ) -> Iterator[tuple[int, str]]:
        """What one step brought, (answer, chunk of text); answers that have ended get nothing more."""
        for at, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
            if not self.results[slot].finish_reason:
                is_full = self.cache.lengths[slot] == self.cache.context
                yield slot, self.answers[slot].add(int(token), None if logits is None else logits[at], is_full)

    def _steps(self, tokens: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray | None, float]]:
        """Decode steps after the prefill's tokens: rows, their tokens, logits where logprobs are asked for, seconds.

        As many steps as the back end takes ahead are launched before the first is read: an answer that ends by itself
        has then cost a step too many, which is discarded.
        """
        slots, graph = range(len(self.results)), all(one.graph for one in self.options)
        options = {
            "logits": any(one.logprobs is not None for one in self.options), "replay": "graph" if graph else "launches"
        }
        self.decoder = self._guarded(lambda: self.model.ops.decoder(self.model, self.cache, self.rows, **options))
        try:
            before, launched = time.perf_counter(), deque()
            self.decoder.feed(slots, tokens)
            while True:
                while len(launched) <= self.decoder.ahead:
                    going = [slot for slot in slots if self._should_continue(slot, len(launched))]
                    if not going:
                        break
                    self._guarded(partial(self.decoder.launch, going))
                    launched.append(going)
                if not launched:
                    return
                tokens_and_logits = self._guarded(self.decoder.read)
                spent, before = time.perf_counter() - before, time.perf_counter()
                yield launched.popleft(), *tokens_and_logits, spent
        finally:
            if self.decoder is not None:
                self.decoder.drain()

    def _should_continue(self, slot: int, ahead: int) -> bool:
        """Whether an answer takes one more step after `ahead` steps whose tokens are not known yet."""
        result, cache = self.results[slot], self.cache
        is_short = len(result.token_ids) + ahead < self.options[slot].max_tokens
        return result.finish_reason is None and is_short and cache.lengths[slot] + ahead < cache.context

    def prefill(self) -> np.ndarray:
        """Puts every prompt into the cache, once for all of its answers; the logits after it for each, float32
        [answers, vocab]."""
        feeds = {slot: ids[self.cache.lengths[slot] :] for slot, ids in zip(self.first, self.ids, strict=True)}
        feeds = {slot: ids for slot, ids in feeds.items() if ids}
        logits_of = dict.fromkeys(self.first, self.logits)
        slots, inputs = list(feeds), list(feeds.values())
        batch = self._batch(slots, inputs) if feeds else None
        steps = any(one.max_tokens > 1 for one in self.options)
        passes = [] if batch is None else [batch]
        self.model.ops.prepare(self.model, self.cache, passes, self.rows if steps else (), self.progress)
        if feeds:
            with self._progress(sum(map(len, inputs))) as model:
                logits = self._pass(slots, inputs, lambda ids, batch: model.forward(ids, self.cache, batch))
            logits_of |= zip(slots, logits, strict=True)
        for slot in logits_of:
            for other in range(slot + 1, slot + self.options[slot].n):
                self.cache.copy(slot, other)
        return np.repeat(np.stack(list(logits_of.values())), [self.options[slot].n for slot in logits_of], axis=0)

    @contextmanager
    def _progress(self, tokens: int) -> Iterator[Model]:
        """The model for one long forward pass, whose layers count on stderr where progress is shown."""
        if not self.progress or tokens < SHOW_PREFILL:
            yield self.model
            return
        from tqdm import tqdm

        title = f"prefill {tokens} tokens"
        with tqdm(total=self.model.config.num_layers, desc=title, unit="layer", leave=False) as bar:
            yield self.model.observed(lambda *_: bar.update())

    def _pass(self, slots: list[int], inputs: list[list[int]], forward: Callable[[np.ndarray, Batch], T]) -> T:
        """One forward pass. Broken off, it leaves a cache that is whole again; out of memory, it leaves none."""
        batch = self._batch(slots, inputs)
        try:
            return self._guarded(lambda: forward(np.concatenate(inputs), batch))
        except BaseException:
            if self.cache is not None:
                self.cache.rollback(batch)
            raise

    def _batch(self, slots: list[int], inputs: list[list[int]]) -> Batch:
        of_slot = dict(zip(self.first, self.ids, strict=True))
        batch = self.cache.batch_for(slots, map(len, inputs))
        return batch.reading([of_slot[slot] for slot in slots], self.media) if self.media else batch

    def _guarded(self, work: Callable[[], T]) -> T:
        """Raises Failure, the cache freed, where memory runs out."""
        try:
            with np.errstate(all="ignore"):  # what becomes of an overflow is checked where it matters, at the logits
                return work()
        except MemoryError as error:
            reason = str(error) or "no more memory"
        tokens, size = int(self.cache.lengths.max()), self.cache.nbytes
        work = self.decoder = self.cache = None
        what = f"{reason}, after {tokens} tokens; the cache of {memory.size(size)} was freed"
        raise memory.out_of_memory(self.model.config, self.model.scheme, self.model.ops, what)
