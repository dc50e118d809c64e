"""What a Python program gives to `generate` and its like: prompts of one kind, options by name, no more than there is
room for; else a UserError."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import numpy as np

from . import memory
from .chat_template import Message, malformed
from .checks import TEXT, whole
from .config import Config
from .errors import UserError, shown
from .model import Model
from .options import Options, for_each
from .plans import BATCH_TOKENS
from .prompt_cache import PromptCache, common
from .sampling import Sampling
from .tokenizer import Tokenizer
from .towers.media import Medium, check_room

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


def capacity(
    model: Model, tokenizer: Tokenizer | None, ids: list[list[int]], options: Options | Sequence[Options],
    ctx: int | None, cache: PromptCache | None = None, media: Sequence[Medium] = (),
) -> int:
    """`Engine.capacity`."""
    config, scheme, ops = model.config, model.scheme, model.ops
    if not ids:
        raise UserError("there is no prompt; give at least one")
    wanted, longest, limit = for_each(options, len(ids)), max(map(len, ids)), config.max_context
    rows, adjusts = sum(one.n for one in wanted), any(one.adjusts for one in wanted)
    for one in wanted:
        one.ends(tokenizer, config.vocab_size)
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
