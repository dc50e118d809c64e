"""One request and its response over ASGI (asgi.readthedocs.io, HTTP, version 2.3)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..storage import strict_json
from ..storage import strict_json as json
from .errors import ApiError

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Headers = tuple[tuple[str, str], ...]
MAX_BODY = 16 << 20
PATIENCE = 60.0  # seconds in which the body of a request has to come


class Gone(Exception):
    """The client has left."""


class Exchange:
    """headers: of the response, beside its own. patience: seconds in which the body of the request has to come."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send, patience: float = PATIENCE):
        self.patience = patience
        self.method, self.path = scope["method"], scope["path"]
        self.given = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.receive, self._send = receive, send
        self.headers: Headers = ()
        self.is_begun = False

    async def body(self) -> dict[str, Any]:
        """The JSON object of the request. Raises ApiError for anything else and what takes too long, Gone where the
        client leaves before."""
        kind = self.given.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the content type is {kind[:80]}; send application/json")
        if int(length) > MAX_BODY if (length := self.given.get("content-length", "")).isdigit() else False:
            raise too_large()
        sent = await self.received()
        try:
            found = strict_json.loads(sent)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(found, dict):
            raise ApiError(400, "the body must be a JSON object")
        return found

    async def received(self) -> bytes:
        """The body. Raises ApiError where it takes too long or is too large, Gone where the client leaves before."""
        try:
            return await asyncio.wait_for(self._received(), self.patience)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body was not there after {self.patience:g} seconds; send it again") from None

    async def _received(self) -> bytes:
        pieces, size = [], 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Gone
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > MAX_BODY:
                raise too_large()
            if not message.get("more_body"):
                return b"".join(pieces)

    async def wait_until_gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def reply(self, status: int, value: Any, headers: Headers = ()) -> None:
        await self.send(status, strict_json.dumps(value).encode(), "application/json", headers)

    async def send(self, status: int, body: bytes, kind: str, headers: Headers = ()) -> None:
        await self.begin(status, (("content-type", kind), ("content-length", str(len(body))), *headers))
        await self.write(b"" if self.method == "HEAD" else body, last=True)

    async def begin(self, status: int, headers: Headers) -> None:
        self.is_begun = True
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (*headers, *self.headers)]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, data: bytes, last: bool = False) -> None:
        """Raises Gone where nobody reads it."""
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        except OSError:
            raise Gone from None

    async def begin_events(self) -> None:
        await self.begin(200, (
            ("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"),
            ("x-accel-buffering", "no"),
        ))  # fmt: skip


def event(value: Any) -> bytes:
    """One of a stream of events (html.spec.whatwg.org, server-sent events)."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n\n"


def too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY} bytes")
