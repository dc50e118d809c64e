"""What stands between Ray's proxy and the replicas: an ASGI application that reads a request, names the beginnings of
its prompt, and passes on what a replica answers.

A client that leaves ends the call. A replica that ends in the middle of a stream becomes its last event but one, as an
error of the server itself would; before the first byte it is a 503, which OpenAI's client asks again by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, Protocol

from ...storage import strict_json
from .. import messages
from ..app import PUBLIC, shows_key
from ..bodies import Service, prompts_of, variables
from ..errors import ApiError
from ..http import Exchange, Gone, Receive, Send, event
from . import merged
from .names import names
from .replica import Asked, Message


class Call(Protocol):
    """An answer that comes."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> None: ...


class Replicas(Protocol):
    """ask: one of them, which the router chooses. every: name and body of what each of them answers."""

    def ask(self, asked: Asked) -> Call: ...

    def every(self, asked: Asked) -> Awaitable[Sequence[tuple[str, bytes]]]: ...


class Door:
    """service: how prompts become tokens. key: what clients have to show before their prompts are read for it."""

    def __init__(self, replicas: Replicas, service: Service, key: str | None):
        self.replicas, self.service, self.key = replicas, service, key

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        exchange = Exchange(scope, receive, send)
        try:
            asked = await self._read(exchange, tuple(scope["headers"]))
            path = asked.path.removeprefix("/v1").rstrip("/")
            is_allowed = path in PUBLIC or shows_key(exchange.given, self.key)
            if path in merged.PATHS and exchange.method == "GET" and is_allowed:  # from all, also where none has room
                body, kind = merged.PATHS[path](await self._every(asked))
                await exchange.send(200, body, kind)
            else:
                await self._pass_on(asked, receive, send)
        except Gone:
            pass
        except ApiError as error:
            await exchange.reply(error.status, error.body, error.headers)

    async def _every(self, asked: Asked) -> Sequence[tuple[str, bytes]]:
        try:
            found = await self.replicas.every(asked)
        except Exception as error:  # Ray's, where there are none yet
            raise unanswered(error) from None
        if not found:
            raise unanswered(LookupError())
        return found

    async def _read(self, exchange: Exchange, headers: tuple[tuple[bytes, bytes], ...]) -> Asked:
        asked = Asked(exchange.method, exchange.path, headers, await exchange.received())
        if exchange.method == "POST" and shows_key(exchange.given, self.key):
            found = await asyncio.to_thread(self._names, asked)
            asked = Asked(asked.method, asked.path, headers, asked.body, tuple(found))
        return asked

    def _names(self, asked: Asked) -> list[int]:
        """None for a request that cannot be read: the replica says why."""
        try:
            body = strict_json.loads(asked.body)
            if asked.path.endswith("/chat/completions"):
                said, tools = messages.messages_of(body), messages.tools_of(body)
                given = variables(body, self.service)
                text = messages.rendered(self.service.tokenizer, said, tools, given, messages.end_of(body))
                return names(self.service.tokenizer.encode(text))
            return names(prompts_of(body, self.service)[0]) if asked.path.endswith("/completions") else []
        except Exception:
            return []

    async def _pass_on(self, asked: Asked, receive: Receive, send: Send) -> None:
        call, begun = self.replicas.ask(asked), dict[str, Any]()
        answer = asyncio.create_task(self._send(call, begun, send))
        left = asyncio.create_task(_until_left(receive))
        try:
            await asyncio.wait([answer, left], return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await self._end(answer, begun, send)
        finally:
            call.cancel()
            answer.cancel()
            left.cancel()

    async def _send(self, call: Call, begun: dict[str, Any], send: Send) -> None:
        """The last message waits for the end of the call, so that who asks again at once finds that slot free."""
        last = None
        try:
            async for ready in call:
                for message in ready:
                    if message["type"] == "http.response.start":
                        begun.update(message)
                    if message.get("more_body", True):
                        await send(message)
                    else:
                        last = message
        except Exception:
            if last is None:
                raise
        if last is not None:
            await send(last)

    async def _end(self, answer: asyncio.Task[None], begun: Mapping[str, Any], send: Send) -> None:
        """Raises ApiError where the call failed before its first byte, the call's own error behind one of no stream."""
        error = answer.exception()
        if error is None:
            return
        why = unanswered(error)
        if not begun:
            raise why
        if not dict(begun["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
            raise error
        last = event(why.body) + b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})


def unanswered(error: BaseException) -> ApiError:
    kind = type(error).__name__
    why = f"the replica that was asked does not answer any more ({kind}); ask again"
    if kind == "BackPressureError":
        why = "too many prompts wait already; try again later"
    return ApiError(503, why, code="overloaded", headers=(("retry-after", "1"),))


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
