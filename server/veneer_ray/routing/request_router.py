"""Serve's request router for the engines: it asks `Assignments`."""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)
from veneer_server.routing.records import Wanted

from veneer_ray.routing.assignments import Assignments


class AdapterRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray's types are not read
    """Routes requests to engines. Each process with a handle of the engines has one, and Serve
    calls it from one loop."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._assignments = Assignments(time.time, time.monotonic)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        self._assignments.update(
            {str(each.replica_id): each.routing_stats or {} for each in replicas}
        )
        super().update_replicas(replicas)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The chosen replica, then all others in case it is full."""
        candidates = {str(each.replica_id): each for each in candidate_replicas}
        if pending_request is None or not candidates:
            return [candidate_replicas]
        # Back off between rounds in which all replicas were full.
        pending_request.routing_context.should_backoff = True
        (call,) = pending_request.args[:1] or (None,)
        chosen = self._assignments.choose(
            pending_request.metadata.internal_request_id,
            getattr(call, "wanted", Wanted()),
            pending_request.future.cancelled,
        )
        first = candidates.pop(chosen, None)
        return [[first] if first is not None else [], list(candidates.values())]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        self._assignments.sent(pending_request.metadata.internal_request_id, str(replica_id))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._assignments.ended(internal_request_id, str(replica_id))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._assignments.gone(str(replica_id))
        super().on_replica_actor_died(replica_id)
