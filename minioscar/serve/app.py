"""The server as an ASGI application: routes, keys, origins, and the two ways an answer leaves, whole or in events."""

from __future__ import annotations

import asyncio
import hmac
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..errors import one_line
from . import bodies, fields, messages
from .bodies import Asked, Service
from .errors import ApiError, of_field, wrong
from .http import PATIENCE, Exchange, Gone, Receive, Send, event
from .jobs import Busy, Event, GrammarError, Job, Late
from .metrics import Metrics
from .replies import Reply

PING = 10.0  # seconds of silence after which a stream gets a comment
READING = 30.0  # seconds in which a request is rendered, split into tokens, and its schema compiled
LOCAL = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
PUBLIC = ("/health", "/")
ENDS = "the server is shutting down"
PAGE = Path(__file__).parent / "page.html"
Handler = Callable[[Exchange], Awaitable[None]]


class Engine(Protocol):
    """The scheduler, as the application needs it."""

    metrics: Metrics
    dead: str | None

    def submit(self, jobs: Sequence[Job]) -> None: ...

    def cancel(self, jobs: Sequence[Job]) -> None: ...

    def close(self) -> None: ...

    def slots(self) -> list[dict[str, Any]]: ...

    def gauges(self) -> dict[str, tuple[float, str]]: ...


class App:
    """key: what clients have to show; origins: of pages elsewhere that may ask, "*" is any. `engine` is set before the
    first request."""

    engine: Engine

    def __init__(self, service: Service, key: str | None = None, origins: Sequence[str] = (), ping: float = PING):
        self.service, self.key, self.origins, self.ping = service, key, tuple(origins), ping
        self.patience = PATIENCE
        self.loop: asyncio.AbstractEventLoop | None = None
        self.is_ending, self.is_over, self.count = False, False, 0
        self.running: set[asyncio.Queue] = set()  # what requests that run wait for
        self.routes: dict[str, tuple[str, Handler]] = {
            "/": ("GET", self.page), "/status": ("GET", self.status),
            "/health": ("GET", self.health), "/metrics": ("GET", self.metrics), "/slots": ("GET", self.slots),
            "/models": ("GET", self.models), f"/models/{service.name}": ("GET", self.model),
            "/chat/completions": ("POST", self.chat), "/completions": ("POST", self.completion),
            "/tokenize": ("POST", self.tokenize), "/detokenize": ("POST", self.detokenize),
            "/apply-template": ("POST", self.apply_template),
        }  # fmt: skip

    def post(self, news: Sequence[tuple[Job, Event]]) -> None:
        """From the scheduler's thread, once a round."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_deliver, news)

    def break_off(self) -> None:
        """Ends all requests that run, each with an error; in the loop's thread."""
        self.is_over = True
        for events in self.running:
            _put(events, 0, Event(0, error=Busy(ENDS)))

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self.loop = asyncio.get_running_loop()
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} is not served")
        exchange = Exchange(scope, receive, send, self.patience)
        try:
            await self._answer(exchange)
        except Gone:
            pass
        except ApiError as error:
            await self._fail(exchange, error)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            await self._fail(exchange, ApiError(500, f"unexpected {type(error).__name__}: {one_line(error)}"))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.shutdown":
                await asyncio.to_thread(self.engine.close)
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        if exchange.is_begun:
            raise error  # a response is half sent: the connection is closed
        await exchange.reply(error.status, error.body, error.headers)

    async def _answer(self, exchange: Exchange) -> None:
        if number := exchange.given.get("x-request-id"):
            exchange.headers += (("x-request-id", number[:200]),)
        self._allow_origin(exchange)
        if exchange.method == "OPTIONS":
            return await exchange.send(200, b"", "text/plain")
        path = exchange.path.rstrip("/") or "/"
        if path not in PUBLIC:
            self._check_key(exchange)
        short = path.removeprefix("/v1") if path.startswith("/v1/") else path
        method, handler = self.routes.get(short, (None, None))
        if handler is None:
            if short.startswith("/models/"):
                raise ApiError(404, f"there is no model {short[8:][:80]!r}", "model", "model_not_found")
            page = "; the page is at /, requests go to /v1/chat/completions" if path == "/v1" else ""
            raise ApiError(404, f"there is nothing at {path[:80]}{page}")
        if exchange.method not in ((method, "HEAD") if method == "GET" else (method,)):
            raise ApiError(405, f"{path} takes {method}", headers=(("allow", method),))
        await handler(exchange)

    def _allow_origin(self, exchange: Exchange) -> None:
        origin = exchange.given.get("origin")
        if origin and (LOCAL.fullmatch(origin) or origin in self.origins or "*" in self.origins):
            asked = exchange.given.get("access-control-request-headers", "authorization, content-type, x-api-key")
            exchange.headers += (
                ("access-control-allow-origin", origin), ("vary", "Origin"),
                ("access-control-allow-methods", "GET, POST"), ("access-control-allow-headers", asked[:1000]),
                ("access-control-allow-credentials", "true"),
            )  # fmt: skip

    def _check_key(self, exchange: Exchange) -> None:
        if not shows_key(exchange.given, self.key):
            way_out = "send Authorization: Bearer KEY"
            raise ApiError(401, f"the API key is missing or wrong; {way_out}", code="invalid_api_key")

    # --- answers

    async def chat(self, exchange: Exchange) -> None:
        await self._complete(exchange, bodies.chat)

    async def completion(self, exchange: Exchange) -> None:
        await self._complete(exchange, bodies.completion)

    async def _complete(self, exchange: Exchange, read: Callable[[Any, Service], Asked]) -> None:
        body = await exchange.body()
        if self.is_ending:
            raise overloaded(Busy(ENDS))
        try:
            asked = await asyncio.wait_for(asyncio.to_thread(read, body, self.service), READING)
        except asyncio.TimeoutError:
            raise ApiError(400, f"reading the request took more than {READING:g} seconds; make it smaller") from None
        if self.is_over:
            raise overloaded(Busy(ENDS))
        self.count += 1
        reply = Reply(asked, self.service, f"{self.count:016x}")
        events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        for number, job in enumerate(asked.jobs):
            job.tell = partial(_put, events, number)
        try:
            self.engine.submit(asked.jobs)
        except Busy as error:
            raise overloaded(error) from None
        watcher = asyncio.create_task(_watch(exchange, events))
        self.running.add(events)
        try:
            await (self._stream if asked.stream else self._gather)(exchange, reply, events)
        finally:
            watcher.cancel()
            self.running.discard(events)
            if not reply.is_done:
                self.engine.cancel(asked.jobs)

    async def _gather(self, exchange: Exchange, reply: Reply, events: asyncio.Queue) -> None:
        while not reply.is_done:
            number, news = await _next(events)
            if news.error is not None:
                raise failed(news.error)
            reply.take(number, news)
        self._cancel_cut(reply)
        await exchange.reply(200, reply.whole())

    async def _stream(self, exchange: Exchange, reply: Reply, events: asyncio.Queue) -> None:
        await exchange.begin_events()
        await exchange.write(b"".join(map(event, reply.begin())))
        pinger = asyncio.create_task(self._ping(exchange))
        try:
            while not reply.is_done:
                number, news = await _next(events)
                if news.error is not None:
                    return await exchange.write(event(failed(news.error).body) + b"data: [DONE]\n\n", last=True)
                if chunks := reply.take(number, news):
                    await exchange.write(b"".join(map(event, chunks)))
        finally:
            pinger.cancel()
        self._cancel_cut(reply)
        await exchange.write(b"".join(map(event, reply.end())) + b"data: [DONE]\n\n", last=True)

    def _cancel_cut(self, reply: Reply) -> None:
        """What is complete before the model has ended it, such as the one call that is allowed."""
        if reply.asked.one_call:
            self.engine.cancel(reply.asked.jobs)

    async def _ping(self, exchange: Exchange) -> None:
        try:
            while True:
                await asyncio.sleep(self.ping)
                await exchange.write(b":\n\n")
        except Gone:
            pass

    # --- everything else

    async def health(self, exchange: Exchange) -> None:
        if why := self.engine.dead or (ENDS if self.is_ending else None):
            raise ApiError(503, why)
        await exchange.reply(200, {"status": "ok"})

    async def page(self, exchange: Exchange) -> None:
        """Its requests bring the key; what it may load, run and connect to, it says itself."""
        await exchange.send(200, PAGE.read_bytes(), "text/html; charset=utf-8")

    async def status(self, exchange: Exchange) -> None:
        """What the page shows beside a conversation."""
        found = {name: int(value) for name, (value, _) in self.engine.gauges().items()}
        await exchange.reply(200, {"model": self.service.name, "kv": self.service.kv, **found})

    async def metrics(self, exchange: Exchange) -> None:
        text = self.engine.metrics.text(self.engine.gauges())
        await exchange.send(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    async def slots(self, exchange: Exchange) -> None:
        await exchange.reply(200, self.engine.slots())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.service.name, "object": "model", "created": 0, "owned_by": "minioscar",
            "max_model_len": self.service.context,
        }  # fmt: skip

    async def models(self, exchange: Exchange) -> None:
        await exchange.reply(200, {"object": "list", "data": [self._model()]})

    async def model(self, exchange: Exchange) -> None:
        await exchange.reply(200, self._model())

    async def tokenize(self, exchange: Exchange) -> None:
        body = await exchange.body()
        text = fields.text(body, "content")
        special, pieces = fields.switch(body, "add_special"), fields.switch(body, "with_pieces")
        if text is None:
            raise wrong("content", "content must be text")
        with of_field("content"):
            ids = await asyncio.to_thread(self.service.tokenizer.encode, text, special)
        words = self.service.tokenizer
        found = [{"id": i, "piece": words.token_text(i)} for i in ids] if pieces else ids
        await exchange.reply(200, {"tokens": found})

    async def detokenize(self, exchange: Exchange) -> None:
        body = await exchange.body()
        ids = fields.token_ids(body.get("tokens"), "tokens", self.service.vocab) if body.get("tokens") != [] else []
        await exchange.reply(200, {"content": self.service.tokenizer.decode(ids)})

    async def apply_template(self, exchange: Exchange) -> None:
        body, words = await exchange.body(), self.service.tokenizer
        said, tools = messages.messages_of(body, self.service.images), messages.tools_of(body)
        given = bodies.variables(body, self.service)
        text = await asyncio.to_thread(messages.rendered, words, said, tools, given, messages.end_of(body))
        await exchange.reply(200, {"prompt": text})


def shows_key(given: Mapping[str, str], key: str | None) -> bool:
    """Whether the headers of a request have the key, where there is one."""
    if key is None:
        return True
    scheme, _, shown = given.get("authorization", "").partition(" ")
    shown = shown.strip() if scheme.lower() == "bearer" else given.get("x-api-key", "")
    return hmac.compare_digest(shown.encode("latin-1"), key.encode())


def _put(events: asyncio.Queue, number: int, one: Event) -> None:
    events.put_nowait((number, one))


def _deliver(news: Sequence[tuple[Job, Event]]) -> None:
    for job, one in news:
        job.tell(one)


async def _watch(exchange: Exchange, events: asyncio.Queue) -> None:
    await exchange.wait_until_gone()
    events.put_nowait(None)


async def _next(events: asyncio.Queue) -> tuple[int, Event]:
    """Raises Gone where the client has left."""
    found = await events.get()
    if found is None:
        raise Gone
    return found


def overloaded(error: Busy) -> ApiError:
    code = "deadline_exceeded" if isinstance(error, Late) else "overloaded"
    return ApiError(503, str(error), code=code, headers=(("retry-after", "2"),))


def failed(error: Exception) -> ApiError:
    if isinstance(error, Busy):
        return overloaded(error)
    return ApiError(400 if isinstance(error, GrammarError) else 500, one_line(error))
