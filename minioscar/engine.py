"""load -> prefill -> decode: what the command line and Python programs call.

    engine = load("smollm2-135m")
    print(engine.generate("The capital of France is", max_tokens=8, chat=False).text)
    for piece in engine.stream("Tell me a joke."): print(piece, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from . import ops as back_ends
from .cache import Cache, cache_bytes
from .config import Config
from .errors import UserError
from .hub import resolve
from .model import Model, Progress, check_scheme
from .ops.reference import Reference
from .oscar import DEFAULT_SCHEME, SCHEMES, Scheme
from .sampling import Sampling
from .shaping import shape_keys
from .tokenizer import Tokenizer
from .weights import Weights, for_scheme
from .weights import load as load_weights

Prompt = str | Sequence[int]
MAX_TOKENS = 256
SHOW_PREFILL = 1024  # a prompt this long takes seconds on a CPU: progress is shown


@dataclass
class Generation:
    """What one prompt became. Times are of the whole batch it was in, in seconds."""

    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop": an end token came (it is not in token_ids); "length": max_tokens or the context is full
    kv: str = ""
    kv_bytes: int = 0  # of the whole cache
    device: str = ""
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        """Decode steps per second; the first token belongs to the prefill. 0 if there was only that one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s and self.new_tokens > 1 else 0.0


class Engine:
    """A model on a back end, bound to a KV scheme, its weights prepared for it by `for_scheme`. `load` makes one."""

    def __init__(
        self, config: Config, weights: Weights, tokenizer: Tokenizer | None, scheme: Scheme, ops: Reference, progress: bool = False
    ):
        self.config, self.scheme, self.ops, self.progress = config, scheme, ops, progress
        self._tokenizer = tokenizer
        self.model = Model(config, weights, scheme, ops)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError("this model was loaded without a tokenizer; give token ids instead of text")
        return self._tokenizer

    # --- text

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, max_tokens: int = MAX_TOKENS, ctx: int | None = None, chat: bool | None = None,
        sampling: Sampling | None = None,
    ) -> Generation | list[Generation]:
        """Continues one prompt, or several of unequal lengths as one batch (a list then, in their order).

        A prompt is text or token ids. chat: render text with the model's chat template (None: if it has one). ctx: capacity
        of the cache in tokens (None: what the prompts and max_tokens need). Raises UserError for an empty prompt or one
        that does not fit.
        """
        alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
        generations = self.start([prompts] if alone else prompts, max_tokens=max_tokens, ctx=ctx, chat=chat, sampling=sampling)
        for _ in generations:
            pass
        return generations.results[0] if alone else generations.results

    def stream(self, prompt: Prompt, **options) -> Iterator[str]:
        """The same for one prompt, text as it comes; options as in `generate`."""
        for _, piece in self.start([prompt], **options):
            if piece:
                yield piece

    def start(
        self, prompts: Sequence[Prompt], *, max_tokens: int = MAX_TOKENS, ctx: int | None = None, chat: bool | None = None,
        sampling: Sampling | None = None,
    ) -> Run:
        """Checks everything and allocates the cache; iterate the result for (prompt, piece of text), token by token."""
        ids = [self.encode(prompt, chat) for prompt in prompts]
        context = self._context(ids, max_tokens, ctx)
        cache = Cache(self.config, self.scheme, len(ids), context, self.ops)
        return Run(self, ids, cache, max_tokens, sampling or Sampling())

    def encode(self, prompt: Prompt, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt. Raises UserError for an empty one or for ids that the model does not have."""
        if isinstance(prompt, str):
            if not prompt:
                raise UserError("the prompt is empty; give it some text")
            ids = self.tokenizer.prompt_ids(prompt, self.tokenizer.has_chat_template if chat is None else chat)
        else:
            ids = [int(i) for i in prompt]
        if not ids:
            raise UserError("the prompt is empty; give it some text")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise UserError(f"the prompt has token ids outside 0 ... {self.config.vocab_size - 1}; the tokenizer is not this model's")
        return ids

    def _context(self, ids: list[list[int]], max_tokens: int, ctx: int | None) -> int:
        """The capacity of the cache, every limit checked before anything is computed."""
        if not ids:
            raise UserError("there is no prompt; give at least one")
        if max_tokens < 1:
            raise UserError(f"max_tokens {max_tokens} is out of range; ask for at least one token")
        longest, limit = max(map(len, ids)), self.config.max_positions
        if ctx is not None and not 1 <= ctx <= limit:
            raise UserError(f"--ctx {ctx} is out of range; this model has {limit} positions")
        if longest > (ctx or limit):
            way_out = "shorten it or raise --ctx" if ctx and ctx < limit else "shorten it"
            raise UserError(f"the prompt has {longest} tokens, but the context holds {ctx or limit}; {way_out}")
        context = ctx or min(longest + max_tokens, limit)
        need, free = cache_bytes(self.config, self.scheme, len(ids), context), self.ops.free_bytes()
        if need > free:
            fits = longest_context(self.config, self.scheme, len(ids), free)
            raise UserError(
                f"a {self.scheme.name} cache for {len(ids)} x {context} tokens takes {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB of "
                f"{self.ops.name} memory are free; --ctx {fits} fits"
            )
        return context

    # --- logits

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every position of one sequence, as prefill computes them; float32 [len(ids), vocab]."""
        ids = self.encode(ids)
        self._context([ids], 1, None)
        cache = Cache(self.config, self.scheme, 1, len(ids), self.ops)
        return self.model.forward(np.array(ids), cache, cache.place([0], [len(ids)]), every=True)

    def layers_bar(self, tokens: int) -> Progress:
        """Progress over the layers of a long forward pass, on stderr, if this engine shows progress."""
        from tqdm import tqdm

        shown = self.progress and tokens >= SHOW_PREFILL
        return partial(tqdm, desc=f"prefill {tokens} tokens", unit="layer", leave=False) if shown else iter


class Run:
    """One batch being generated: iterate for (index of the prompt, piece of text), read `results` at any time."""

    def __init__(self, engine: Engine, ids: list[list[int]], cache: Cache, max_tokens: int, sampling: Sampling):
        self.engine, self.ids, self.cache, self.max_tokens, self.sampling = engine, ids, cache, max_tokens, sampling
        self.results = [
            Generation(len(prompt), kv=engine.scheme.name, kv_bytes=cache.nbytes, device=engine.ops.name) for prompt in ids
        ]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        engine, results = self.engine, self.results
        tokenizer = engine._tokenizer
        end_ids = tokenizer.eos_ids if tokenizer else frozenset()
        streams = [tokenizer.stream() if tokenizer else None for _ in results]
        for index, token in self._tokens(end_ids):
            result, stream = results[index], streams[index]
            piece = "" if stream is None or token is None else stream.add(token)
            if result.finish_reason and stream:
                piece += stream.flush()
            result.text += piece
            yield index, piece

    def _tokens(self, end_ids: Iterable[int]) -> Iterator[tuple[int, int | None]]:
        """(prompt, new token id) in order; None for the end token of a prompt, whose finish_reason is set by then."""
        engine, cache, results = self.engine, self.cache, self.results
        slots, step = list(range(len(self.ids))), 0
        inputs = [np.array(prompt) for prompt in self.ids]
        before = time.perf_counter()
        while slots:
            counts = [len(x) for x in inputs]
            bar = engine.layers_bar(sum(counts))
            ids, batch = np.concatenate(inputs), cache.place(slots, counts)
            tokens = engine.model.step(ids, cache, batch, self.sampling, step, bar).tolist()
            spent, before = time.perf_counter() - before, time.perf_counter()
            for slot, token in zip(slots, tokens, strict=True):
                result = results[slot]
                if step:
                    result.decode_s += spent
                else:
                    result.prefill_s = spent
                if token in end_ids:
                    result.finish_reason = "stop"
                    yield slot, None
                    continue
                result.token_ids.append(token)
                if len(result.token_ids) == self.max_tokens or cache.lengths[slot] == cache.context:
                    result.finish_reason = "length"
                yield slot, token
            inputs = [np.array([token]) for slot, token in zip(slots, tokens, strict=True) if not results[slot].finish_reason]
            slots, step = [slot for slot in slots if not results[slot].finish_reason], step + 1


def load(
    model: str | Path, kv: str = DEFAULT_SCHEME, device: str = "auto", *, ctx: int | None = None, progress: bool = False,
    tokenizer: bool = True,
) -> Engine:
    """Loads a model: a folder, a name under weights/, or a Hugging Face id.

    kv: a scheme of `oscar.SCHEMES`. device: "auto", "cuda" or "cpu". ctx: refuse early if the model or the memory cannot hold
    so many tokens. tokenizer=False: token ids only (the folder needs no tokenizer). Raises UserError for anything that cannot
    work, before the weights are read.
    """
    scheme = scheme_named(kv)
    ops = back_ends.backend(device)
    folder = resolve(str(model))
    config = Config.from_folder(folder)
    check_scheme(config, scheme)
    if ctx is not None and not 1 <= ctx <= config.max_positions:
        raise UserError(f"--ctx {ctx} is out of range; {folder.name} has {config.max_positions} positions")
    words = Tokenizer(folder) if tokenizer else None
    weights = for_scheme(load_weights(folder, config, ops, progress), config, scheme, ops)
    if scheme.shaped:
        weights = shape_keys(weights, config, ops)
    return Engine(config, weights, words, scheme, ops, progress)


def scheme_named(name: str) -> Scheme:
    if name not in SCHEMES:
        raise UserError(f"--kv {name!r} is not a scheme; choose from {', '.join(SCHEMES)}")
    return SCHEMES[name]


def longest_context(config: Config, scheme: Scheme, batch: int, free: int) -> int:
    """The most tokens (a multiple of 128, at most the model's positions) whose cache fits `free` bytes; 0 if none does."""
    low, high = 0, -(-config.max_positions // 128)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cache_bytes(config, scheme, batch, middle * 128) <= free else (low, middle - 1)
    return min(low * 128, config.max_positions)
