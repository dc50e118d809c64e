"""What a Python program gives to `generate` and its like: prompts of one kind, options by name, no more than there is
room for; else a UserError. And the token ids of such prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import memory
from .chat_template import Message, malformed
from .checks import TEXT, as_path, flag, whole
from .config import Config
from .errors import UserError, shown
from .formats.rounding import MODES
from .generation import Prompts
from .ops.reference import Reference
from .options import Options, for_each
from .oscar import SCHEMES, Scheme
from .plans import BATCH_TOKENS
from .prompt_cache import PromptCache, check_owner, common, continued
from .rows import whole_blocks
from .sampling import Sampling
from .storage.identity import WeightFiles
from .tokenizer import Tokenizer
from .towers.media import Medium, check_room, expanded, hidden, media_of, opened, words

Prompt = str | Sequence[int] | Sequence[Message]
KINDS = 'a prompt is text, a list of token ids, or a list of messages {"role", "content"}'
SAMPLING = [field.name for field in fields(Sampling)]
OPTIONS = [field.name for field in fields(Options) if field.name not in ("sampling", "n")]
RAW = "leave out chat=False (--raw)"


def one_prompt(prompt: Any) -> str | list[int] | list[dict[str, Any]]:
    """The prompt, its ids as Python's integers. Raises UserError for what is not one prompt."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise UserError(f"{KINDS}; this is {type(prompt).__name__}: decode it to text first")
    if isinstance(prompt, Mapping):
        raise UserError(f"{KINDS}; this is one {type(prompt).__name__}: put a message into a list")
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
        prompt = prompt.tolist() if prompt.dtype.kind in "iu" or not prompt.size else list(prompt)
    if not isinstance(prompt, Sequence):
        hint = ": make it a list" if isinstance(prompt, Iterator | np.ndarray) else ""
        raise UserError(f"{KINDS}; this is {shown(prompt)}, {type(prompt).__name__}{hint}")
    if any(isinstance(item, Mapping) for item in prompt):
        if why := malformed(prompt):
            raise UserError(f'messages must be objects {{"role": text, "content": text}}: {why}')
        return [dict(message) for message in prompt]
    for i, item in enumerate(prompt):
        if isinstance(item, bool) or not isinstance(item, int | np.integer):
            what = "a list of several prompts, where only one can be" if isinstance(item, str) else "none of these"
            raise UserError(f"{KINDS}; this is {what}: item {i} is {shown(item)}")
    return [int(item) for item in prompt]


def all_prompts(prompts: Any) -> tuple[list[str | list[int] | list[dict[str, Any]]], bool]:
    """The prompts, and whether it was one by itself, not in a list. Raises UserError for what is neither."""
    many = isinstance(prompts, Sequence) and not isinstance(prompts, TEXT)
    if many or isinstance(prompts, np.ndarray) and prompts.ndim == 2:
        if not len(prompts):
            raise UserError("there is no prompt; give at least one")
        if not isinstance(prompts[0], int | float | np.number | np.bool_ | Mapping):
            return [one_prompt(prompt) for prompt in prompts], False
    return [one_prompt(prompts)], True


def check_system(system: Any, prompts: Sequence[Any], chat: bool | None, cached: bool) -> None:
    """Raises UserError where a system message cannot stand in front of the prompts."""
    if not isinstance(system, str):
        raise UserError(f"system {shown(system)} must be text")
    if chat is False:
        raise UserError(f"a system message needs the chat template; {RAW}")
    if cached:
        raise UserError("a prompt cache begins the prompt, a system message cannot; read it into the cache")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("a system message goes in front of text; put it into the messages")
    if not all(prompts):
        raise UserError("the prompt is empty; give it some text")


def options_of(given: Mapping[str, Any], more: Sequence[str]) -> Options:
    """Options from keywords, the fields of `Sampling` among them. more: what else is taken. Raises UserError."""
    known = ["sampling", *SAMPLING, *OPTIONS]
    for name in given:
        if name not in known:
            near = get_close_matches(name, [*more, *known], 3, 0.5)
            way_out = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join([*more, *known])}"
            if name == "n":
                way_out = "for several answers to a prompt, use start(..., options=minioscar.Options(n=...))"
            raise UserError(f"there is no option {name!r}; {way_out}")
    numbers = {name: given[name] for name in SAMPLING if given.get(name) is not None}
    sampling = given.get("sampling")
    if numbers and sampling is not None:
        names = ", ".join(f"{name}=" for name in numbers)
        raise UserError(f"sampling= and {names} both say how tokens are drawn; give one of them")
    rest = {name: given[name] for name in OPTIONS if name in given}
    return Options(sampling=Sampling(**numbers) if numbers else sampling, **rest)


def gpus_of(gpus: Any) -> int:
    """How many cards a model is split over; one where no number was given. Raises UserError."""
    return 1 if gpus is None else whole("--gpus", gpus, lambda n: n >= 1, "a positive whole number")


def context_of(ctx: Any, config: Config) -> int | None:
    """The capacity of a cache that was asked for, None if none was. Raises UserError if the model does not have it."""
    if ctx is None:
        return None
    tokens = whole("--ctx", ctx, lambda _: True, "a number of tokens")
    if not 1 <= tokens <= config.max_context:
        raise UserError(f"--ctx {shown(ctx)} is out of range; {config.limit}")
    return tokens


def sequences_of(sequences: Any, answers: int) -> list[int]:
    """The number under which each answer draws, its place where none is given. Raises UserError."""
    if sequences is None:
        return list(range(answers))
    if isinstance(sequences, np.ndarray):
        sequences = sequences.tolist()
    if not isinstance(sequences, Sequence) or isinstance(sequences, TEXT) or len(sequences) != answers:
        raise UserError(f"sequences {shown(sequences)} must be {answers} numbers, one for each answer")
    return [whole("sequences", number, lambda n: 0 <= n < 2**32, "numbers from 0 to 2^32 - 1") for number in sequences]


def variables_of(template: Any) -> dict[str, Any]:
    """More variables of the chat template. Raises UserError for what are none."""
    if template is None:
        return {}
    if not isinstance(template, Mapping) or not all(isinstance(name, str) for name in template):
        raise UserError(f"template {shown(template)} must be variables by name, such as {{'enable_thinking': False}}")
    if taken := {"messages", "add_generation_prompt"} & set(template):
        raise UserError(f"template cannot set {' and '.join(sorted(taken))}: the prompt does; leave it out")
    return dict(template)


def is_chat(prompt: Any) -> bool:
    """Whether a prompt that `one_prompt` has checked is messages."""
    return bool(prompt) and isinstance(prompt[0], Mapping)


def with_weights(config: Config, mode: str | None) -> Config:
    """The config of a model whose matrices are quantized when it is loaded. Raises UserError for an unknown mode."""
    if mode is not None and mode not in MODES:
        raise UserError(f"--weights {shown(mode)} is not known; choose from {', '.join(MODES)}, or leave it out")
    return replace(config, weights=mode)


def scheme_named(name: str) -> Scheme:
    if not isinstance(name, str) or name not in SCHEMES:
        raise UserError(f"--kv {shown(name)} is not a scheme; choose from {', '.join(SCHEMES)}")
    return SCHEMES[name]


class Encoded(NamedTuple):
    """A prompt as token ids. is_chat: the chat template wrote it."""

    ids: list[int]
    is_chat: bool
    media: tuple[Medium, ...] = ()


class Prompting:
    """What an `Engine` makes of prompts of every kind: plain text becomes `Tokenizer.prompt_ids`, and there are token
    ids, messages with their media, and what goes on from a prompt cache, which is made here too."""

    config: Config
    scheme: Scheme
    ops: Reference
    tokenizer: Tokenizer  # raises UserError without one
    _tokenizer: Tokenizer | None
    files: WeightFiles | None
    folder: Path | None

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def weights_sha256(self) -> str:
        """Of the weight files, hashed when a prompt cache is first saved or loaded. Raises UserError if they have
        changed."""
        if self.files is None:
            why = "this model was not loaded from a folder, so a prompt cache cannot be bound to it"
            raise UserError(f"{why}; use minioscar.load")
        return self.files.sha256

    @property
    def model_files(self) -> list[Path]:
        """What the model was read from; nothing that is saved may replace it."""
        return [*(self.files.stamps if self.files else ()), *(self.folder.glob("*.json") if self.folder else ())]

    def encode(
        self, prompt: Prompt, chat: bool | None = None, cache: PromptCache | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a whole prompt; parameters as in `generate`. Raises UserError for an empty one, for ids that the
        model does not have, and where cache, chat and template do not go with this kind of prompt."""
        return self._encode(prompt, chat, cache, template).ids

    def opened(self, prompt: Prompt) -> str | list[int] | list[Message]:
        """The prompt, in messages each picture and video read (`media.opened`): calls with it do not read it again."""
        prompt = one_prompt(prompt)
        return opened(prompt, self.config.towers) if is_chat(prompt) else prompt

    def _encode(self, prompt: Prompt, chat: Any, cache: PromptCache | None, template: Any) -> Encoded:
        prompt, chat = one_prompt(prompt), flag("chat", chat)
        if cache is not None:
            check_owner(cache, self)
        full = self._full_prompt(prompt, chat, cache) if isinstance(prompt, str) else prompt
        if is_chat(full):
            if full is prompt and chat is False:
                raise UserError(f"messages go through the chat template; {RAW}")
            messages = self.opened(full)
            ids = self.render(messages, template)
            if full is prompt and cache is not None and not cache.begins(messages, ids):
                way_out = "repeat these, or give the next one as text"
                raise UserError(f"the messages do not begin with those of the prompt cache; {way_out}")
            return Encoded(ids, True, media_of(messages))
        if template:
            raise UserError("template is for the chat template, but this prompt does not go through it; leave it out")
        if isinstance(full, str):
            return Encoded(self._checked(self.tokenizer.prompt_ids(full)), False)
        if chat:
            raise UserError("token ids are taken as they are; chat=True needs text or messages")
        held, media = ((), ()) if cache is None else (cache.ids, cache.media)
        self._checked([*words(held), *full])
        return Encoded([*held, *full], False, media)

    def _full_prompt(self, text: str, chat: bool | None, cache: PromptCache | None) -> str | list[Message]:
        """The prompt that a text makes: behind what the cache holds, as a message where the chat template is for it."""
        if cache is not None:
            if chat is not None and cache.chat is (not chat):
                raise UserError("a prompt cache is of a chat or of plain text already; leave chat= (--chat, --raw) out")
            return cache.followed_by(text)
        if not text:
            raise UserError("the prompt is empty; give it some text")
        chat = self.tokenizer.has_chat_template if chat is None else chat
        return [{"role": "user", "content": text}] if chat else text

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise UserError("the prompt is empty, or becomes no tokens; give it some text")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise UserError(
                f"the prompt has token ids outside 0 ... {self.config.vocab_size - 1}; the tokenizer is not this "
                "model's"
            )
        return ids

    def render(self, messages: Sequence[Message], template: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a chat, by the model's template with these variables more, and the beginning of the answer."""
        messages = one_prompt(messages)
        if not is_chat(messages):
            raise UserError('messages must be objects {"role": text, "content": text}')
        messages = self.opened(messages)
        text = self.tokenizer.chat(hidden(messages), template=variables_of(template))
        ids = self.tokenizer.rendered_ids(text, adds_bos=bool(self.config.towers))
        return expanded(self._checked(ids), media_of(messages), self.config.towers)

    def capacity(
        self, ids: list[list[int]], options: Options | Sequence[Options], ctx: int | None,
        cache: PromptCache | None = None, media: Sequence[Medium] = (),
    ) -> int:
        """The capacity of the cache, every limit checked before anything is computed. cache: holds the beginning of the
        prompts. media: that are in them.

        Without ctx it is what prompts and max_tokens need, as far as the model's context goes; for one answer, as far
        as memory has room, too: it ends there. Several at a time are refused instead, since fewer need less.
        """
        config, scheme, ops = self.config, self.scheme, self.ops
        if not ids:
            raise UserError("there is no prompt; give at least one")
        wanted, longest, limit = for_each(options, len(ids)), max(map(len, ids)), config.max_context
        rows, adjusts = sum(one.n for one in wanted), any(one.adjusts for one in wanted)
        for one in wanted:
            one.ends(self._tokenizer, config.vocab_size)
        if rows > BATCH_TOKENS:
            way_out = "give fewer prompts at once (--batch) or a smaller --n"
            raise UserError(f"{rows} answers at a time are more than {BATCH_TOKENS}; {way_out}")
        ctx = context_of(ctx, config)
        if longest > (ctx or limit):
            way_out = "shorten it or raise --ctx" if ctx and ctx < limit else f"shorten it: {config.limit}"
            raise UserError(f"the prompt has {longest} tokens, but the context holds {ctx or limit}; {way_out}")
        context = ctx or min(max(len(prompt) + one.max_tokens for prompt, one in zip(ids, wanted, strict=True)), limit)
        fed = max(sum(len(prompt) - (common(prompt, cache.ids) if cache else 0) for prompt in ids), 1)
        if ctx is None and rows == 1:
            context = memory.as_far_as_it_fits(config, scheme, ops, context, longest, fed, adjusts)
        else:
            memory.check(config, scheme, ops, rows, context, fed, penalties=adjusts)
        check_room(media, config.towers, ops, ops.cache_bytes(config, scheme, rows, context))
        return context

    def prefill(
        self, prompt: Prompt, chat: bool | None = None, template: Mapping[str, Any] | None = None
    ) -> PromptCache:
        """Reads a prompt now, for `generate(..., cache=...)` and `PromptCache.save` later; parameters as in `generate`.

        A text that the chat template is for becomes a user's message that the prompt of later calls goes on with. They
        give the same template again: what another one renders differently is read again.
        """
        prompt, chat, messages, media = one_prompt(prompt), flag("chat", chat), None, ()
        full = self._full_prompt(prompt, chat, None) if isinstance(prompt, str) else prompt
        if not is_chat(full) or full is prompt and chat is False:
            ids = self.encode(prompt, chat, template=template)
        else:  # only what does not depend on how it goes on: two ways to go on agree on it
            messages = self.opened(full)
            media = media_of(messages)
            ids = self.render(continued(messages, "a"), template)
            ids = ids[: common(ids, self.render(continued(messages, "1"), template))]
            self._checked(words(ids))
        context = whole_blocks(self.capacity([ids], Options(max_tokens=1), None, media=media), self.config)
        run = self.run(Prompts([ids], media=media), self.new_cache(1, context), Options(max_tokens=1))
        logits = run.prefill()[0]
        text = full if isinstance(full, str) else None
        return PromptCache.of(self, run.cache, ids, messages=messages, text=text, logits=logits, media=media)

    def load_cache(self, path: str | Path) -> PromptCache:
        """A prompt cache that `PromptCache.save` wrote. Raises UserError where it was not made with this model and
        scheme."""
        return PromptCache.load(as_path("a prompt cache", path), self)
