"""From a loaded model to a server that listens: memory, the first pass, uvicorn, and a graceful end."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from .. import memory
from ..arguments import context_of
from ..cache import blocks_of_row
from ..engine import Engine
from ..errors import Failure, UserError
from ..layer_cache import BLOCK_TOKENS
from ..machine import host_bytes
from ..oscar import SCHEMES
from ..plans import BATCH_TOKENS
from ..rows import row_bytes
from ..sampling import Sampling
from ..tables import size
from ..towers.media import bytes_of_media
from .app import App
from .bodies import Service
from .pieces import SCORED_PIECE
from .pooled import PooledCache, host_sinks, kept_sinks
from .scheduler import Scheduler
from .starting import Starting
from .warm_up import passes

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#A-Z]+")  # as browsers spell them, or any
LEAVING = 5  # seconds for what is broken off to say so
SWITCH = 5e-4  # seconds after which Python lets another thread run; its own 5e-3 is a whole step


@dataclass(frozen=True)
class Plan:
    """slots: rows of the cache; ctx: tokens of each (None: what the model has, as far as memory has room); chunk:
    tokens of prompts that are read between two steps; queue: prompts that may wait (None: four for each slot)."""

    slots: int
    ctx: int | None
    chunk: int
    queue: int | None
    name: str
    key: str | None = None
    origins: Sequence[str] = ()
    strict: bool = False
    images: str | None = None  # the folder whose pictures and videos requests may name
    media_tokens: int = 4096  # of a medium: an A4 page at 190 dots an inch, five minutes of sound
    host_cache: float = 0.0  # GB of the host's memory for blocks that the pool gives to others
    deadline: float | None = None  # seconds for a request

    def check(self) -> None:
        """Raises UserError, before the model is loaded."""
        if self.key == "":
            raise UserError("--api-key (or $MINIOSCAR_API_KEY) is empty and keeps nobody out; give one or leave it out")
        if not self.name:
            raise UserError("--name is empty; give one, or leave it out")
        for origin in self.origins:
            if not ORIGIN.fullmatch(origin):
                raise UserError(f"--cors {origin!r} is no origin; write https://chat.example, or * for any")
        if not 1 <= self.slots <= BATCH_TOKENS:
            raise UserError(f"--slots {self.slots} is out of range; it must be from 1 to {BATCH_TOKENS}")
        if self.chunk < SCORED_PIECE or self.chunk % SCORED_PIECE:
            raise UserError(f"--chunk {self.chunk} must be a multiple of {SCORED_PIECE}")
        if self.images is not None and not Path(self.images).is_dir():
            raise UserError(f"--images {self.images} is no folder; name one")
        if self.queue is not None and self.queue < 0:
            raise UserError(f"--queue {self.queue} is out of range; it must be 0 or more")
        if not 0 <= self.host_cache * 1e9 <= host_bytes():  # NaN is not, either
            room = f"this machine has {size(host_bytes())} free"
            raise UserError(f"--host-cache {self.host_cache:g} is out of range: in GB, from 0 on, and {room}")
        if self.deadline is not None and not self.deadline > 0:
            raise UserError(f"--deadline {self.deadline:g} is out of range; it must be a positive number of seconds")
        if self.media_tokens < 1:
            raise UserError(f"--media-tokens {self.media_tokens} is out of range; it must be at least 1")


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, and that nobody can connect to yet. Raises UserError where it cannot be had."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port} is out of range; it must be from 0 to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port} cannot be had: {reason}; choose others") from None
    return bound


def assemble(engine: Engine, plan: Plan, defaults: Sampling) -> tuple[App, Scheduler]:
    """Everything allocated, nothing started. Raises UserError where memory has no room."""
    config, scheme, ops = engine.config, engine.scheme, engine.ops
    context = context_of(plan.ctx, config)
    if context is None and not scheme.quantized:
        free = ops.free_bytes() * 9 // 10 - media_bytes(engine, plan, None)
        context = memory.longest_context(config, scheme, ops, plan.slots, free, plan.chunk, None)
    blocks = most_blocks(engine, plan, context)
    context = min(config.max_context, blocks * BLOCK_TOKENS) if context is None else context
    chunk = min(plan.chunk, max(context // SCORED_PIECE, 1) * SCORED_PIECE)
    if blocks_of_row(scheme, max(context, 1)) > blocks or not scheme.quantized:
        memory.check(config, scheme, ops, plan.slots, max(context, 1), min(chunk, context), penalties=None)
        check_media(engine, plan, context)
    if blocks_of_row(scheme, context) > blocks:
        why = f"memory has room for {blocks * BLOCK_TOKENS} tokens beside the windows of {plan.slots} slots"
        raise UserError(f"--ctx {context} is too much: {why}; choose fewer of either")
    kept = host_blocks(engine, plan, context)
    cache = engine.new_cache(plan.slots, context, partial(PooledCache, blocks=blocks, on_host=kept))
    service = Service(
        plan.name, engine.tokenizer, config.vocab_size, context, plan.slots, defaults, plan.strict, scheme.name,
        lambda tokens: (row_bytes(config, scheme, tokens), row_bytes(config, SCHEMES["bf16"], tokens)),
        config.towers, None if plan.images is None else Path(plan.images), plan.media_tokens,
    )  # fmt: skip
    app = App(service, plan.key, plan.origins)
    ops.prepare(engine.model, cache, passes(cache, chunk), None, engine.progress)
    queue = 4 * plan.slots if plan.queue is None else plan.queue
    scheduler = Scheduler(engine, cache, chunk, queue, app.post, plan.deadline or math.inf)
    app.engine = scheduler
    return app, scheduler


def most_blocks(engine: Engine, plan: Plan, context: int | None) -> int:
    """Of the pool: as many as memory has room for, at most those of slots that are all full. context: None: nine
    tenths of what is free, as long as the model's context may be."""
    config, scheme, ops = engine.config, engine.scheme, engine.ops
    free, longest = ops.free_bytes() * (9 if context is None else 10) // 10, context or config.max_context
    sinks = kept_sinks(plan.slots)
    none, one = (ops.cache_bytes(config, scheme, plan.slots, longest, n, sinks) for n in range(2))
    spare = free - none - ops.work_bytes(config, min(plan.chunk, longest), longest, plan.slots, None)
    spare -= media_bytes(engine, plan, context)
    return max(min(spare // max(one - none, 1), plan.slots * blocks_of_row(scheme, longest)), 0)


def host_blocks(engine: Engine, plan: Plan, context: int) -> int:
    """How many blocks, and sinks of beginnings beside them, the host has room for."""
    config, scheme = engine.config, engine.scheme
    none, block, sinks = (engine.ops.cache_bytes(config, scheme, 1, context, *more) for more in ((0,), (1,), (0, 1)))
    size, beside = block - none, sinks - none
    count = int(plan.host_cache * 1e9 / (size + beside / 16)) if size else 0
    return next(n for n in range(count, -1, -1) if n * size + host_sinks(n) * beside <= plan.host_cache * 1e9)


def media_bytes(engine: Engine, plan: Plan, context: int | None) -> int:
    """What is left free for pictures and sounds, which are read when they are asked about."""
    longest, ops = context or engine.config.max_context, engine.ops
    one = bytes_of_media(engine.config.towers, ops, min(plan.media_tokens, longest), min(plan.chunk, longest))
    return ops.cards * one


def check_media(engine: Engine, plan: Plan, context: int) -> None:
    """Raises UserError where a cache that fits leaves too little for pictures and sounds."""
    config, scheme, ops, chunk = engine.config, engine.scheme, engine.ops, min(plan.chunk, context)
    need = memory.needed(config, scheme, ops, plan.slots, max(context, 1), max(chunk, 1), penalties=None).total
    media, free = media_bytes(engine, plan, context), ops.free_bytes()
    if media and need + media > free:
        kinds, tokens = " and ".join(f"{kind}s" for kind in config.towers), min(plan.media_tokens, max(context, 1))
        what = f"{kinds} of {tokens} tokens need"
        beside = f"{size(media)} beside {size(need)}, but {size(free)} of {ops.name} memory"
        raise UserError(f"{what} {beside} are free; a smaller --media-tokens, --slots or --ctx needs less")


def serve(
    app: App, scheduler: Scheduler, bound: socket.socket, grace: int, ready: Callable[[float], str],
    starting: Starting | None = None,
) -> None:
    """Until SIGTERM or Ctrl-C; answers that run then have `grace` seconds to end, or until a second Ctrl-C. ready: what
    is said when it begins, from the seconds that warming up took. starting: what answers at `bound` until then."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self.should_exit = self.should_exit or bool(told)
            if not self.should_exit:
                print(ready(warmed_up - begun), file=sys.stderr, flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.is_ending = True
            asyncio.get_running_loop().call_later(grace, app.break_off)
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            if self.force_exit and app.loop is not None and not app.is_over:  # a second Ctrl-C: no more grace
                self.force_exit = False
                app.loop.call_soon_threadsafe(app.break_off)

    sys.setswitchinterval(SWITCH)
    told: list[int] = []  # to end, while nothing listens yet; later uvicorn hears it first, and raises it again
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=grace + LEAVING, lifespan="on",
        server_header=False, ws="none", loop="asyncio",
    )  # fmt: skip
    begun = time.monotonic()
    scheduler.start()
    warmed_up = time.monotonic()
    if starting is not None:
        starting.end()
    if not told:
        Server(config).run(sockets=[bound])
    scheduler.close()
    if scheduler.dead:
        raise Failure(scheduler.dead)


def check_installed() -> None:
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serve needs uvicorn: pip install 'minioscar[serve,structured]'") from None
