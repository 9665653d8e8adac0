"""Options for servers that follow a registry: wait until they have a change, and limit how
old their view of the registry may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

from veneer_proto.v1 import replication_pb2
from veneer_registry.errors import InvalidField

__all__ = ["ReplicasReached", "WaitReplicas", "lag_metadata", "reached", "wait_for"]


class WaitReplicas(Enum):
    """How many followers of the registry a change waits for, for 10 s at most."""

    NONE = "none"
    QUORUM = "quorum"
    """More than half of those that are alive."""
    ALL = "all"
    """All that are alive."""


@dataclass(frozen=True, slots=True)
class ReplicasReached:
    """How the wait for followers ended.

    Attributes:
        live: followers that were alive.
        applied: live followers that had the change.
        enough: whether that was as many as the change waited for.
    """

    live: int
    applied: int
    enough: bool


_MODES: Final = {
    WaitReplicas.NONE: replication_pb2.WAIT_REPLICAS_NONE,
    WaitReplicas.QUORUM: replication_pb2.WAIT_REPLICAS_QUORUM,
    WaitReplicas.ALL: replication_pb2.WAIT_REPLICAS_ALL,
}


def wait_for(wait: WaitReplicas) -> replication_pb2.WaitForReplicas | None:
    """The field of a request; None leaves it out, which older servers need."""
    if wait is WaitReplicas.NONE:
        return None
    return replication_pb2.WaitForReplicas(replicas=_MODES[wait])


def reached(answer: replication_pb2.ReplicasReached, present: bool) -> ReplicasReached | None:
    """Convert the field of an answer; None if the change did not wait."""
    if not present:
        return None
    return ReplicasReached(answer.live, answer.applied, answer.enough)


def lag_metadata(seconds: float | None) -> tuple[tuple[str, str], ...]:
    """Call metadata: the maximum age of the view of the registry in which names are looked
    up."""
    if seconds is None:
        return ()
    if not 0 <= seconds < math.inf:
        raise InvalidField(
            "max_registry_lag_s must be 0 or more seconds",
            metadata={"field": "max_registry_lag_s"},
        )
    return (("veneer-max-registry-lag", f"{seconds:.9g}"),)
