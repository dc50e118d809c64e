"""A chat that keeps its cache between turns: only what the cache does not hold yet is prefilled.

Every turn renders the whole history with the model's template and compares its tokens with those that the cache holds.
Usually the history goes on where the cache ends. Where it does not (a template that drops the thoughts of earlier
answers, an answer whose text splits into other tokens than the model drew), the cache is cut where the two part:
anywhere in the window of the newest tokens, else at the block before, whose tokens are then fed again
(`Cache.left_after_cut`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import memory
from ..answers import Generation
from ..arguments import context_of, options_of, variables_of
from ..cache import Cache
from ..chat_template import Message
from ..detokenizer import complete
from ..engine import Engine
from ..errors import ChatTemplateError, UserError, shown
from ..generation import Prompts
from ..options import Options
from ..oscar import WINDOW
from ..prompt_cache import PromptCache, check_owner, common, continued
from ..rows import whole_blocks
from ..towers.media import Medium, media_of, opened

Turn = tuple[list[Message], list[Message]]  # the messages before it, and those that its answer follows


class Conversation:
    """Messages, and a cache of `context` tokens. `messages` may be read at any time; `last` is the newest answer as
    generated.

    system: the first message. cache: a document or an earlier conversation to go on with; its messages are the first.
    ctx: tokens (None: all that the model has, or what fits into memory), rounded up to whole blocks. template: more
    variables of the chat template. Raises UserError where the model has none, where the context cannot be had, or for
    both system and cache.
    """

    def __init__(
        self, engine: Engine, *, system: str | None = None, cache: PromptCache | None = None, ctx: int | None = None,
        template: Mapping[str, Any] | None = None,
    ):
        if not isinstance(engine, Engine):
            raise UserError(f"engine {shown(engine)} must be what minioscar.load returned")
        if not engine.tokenizer.has_chat_template:
            why = f"{engine.tokenizer.folder}: the model has no chat template, so it cannot chat"
            raise ChatTemplateError(why, "chat")
        if system is not None and not isinstance(system, str):
            raise UserError(f"system {shown(system)} must be text")
        if cache is not None:
            check_owner(cache, engine)
        if cache is not None and (system is not None or cache.messages is None):
            kind = "token ids" if cache.text is None else "plain text, it was made with --raw"
            why = "its messages are the first, a system message cannot be" if cache.messages else f"it holds {kind}"
            raise UserError(f"this prompt cache cannot begin this conversation: {why}")
        self.engine, self.turns = engine, 0  # answers so far, those that were taken back too
        self.context, self.template = self._room(ctx), variables_of(template)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.last: Generation | None = None
        self.cache: Cache | None = None
        self.held: list[int] = []  # the tokens in row 0 of the cache
        self._lost: list[int] = []  # those after them that went with its window: fed again when it goes on or is saved
        self._answer: Generator[str, None, None] | None = None
        self.shown: list[dict[str, Any]] = []  # parts that the next message brings
        if cache is not None:
            if len(cache) > self.context:
                held = f"the prompt cache has {len(cache)} tokens, but the context holds {self.context}"
                raise UserError(f"{held}{self._more('; raise --ctx')}")
            self.messages, self.cache = list(cache.messages), engine.new_cache(1, self.context)
            cache.fill(self.cache, 0, len(cache))
            self.held = list(cache.ids)
        self._beginning, self._past = list(self.messages), _past(self.messages)

    def _more(self, way_out: str) -> str:
        """The way out, where the model's context goes further than this one; else why it does not."""
        return way_out if self.context < self.engine.config.max_context else f": {self.engine.config.limit}"

    def _room(self, ctx: int | None) -> int:
        config, scheme, ops = self.engine.config, self.engine.scheme, self.engine.ops
        if ctx is None:  # a fifth is left for what no arithmetic knows
            ctx = memory.longest_context(
                config, scheme, ops, 1, ops.free_bytes() * 4 // 5
            ) or min(WINDOW, config.max_context)
        ctx = context_of(ctx, config)
        memory.check(config, scheme, ops, 1, ctx, 1)
        return whole_blocks(ctx, config)  # so that the row can be saved

    def show(self, source: Any, kind: str = "image") -> tuple[Medium, ...]:
        """A picture, an "audio" or a "video" in front of the next message: a file's name, or what else a message's part
        may hold. Returns what the model reads of it: one medium, or those of a video. Raises UserError."""
        opened_ones = opened([{"content": [{"type": kind, kind: source}]}], self.engine.config.towers)
        self.shown += opened_ones[0]["content"]
        return media_of(opened_ones)

    def say(self, text: str, **options: Any) -> Generator[str, None, None]:
        """The answer to a user's message, as it comes; options as in `Engine.generate`.

        The message and what there is of its answer join the conversation, also where the iteration is broken off
        (Ctrl-C, a closed iterator); a message that got no answer at all does not. Raises UserError, the conversation as
        it was, for an empty message or one that the context does not hold any more.
        """
        if not isinstance(text, str):
            raise UserError(f"the message must be text, not {shown(text)}")
        wanted = options_of(options, ())
        self._close()
        said = [*self.shown, {"type": "text", "text": text}] if self.shown else text
        messages = continued(self.messages, said)
        if not text.strip() and len(messages) > len(self.messages):  # a document may be answered as it is
            raise UserError("the message is empty; say something")
        return self._begin([*self._past, (self.messages, messages)], wanted)

    def retry(self, **options: Any) -> Generator[str, None, None]:
        """Another answer to the last message, in place of the one that there is, with other random numbers; else as
        `say`.

        Raises UserError where nothing was answered yet.
        """
        wanted = options_of(options, ())
        self._close()
        if not self._past:
            raise UserError("there is no answer yet to try again")
        return self._begin(list(self._past), wanted)

    def undo(self) -> None:
        """Takes the last message and its answer back. Raises UserError where there is none."""
        self._close()
        if not self._past:
            raise UserError("there is no answer yet to take back")
        self.messages, self.last = self._past.pop()[0], None
        self._forget()

    def _forget(self) -> None:
        """Cuts what was taken back from the cache: it is neither counted nor saved."""
        if self.cache is not None:
            self._cut(self.engine.render(continued(self.messages, "a"), self.template))

    def _close(self) -> None:
        """An answer that was left standing has ended here."""
        if self._answer is not None:
            self._answer.close()

    def _begin(self, past: list[Turn], options: Options) -> Generator[str, None, None]:
        seed = (options.sampling.seed + self.turns) % 2**64  # every answer draws other numbers
        self._answer = self._say(past, replace(options, sampling=replace(options.sampling, seed=seed)))
        return self._answer

    def _say(self, past: list[Turn], options: Options) -> Generator[str, None, None]:
        messages = past[-1][1]
        ids = self.engine.render(messages, self.template)
        if len(ids) > self.context:
            more = f"the conversation would have {len(ids)} tokens, the context holds {self.context}"
            raise UserError(f"{more}; begin anew{self._more(' or raise --ctx')}")
        cache = self._cut(ids)
        prompts, text = Prompts([ids], media=media_of(messages)), ""
        run = self.engine.run(prompts, cache, options)
        try:
            for _, piece in run:
                last = run.results[0]
                if last.finish_reason:  # half a character is no part of a conversation
                    last.text = complete(self.engine.tokenizer.stream, last.text, last.token_ids)
                    piece = last.text[len(text) :]
                text += piece
                yield piece
        finally:
            self.cache, self.last = run.cache, run.results[0]
            tokens, known = ids + self.last.token_ids, len(self.held + self._lost)
            length = int(run.cache.lengths[0]) if run.cache else 0
            self.held, self._lost = tokens[:length], tokens[length:known] if run.cache else []
            if self.last.token_ids or self.last.finish_reason:
                self.messages, self._past = [*messages, {"role": "assistant", "content": self.last.text}], past
                self.turns, self.shown = self.turns + 1, []

    def _cut(self, ids: list[int]) -> Cache:
        """The cache, cut to what it shares with `ids`; at least the last of them is left to feed."""
        if self.cache is None:
            self.cache, self.held, self._lost = self.engine.new_cache(1, self.context), [], []
        known = self.held + self._lost
        length = min(common(ids, known), len(ids) - 1)
        left = self.cache.truncate(0, length)
        self.held, self._lost = known[:left], known[left:length]
        return self.cache

    def reset(self) -> None:
        """Back to the beginning: the system message, or the document of the prompt cache, whose tokens are kept as far
        as can be."""
        self._close()
        self.messages, self.turns, self.last, self.shown = list(self._beginning), 0, None, []
        self._past = _past(self.messages)
        self._forget()

    def save(self, path: str | Path) -> None:
        """Writes a prompt cache with which a conversation goes on later. Raises UserError where there is nothing to
        save."""
        self._close()
        if self.cache is None or not self.held + self._lost or not self.messages:
            raise UserError("there is no conversation yet to save")
        media = media_of(self.messages)
        if self._lost:
            batch = self.cache.batch_for([0], [len(self._lost)]).reading([self.held + self._lost], media)
            self.engine.model.forward(np.array(self._lost), self.cache, batch)
            self.held, self._lost = self.held + self._lost, []
        PromptCache.of(self.engine, self.cache, self.held, messages=self.messages, media=media).save(path)


def _past(messages: list[Message]) -> list[Turn]:
    """The turns that messages consist of: each user's message that an answer follows."""
    roles = [message["role"] for message in messages]
    return [(messages[:i], messages[: i + 1]) for i in range(len(roles)) if roles[i : i + 2] == ["user", "assistant"]]
