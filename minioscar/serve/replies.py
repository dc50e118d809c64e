"""Events of the scheduler -> the objects of OpenAI's API, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..answers import Logprob
from ..version import __version__
from .bodies import Asked, Service
from .jobs import Event, Job

Json = dict[str, Any]
REASONS = {"context": "length"}


class Choice:
    """One answer of a chat."""

    def __init__(self, reply: Reply, index: int, job: Job):
        self.reply, self.index, self.job = reply, index, job
        self.parser = reply.asked.parser()
        self.message: Json = {"role": "assistant", "content": None}
        self.calls: list[Json] = []
        self.logprobs: list[Json] | None = None if job.options.logprobs is None else []
        self.tokens = 0
        self.finish_reason: str | None = None

    def take(self, event: Event) -> list[Json]:
        """What a stream says of it: delta, logprobs and finish_reason."""
        if self.finish_reason:
            return []
        self.tokens += event.token is not None
        parts = self.parser.add(event.text) + (self.parser.flush() if event.finish_reason else [])
        deltas = []
        for kind, value in parts:
            deltas.append(self._call(value) if kind == "call" else self._text(kind, value))
            if kind == "call" and self.reply.asked.one_call:
                break
        found = []
        if event.logprob is not None and self.logprobs is not None:
            found = [self.reply.logprob(event.logprob, self.job.options.logprobs)]
            self.logprobs += found
            deltas = deltas or [{"content": ""}]
        chunks = [self._chunk(delta, self._content([] if i else found)) for i, delta in enumerate(deltas)]
        is_cut = bool(self.calls) and self.reply.asked.one_call
        if event.finish_reason or is_cut:
            reason = REASONS.get(event.finish_reason or "stop", event.finish_reason or "stop")
            self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason
            chunks.append(self._chunk({}, None, self.finish_reason))
        return chunks

    def _text(self, kind: str, text: str) -> Json:
        name = "reasoning_content" if kind == "reasoning" else "content"
        self.message[name] = (self.message.get(name) or "") + text
        return {name: text}

    def _call(self, call: Any) -> Json:
        number = len(self.calls)
        of = f"call_{self.reply.id[-16:]}{self.index:04x}{number:04x}"
        whole = {"id": of, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        self.calls.append(whole)
        return {"tool_calls": [{"index": number, **whole}]}

    def _chunk(self, delta: Json, logprobs: Json | None, reason: str | None = None) -> Json:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def begin(self) -> list[Json]:
        return [self._chunk({"role": "assistant", "content": ""}, None)]

    def whole(self) -> Json:
        if self.calls:
            self.message["tool_calls"] = self.calls
        elif self.message["content"] is None:
            self.message["content"] = ""
        return {
            "index": self.index, "message": {**self.message, "refusal": None},
            "logprobs": self._content(self.logprobs), "finish_reason": self.finish_reason,
        }  # fmt: skip

    def _content(self, logprobs: list[Json] | None) -> Json | None:
        return None if self.logprobs is None else {"content": logprobs, "refusal": None}


class TextChoice:
    """One answer of a text completion. echo: the prompt's text, which comes first."""

    def __init__(self, reply: Reply, index: int, job: Job, echo: str | None):
        self.reply, self.index, self.job, self.echo = reply, index, job, echo
        self.text, self.at, self.tokens = "", 0, 0
        self.ids: list[int] = []
        self.logprobs: Json | None = None if job.options.logprobs is None else _no_logprobs()
        self.finish_reason: str | None = None

    def take(self, event: Event) -> list[Json]:
        text, found = event.text, [event.logprob] if event.logprob is not None else []
        if self.echo is not None:  # with its first event the prompt has been read
            text, found, self.echo = self.echo + text, [*self.job.scored, *found], None
        if event.token is not None:
            self.tokens += 1
            self.ids.append(event.token)
        logprobs = self._logprobs(found) if self.logprobs is not None else None
        self.text += text
        if event.finish_reason:
            self.finish_reason = REASONS.get(event.finish_reason, event.finish_reason)
        ids = [event.token] if event.token is not None and self.reply.asked.token_ids else []
        if not (text or found or ids or event.finish_reason):
            return []
        return [self._choice(text, logprobs, ids)]

    def begin(self) -> list[Json]:
        return []

    def whole(self) -> Json:
        return self._choice(self.text, self.logprobs, self.ids)

    def _choice(self, text: str, logprobs: Json | None, ids: list[int]) -> Json:
        choice = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}
        return choice | ({"token_ids": ids} if self.reply.asked.token_ids else {})

    def _logprobs(self, found: Sequence[Logprob | None]) -> Json:
        """Of these tokens, which are added to those of the whole answer."""
        new = _no_logprobs()
        for one in found:
            if one is None:  # the prompt's first token
                text, value, top = self.reply.tokenizer.token_text(self.job.ids[0]), None, None
            else:
                text, value = one.token, one.logprob
                top = {other.token: other.logprob for other in one.top} | {text: value}
            for name, item in zip(new, (text, value, top, self.at), strict=True):
                new[name].append(item)
            self.at += len(text)
        for name, items in new.items():
            self.logprobs[name] += items
        return new


def _no_logprobs() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class Reply:
    """All answers to one request."""

    def __init__(self, asked: Asked, service: Service, number: str):
        self.asked, self.service, self.tokenizer = asked, service, service.tokenizer
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{number}"
        self.head = {
            "id": self.id, "object": "chat.completion" if asked.chat else "text_completion",
            "created": int(time.time()), "model": service.name, "system_fingerprint": f"minioscar-{__version__}",
        }  # fmt: skip
        answers = [(at, job) for at, job in enumerate(asked.jobs) for _ in range(job.options.n)]
        echoes = [asked.prompts[at] if asked.echo else None for at, _ in answers]
        self.choices = [
            Choice(self, i, job) if asked.chat else TextChoice(self, i, job, echo)
            for i, ((_, job), echo) in enumerate(zip(answers, echoes, strict=True))
        ]

    @property
    def is_done(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def begin(self) -> list[Json]:
        return [self._chunk([choice]) for one in self.choices for choice in one.begin()]

    def take(self, number: int, event: Event) -> list[Json]:
        """Chunks of an event of job `number`."""
        choice = self.choices[number * self.asked.n + event.index]
        return [self._chunk([chunk]) for chunk in choice.take(event)]

    def end(self) -> list[Json]:
        """The last chunk, of a stream that is asked for it."""
        return [self._chunk([]) | {"usage": self.usage()}] if self.asked.usage else []

    def _chunk(self, choices: list[Json]) -> Json:
        kind = {"object": "chat.completion.chunk"} if self.asked.chat else {}
        return {**self.head, **kind, "choices": choices, **({"usage": None} if self.asked.usage else {})}

    def whole(self) -> Json:
        return {**self.head, "choices": [choice.whole() for choice in self.choices], "usage": self.usage()}

    def usage(self) -> Json:
        read, new = sum(len(job.ids) for job in self.asked.jobs), sum(choice.tokens for choice in self.choices)
        cached = sum(job.cached for job in self.asked.jobs)
        ours, bf16 = self.service.bytes_of(read + new)
        return {
            "prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new,
            "prompt_tokens_details": {"cached_tokens": cached}, "cache": {"bytes": ours, "bf16_bytes": bf16},
        }  # fmt: skip

    def logprob(self, one: Logprob, k: int) -> Json:
        """As a chat has it."""
        def plain(entry: Logprob) -> Json:
            of_token = list(self.tokenizer.token_bytes(entry.token_id))
            return {"token": entry.token, "logprob": entry.logprob, "bytes": of_token}

        return plain(one) | {"top_logprobs": [plain(other) for other in one.top[:k]]}
