"""The application that Ray Serve runs: doors, replicas, and how many of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from ..app import App
from ..bodies import Service
from ..scheduler import Scheduler
from .door import Call, Door
from .replica import Asked, Replica
from .router import PrefixRouter

PERIOD = 5.0  # seconds between two reports of a replica, and between two checks of its health
PATIENCE = 60.0  # seconds in which a check has to be answered: an engine that compiles answers late
DOOR = 64  # answers that pass through a door before another one is started
ASSEMBLE = Callable[[], tuple[App, Scheduler]]


@dataclass(frozen=True)
class Size:
    """Replicas: as many as the answers that run need, from `least` to `most`.

    slots: answers that run at a time in one. queue: prompts that may wait in a door. gpus: of one replica. grace:
    seconds for running answers when a replica is told to end.
    """

    least: int
    most: int
    slots: int
    queue: int
    gpus: int
    grace: float

    @property
    def replica(self) -> dict[str, Any]:
        """Options of the replicas' deployment. A quarter more prompts than slots are there, so that none is idle; those
        behind them wait in a door, from where they may still go elsewhere."""
        waiting = max(self.slots // 4, 1)
        return scaled(self.least, self.most, self.slots) | {
            "max_ongoing_requests": self.slots + waiting,
            "max_queued_requests": self.queue,
            "ray_actor_options": {"num_cpus": 1, "num_gpus": self.gpus},
            "request_router_config": RequestRouterConfig(
                request_router_class=PrefixRouter, request_router_kwargs={"slots": self.slots, "period": PERIOD},
                request_routing_stats_period_s=PERIOD,
            ),
            "health_check_period_s": PERIOD, "health_check_timeout_s": PATIENCE,
            "graceful_shutdown_timeout_s": self.grace,
        }  # fmt: skip

    @property
    def door(self) -> dict[str, Any]:
        more = {"max_ongoing_requests": 16 * DOOR, "ray_actor_options": {"num_cpus": 0}}
        return scaled(1, self.most, DOOR) | more


def scaled(least: int, most: int, target: int) -> dict[str, Any]:
    """As many as it takes to have `target` requests in each, those that wait among them."""
    config = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=target)
    return {"autoscaling_config": config}


class Handle:
    """The replicas, as a door asks them."""

    def __init__(self, handle: DeploymentHandle):
        self.handle, self.streaming = handle, handle.options(method_name="answer", stream=True)

    def ask(self, asked: Asked) -> Call:
        return self.streaming.remote(asked)

    async def every(self, asked: Asked) -> Sequence[tuple[str, bytes]]:
        """Without those that end just now."""
        found = await self.handle.broadcast("whole", asked).results_async(return_exceptions=True)
        return [one for one in found if not isinstance(one, BaseException)]


class DoorServer:
    """service: makes what a door has to know, in its process."""

    def __init__(self, replicas: DeploymentHandle, service: Callable[[], Service], key: str | None):
        self.door = Door(Handle(replicas), service(), key)

    def __serve_build_asgi_app__(self) -> Door:
        return self.door


def application(size: Size, assembled: ASSEMBLE, service: Callable[[], Service], key: str | None) -> serve.Application:
    """What `serve run` takes. The callables are made anew in other processes, maybe on other machines."""
    replicas = serve.deployment(Replica, name="replica").options(**size.replica).bind(assembled)
    doors = serve.deployment(serve.ingress()(DoorServer), name="door").options(**size.door)
    return doors.bind(replicas, service, key)
