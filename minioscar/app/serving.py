"""`minioscar serve`: one server behind a socket of its own, or copies of it over a Ray cluster."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import Failure, UserError, one_line
from ..sampling import Sampling
from ..serve import server
from ..serve.app import App
from ..serve.bodies import Service
from ..serve.scheduler import Scheduler
from ..serve.starting import Starting
from ..storage import strict_json as json
from ..storage.hub import resolve
from ..tables import size
from ..tokenizer import Tokenizer
from . import commands
from .recommended import recommended
from .wake import wake

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "minioscar"  # of the application


def plan_of(args: argparse.Namespace) -> server.Plan:
    """Raises UserError, before the model is loaded."""
    name = os.path.basename(os.path.abspath(args.model)) if args.name is None else args.name
    key = os.environ.get("MINIOSCAR_API_KEY") if args.api_key is None else args.api_key
    plan = server.Plan(
        args.slots, args.ctx, args.chunk, args.queue, name, key, args.cors, args.strict_model,
        args.images, args.media_tokens, args.host_cache, args.deadline,
    )  # fmt: skip
    plan.check()
    if args.grace < 0:
        raise UserError(f"--grace {args.grace} is out of range; it must be 0 or more seconds")
    Sampling(**commands.given(args, Sampling))
    return plan


def assembled(args: argparse.Namespace) -> tuple[App, Scheduler]:
    """The model loaded and everything allocated."""
    plan, own = plan_of(args), commands.given(args, Sampling)
    engine, _ = commands.loaded(args)
    sampling, lines = recommended(engine.folder, own)
    if sampling.temperature == 0 and "temperature" not in own:  # OpenAI's default; requests say 0 for greedy
        sampling, lines = recommended(engine.folder, {"temperature": 1.0} | own)
    for line in lines:
        print(f"[{line}]", file=sys.stderr)
    return server.assemble(engine, plan, sampling)


def run(args: argparse.Namespace) -> None:
    (serve if args.replicas is None else serve_cluster)(args)


def serve(args: argparse.Namespace) -> None:
    wake(args.device)
    plan = plan_of(args)
    server.check_installed()
    bound = server.listening(args.host, args.port)
    starting = Starting(bound)
    app, scheduler = assembled(args)
    engine, cache = scheduler.engine, scheduler.cache
    held = f"{plan.slots} slots of {cache.context} tokens, {engine.scheme.name} cache {cache.nbytes / 1e6:.1f} MB"
    if towers := engine.config.towers:
        most = min(plan.media_tokens, cache.context, max(tower.max_tokens for tower in towers.values()))
        reserved = size(server.media_bytes(engine, plan, cache.context))
        held += f", {reserved} for {'s and '.join(towers)}s of at most {most} tokens"
    url = url_of(*bound.getsockname()[:2])
    if args.json:
        print(json.dumps({"url": url, "model": plan.name, "slots": plan.slots, "context": cache.context}), flush=True)
    said = f"[{plan.name} at {url}/v1: {held}, {engine.ops.name}; warmed up in "
    server.serve(app, scheduler, bound, args.grace, lambda seconds: f"{said}{seconds:.1f} s; page at {url}/]", starting)


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# --- copies of it


def serve_cluster(args: argparse.Namespace) -> None:
    """Until SIGTERM or Ctrl-C. Joins the Ray cluster that this machine belongs to, else makes one of this machine."""
    least, _ = replicas_of(args.replicas)
    plan = plan_of(args)
    ray = imported()
    with server.listening(args.host, args.port) as bound:
        host, port = bound.getsockname()[:2]
    service(args.model)  # a model that is not there is said here, not by a replica
    ended = threading.Event()
    ray.init(include_dashboard=False, log_to_driver=args.debug, logging_level="ERROR")
    try:
        check_room(ray.cluster_resources(), least, gpus_of(args))
        ray.serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
        try:
            ray.serve.run(application(args), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise Failure(f"the replicas cannot be started: {one_line(error)}") from None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        if args.json:
            told = {"url": url_of(host, port), "model": plan.name, "slots": plan.slots, "replicas": args.replicas}
            print(json.dumps(told), flush=True)
        ready = f"[{plan.name} at {url_of(host, port)}/v1: {args.replicas} replicas of {plan.slots} slots]"
        print(ready, file=sys.stderr, flush=True)
        ended.wait()
        ray.serve.delete(NAME)
    finally:
        ray.shutdown()


def application(args: argparse.Namespace) -> Application:
    """Raises UserError for what cannot be, as far as it is seen without the weights."""
    imported()
    from ..serve.cluster.deploy import Size
    from ..serve.cluster.deploy import application as made

    least, most = replicas_of(args.replicas)
    plan = plan_of(args)
    queue = 4 * plan.slots * most if plan.queue is None else plan.queue
    size = Size(least, most, plan.slots, queue, gpus_of(args), args.grace)
    alone = argparse.Namespace(**vars(args) | {"queue": None})  # prompts wait in the doors
    return made(size, partial(assembled, alone), partial(service, args.model), plan.key)


def service(model: str) -> Service:
    """What a door needs of a model: how a prompt becomes tokens."""
    folder = resolve(model, weights=False)
    return Service(model, Tokenizer(folder), Config.from_folder(folder).vocab_size, 0, 0, Sampling())


def replicas_of(given: str) -> tuple[int, int]:
    """Of N, or N:M. Raises UserError."""
    least, colon, most = given.partition(":")
    if not (least.isdecimal() and (most.isdecimal() or not colon)) or not 1 <= int(least) <= int(most or least):
        raise UserError(f"--replicas {given!r} must be a number, or two with a colon, the smaller first: 2, 1:8")
    return int(least), int(most or least)


def gpus_of(args: argparse.Namespace) -> int:
    """GPUs of a replica. auto: those of --gpus, else one, where the cluster has any."""
    some = args.device == "cuda" or args.device == "auto" and imported().cluster_resources().get("GPU", 0) > 0
    return some * (args.gpus or 1)


def check_room(there: dict[str, float], least: int, gpus: int) -> None:
    """Raises UserError where the cluster cannot start so many replicas."""
    for name, of_one in (("CPU", 1), ("GPU", gpus)):
        if least * of_one > there.get(name, 0):
            room = f"--replicas {least} takes {least * of_one} {name}s and the cluster has {there.get(name, 0):g}"
            raise UserError(f"{room}; add machines (ray start --address=...) or take fewer")


def imported() -> Any:
    """Ray with Ray Serve. Raises UserError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.serve
    except ImportError:
        raise UserError("--replicas needs Ray Serve: pip install 'minioscar[ray]'") from None
    return ray
