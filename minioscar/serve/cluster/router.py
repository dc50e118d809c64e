"""Ray's question where a call goes, answered by `places.Places`. It runs where a door does."""

from __future__ import annotations

import time

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .places import Places
from .replica import Asked


class PrefixRouter(RequestRouter):
    """A full replica is passed over; where all are full, Ray asks again, later."""

    def initialize_state(self, slots: int, period: float) -> None:
        """period: seconds between two reports of a replica."""
        self.places, self.lasting = Places(slots, self._running), 2 * period
        self.by_name: dict[str, RunningReplica] = {}

    def _running(self, name: str) -> int:
        return self.replica_queue_len_cache.get(self.by_name[name].replica_id) or 0

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Which there are, and what they have reported."""
        super().update_replicas(replicas)
        self.by_name = {one.replica_id.unique_id: one for one in replicas}
        self.places.set(list(self.by_name))
        for name, one in self.by_name.items():
            if one.routing_stats:
                self.places.report(name, one.routing_stats["names"], time.monotonic() - self.lasting)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.places.remove(replica_id.unique_id)
        self.by_name.pop(replica_id.unique_id, None)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not self.by_name:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        mean = sum(map(self._running, self.by_name)) / len(self.by_name)
        chosen = self.places.choose(_names(pending_request), mean)
        return [[self.by_name[name]] for name in chosen]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        self.places.send(replica_id.unique_id, _names(pending_request), time.monotonic())


def _names(request: PendingRequest) -> tuple[int, ...]:
    """Of what a door asks for; what Ray itself calls has none."""
    asked = request.args[0] if request.args else None
    return asked.names if isinstance(asked, Asked) else ()
