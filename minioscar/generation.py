"""One batch of prompts being answered: prefill, then step by step. What becomes of the tokens is in answers.py."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from . import memory
from .answers import Answer, Generation
from .attention_inputs import with_progress
from .batch import Batch
from .cache import Cache
from .decoding import Decoder
from .errors import UserError
from .model import Model
from .options import Options, first_answers, for_each
from .sampling import RowSampling, next_token
from .tables import size
from .tokenizer import Tokenizer
from .towers.media import Medium, words

T = TypeVar("T")


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
        of_each = zip(self.options, ends, self.results, before, strict=True)
        self.answers = [Answer(*of, self.tokenizer, before) for *of, before in of_each]

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
            with with_progress(self.model, sum(map(len, inputs)), self.progress) as model:
                logits = self._pass(slots, inputs, lambda ids, batch: model.forward(ids, self.cache, batch))
            logits_of |= zip(slots, logits, strict=True)
        for slot in logits_of:
            for other in range(slot + 1, slot + self.options[slot].n):
                self.cache.copy(slot, other)
        return np.repeat(np.stack(list(logits_of.values())), [self.options[slot].n for slot in logits_of], axis=0)

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
        tokens, held = int(self.cache.lengths.max()), size(self.cache.nbytes)
        work = self.decoder = self.cache = None
        what = f"{reason}, after {tokens} tokens; the cache of {held} was freed"
        raise memory.out_of_memory(self.model.config, self.model.scheme, self.model.ops, what)
