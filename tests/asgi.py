"""Requests to an ASGI application without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .patience import PATIENCE


@dataclass
class Response:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    is_whole: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The objects of a stream of events, which must end in [DONE]."""
        found = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in found) and found[-1] == "data: [DONE]", found[-3:]
        return [json.loads(line.removeprefix("data: ")) for line in found[:-1]]


async def request(
    app: Any, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None,
    leaves: Callable[[Response], bool] = lambda response: False, parts: int = 1,
) -> Response:
    """leaves: whether the client closes the connection now, asked after everything that the server sends."""
    response, gone = Response(), asyncio.Event()
    size = -(-len(body) // parts) or 1
    sent = [body[i : i + size] for i in range(0, len(body), size)] or [b""]

    async def receive() -> dict[str, Any]:
        if sent:
            piece = sent.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(sent)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            response.status = message["status"]
            response.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            response.pieces.append(message["body"])
            response.is_whole = not message["more_body"]
        if response.is_whole or leaves(response):
            gone.set()

    if leaves(response):
        asyncio.get_running_loop().call_later(0.05, gone.set)
    given = {"content-type": "application/json"} | (headers or {}) if body else headers or {}
    pairs = [(name.lower().encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    await app(scope, receive, send)
    return response


class Client:
    def __init__(self, app: Any):
        self.app = app

    def _run(self, *args: Any, **how: Any) -> Response:
        async def in_time() -> Response:
            return await asyncio.wait_for(request(self.app, *args, **how), PATIENCE)

        return asyncio.run(in_time())

    def get(self, path: str, **headers: str) -> Response:
        return self._run("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, value: Any, **how: Any) -> Response:
        return self._run("POST", path, value if isinstance(value, bytes) else json.dumps(value).encode(), **how)
