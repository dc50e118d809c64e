"""load -> prefill -> decode: what the command line and Python programs call.

    engine = load("smollm2-135m")
    print(engine.generate("The capital of France is", max_tokens=8, chat=False).text)
    for piece in engine.stream("Tell me a joke."): print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, overload

import numpy as np

from . import arguments, memory
from . import ops as back_ends
from .answers import Generation
from .arguments import Prompt
from .cache import Cache
from .checks import as_path, flag
from .config import Config
from .errors import UserError
from .generation import Prompts, Run
from .key_shaping import prepared
from .model import Model
from .nan_check import Watch
from .ops.reference import Reference
from .options import Options, first_answers, for_each
from .oscar import DEFAULT_SCHEME, Scheme
from .pages import check_scheme
from .parallel import cards
from .prompt_cache import File, PromptCache, common
from .storage.checkpoint import weight_files
from .storage.hub import resolve
from .tokenizer import Tokenizer
from .weights import Weights
from .weights import load as load_weights


class Engine(arguments.Prompting):
    """A model on a back end, bound to a KV scheme, its weights `prepared` for it. `load` makes one."""

    def __init__(
        self, config: Config, weights: Weights, tokenizer: Tokenizer | None, scheme: Scheme, ops: Reference,
        progress: bool = False, folder: Path | None = None,
    ):
        self.config, self.scheme, self.ops, self.progress, self.folder = config, scheme, ops, progress, folder
        self._tokenizer, self.files = tokenizer, weights.files
        self.model = Model(config, weights, scheme, ops)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError("this model was loaded without a tokenizer; give token ids instead of text")
        return self._tokenizer

    # --- text

    @overload
    def generate(self, prompts: str, **options: Any) -> Generation: ...
    @overload
    def generate(self, prompts: list[str], **options: Any) -> list[Generation]: ...
    @overload
    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Generation | list[Generation]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, ctx: int | None = None, chat: bool | None = None,
        cache: PromptCache | None = None, system: str | None = None, template: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generation | list[Generation]:
        """Continues one prompt, or several of unequal lengths as one batch (a list then, in their order).

        A prompt is text, token ids, or the messages of a chat, [{"role", "content"}, ...], whose content is text or
        parts, {"type": "text", "text"}, {"type": "image", "image": a file's name} and the same of "audio" and "video".
        chat: render text with the model's chat template (None: if it has one). ctx: capacity of the cache in tokens
        (None: what prompts and max_tokens need, see `capacity`). cache: what `prefill` or `load_cache` returned;
        prompts go on from there (messages repeat its own, see `PromptCache.followed_by`), and only what it does not
        hold is computed. system: a system message in front of text. template: more variables of the chat template.
        options: the fields of `Options` (max_tokens, stop, logprobs, ...) and of `Sampling` (temperature, top_p, seed,
        ...), or sampling=; None is the default. Raises UserError for an empty prompt, one that does not fit, or a value
        of a wrong type or out of range; Failure if memory runs out.
        """
        given, alone = arguments.all_prompts(prompts)
        run = self._start(given, options, ctx=ctx, chat=chat, cache=cache, system=system, template=template)
        for _ in run:
            pass
        return run.results[0] if alone else run.results

    def stream(
        self, prompt: Prompt, *, ctx: int | None = None, chat: bool | None = None, cache: PromptCache | None = None,
        system: str | None = None, template: Mapping[str, Any] | None = None, **options: Any,
    ) -> Iterator[str]:
        """The same for one prompt, text as it comes; parameters as in `generate`, all checked before this returns."""
        given = [arguments.one_prompt(prompt)]
        if options.get("logprobs") is not None:
            raise UserError("logprobs are not in the text that stream gives; use generate or start")
        run = self._start(given, options, ctx=ctx, chat=chat, cache=cache, system=system, template=template)
        return (piece for _, piece in run if piece)

    def _start(self, prompts: list[Any], options: dict[str, Any], *, system: str | None, **rest: Any) -> Run:
        wanted = arguments.options_of(options, ("ctx", "chat", "cache", "system", "template"))
        if system is not None:
            arguments.check_system(system, prompts, rest["chat"], rest["cache"] is not None)
            first = {"role": "system", "content": system}
            prompts = [[first, {"role": "user", "content": prompt}] for prompt in prompts]
        return self.start(prompts, options=wanted, **rest)

    def start(
        self, prompts: Sequence[Prompt], *, ctx: int | None = None, chat: bool | None = None,
        cache: PromptCache | None = None,
        sequences: Sequence[int] | None = None, options: Options | Sequence[Options] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Run:
        """Checks everything and allocates the cache; iterate the result for (answer, piece of text), token by token.

        The other half of `generate`, and more: options.n answers to each prompt, which is read once for all of them.
        options: one for all prompts, or one for each. sequences: the number under which each answer draws its random
        numbers (None: its place in the batch).
        """
        prompts, alone = arguments.all_prompts(prompts)
        if alone:
            raise UserError("several prompts go into a list, and one, too: start([prompt])")
        wanted = for_each(options, len(prompts))
        if any(one.stop for one in wanted):
            _ = self.tokenizer  # a stop string needs text
        encoded = [self._encode(prompt, chat, cache, template) for prompt in prompts]
        ids, media = [one.ids for one in encoded], [medium for one in encoded for medium in one.media]
        context = self.capacity(ids, wanted, ctx, cache, media)
        answers = sum(one.n for one in wanted)
        sequences, kept = arguments.sequences_of(sequences, answers), self.new_cache(answers, context)
        logits = None
        if cache is not None:
            for row, prompt in zip(first_answers(wanted), ids, strict=True):
                again = prompt == cache.ids and cache.logits is not None
                logits = cache.logits if again else logits
                cache.fill(kept, row, len(prompt) if again else min(common(prompt, cache.ids), len(prompt) - 1))
        prompts = Prompts(ids, logits, [not one.is_chat for one in encoded], media)
        return self.run(prompts, kept, wanted, sequences)

    def run(
        self, prompts: Prompts, cache: Cache, options: Options | Sequence[Options],
        sequences: Sequence[int] | None = None
    ) -> Run:
        """A run over a cache of the caller's."""
        return Run(self.model, self._tokenizer, prompts, cache, options, sequences, self.progress)

    # --- logits

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every position of one sequence, as prefill computes them; float32 [len(ids), vocab]."""
        ids = self.encode(ids)
        self.capacity([ids], Options(max_tokens=1), None)
        return self._or_out_of_memory(lambda: self._logits(np.array(ids)))

    def _logits(self, ids: np.ndarray) -> np.ndarray:
        cache = Cache(self.config, self.scheme, 1, len(ids), self.ops)
        return self.model.forward(ids, cache, cache.batch_for([0], [len(ids)]), every=True)

    # --- memory

    def new_cache(self, batch: int, context: int, make: Callable[..., Cache] | None = None) -> Cache:
        """make: another kind of cache (None: rows that have their blocks to themselves)."""
        return self._or_out_of_memory(lambda: (make or Cache)(self.config, self.scheme, batch, context, self.ops))

    def _or_out_of_memory(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except MemoryError as error:
            reason = str(error) or "no more memory"
        # the frames of `work`, and their arrays, are gone
        raise memory.out_of_memory(self.config, self.scheme, self.ops, reason)


def load(
    model: str | Path, kv: str | None = None, device: str | None = "auto", *, ctx: int | None = None,
    tokenizer: bool = True, cache: str | Path | None = None, weights: str | None = None, **more: Any,
) -> Engine:
    """Loads a model: a folder, a name under weights/, or a Hugging Face id.

    kv: a scheme of `oscar.SCHEMES` (None: that of `cache`, else int2). device: "auto" (None), "cuda" or "cpu". ctx:
    refuse early if the model or the memory cannot hold so many tokens. tokenizer=False: token ids only (the folder
    needs no tokenizer). cache: a file that `load_cache` will read; one of another model is refused now. weights: "int8"
    or "int4", for matrices that the files have in 16 or 32 bits (None: as they are). more: progress=True shows a bar,
    debug=True checks what every operation computes for NaN and infinity, gpus=N splits the model over so many (on the
    CPU simulated ones). Raises UserError for anything that cannot work, before the weights are read.
    """
    as_path("model", model)
    if unknown := more.keys() - {"progress", "debug", "gpus"}:
        raise TypeError(f"load() got an unexpected keyword argument {unknown.pop()!r}")
    tokenizer, gpus = flag("tokenizer", tokenizer), arguments.gpus_of(more.get("gpus"))
    progress, debug = (flag(name, more.get(name, False)) for name in ("progress", "debug"))
    with File(as_path("cache", cache)) if cache is not None else nullcontext() as saved:
        scheme = arguments.scheme_named((saved.scheme if saved else DEFAULT_SCHEME) if kv is None else kv)
        ops = back_ends.backend(device)
        folder = resolve(str(model))
        config = arguments.with_weights(Config.from_folder(folder), weights)
        check_scheme(config, scheme)
        ops = cards.over(gpus, ops, config, scheme)
        files = weight_files(folder) if saved else None
        if saved:
            saved.check(config, scheme, files.sha256)
    ctx = arguments.context_of(ctx, config)
    words = Tokenizer(folder) if tokenizer else None
    if ctx is not None:
        memory.check(config, scheme, ops, 1, ctx, 1, memory.weight_bytes(config, scheme, ops))
    if gpus > 1:
        loaded = cards.load_weights(folder, config, ops, scheme, progress)
    else:
        loaded = prepared(load_weights(folder, config, ops, progress, scheme.rotate), config, scheme, ops, progress)
    ops.release()  # what was rotated or unpacked in them
    engine = Engine(config, loaded, words, scheme, Watch(ops, loaded) if debug else ops, progress, folder)
    if files is not None:
        if files.stamps != engine.files.stamps:
            raise UserError(f"{folder}: the weight files have changed while the model was loaded; load it again")
        engine.files = files  # hashed already
    return engine
