"""One copy of the server, asked by calls instead of a socket: messages of ASGI come in and go out."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import Failure
from ..app import App
from ..scheduler import Scheduler
from ..server import SWITCH
from .names import Chain

PACE = 0.02  # seconds between two calls back for one answer: what comes in between goes together
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A request as it came, its body whole. names: of the beginnings of its prompt, for the router."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = b""
    names: tuple[int, ...] = ()

    @property
    def scope(self) -> dict[str, Any]:
        return {"type": "http", "method": self.method, "path": self.path, "headers": self.headers}


class Replica:
    """assembled: makes the server, in the process that runs it. Its public methods are what Ray calls."""

    def __init__(self, assembled: Callable[[], tuple[App, Scheduler]]):
        sys.setswitchinterval(SWITCH)
        self.app, self.scheduler = assembled()
        self.chains = [Chain() for _ in self.scheduler.rows]
        self.scheduler.start()

    async def answer(self, asked: Asked) -> AsyncIterator[list[Message]]:
        """The messages of the response, several at a time. Closed or cancelled, the client has left."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        parts, left = [{"type": "http.request", "body": asked.body}], asyncio.Event()

        async def receive() -> Message:
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await self.app(asked.scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(work())
        try:
            while ready := await _ready(messages):
                yield ready
                if not ready[-1].get("more_body", True):
                    return
                await asyncio.sleep(PACE)
            await task  # it broke off: whoever reads the answer is told why
        finally:
            left.set()
            await asyncio.wait([task])

    async def whole(self, asked: Asked) -> tuple[str, bytes]:
        """Its name and the body of a short answer: what every replica is asked for at once."""
        messages = [message async for ready in self.answer(asked) for message in ready]
        return f"{socket.gethostname()}-{os.getpid()}", b"".join(message.get("body", b"") for message in messages)

    def check_health(self) -> None:
        """Raises Failure where nothing works any more, and Ray starts another replica."""
        if self.scheduler.dead:
            raise Failure(self.scheduler.dead)

    def record_routing_stats(self) -> dict[str, Any]:
        """What its rows hold, for `places.Places.report`."""
        held = zip(self.chains, self.scheduler.held(), strict=True)
        return {"names": list({name for chain, ids in held for name in chain.names(ids)})}

    def __del__(self) -> None:
        if "scheduler" in vars(self):
            self.scheduler.close()


async def _ready(messages: asyncio.Queue[Message | None]) -> list[Message]:
    """What is there, at least one; none at the end."""
    found = [await messages.get()]
    while not messages.empty():
        found.append(messages.get_nowait())
    return [message for message in found if message is not None]
