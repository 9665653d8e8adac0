"""The step loop's inbox: messages from the front, reports from the engine's threads."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from veneer_registry.errors import AdapterBudgetExceeded, InvalidField, VeneerError

from veneer_server.wire.messages import (
    ConstraintDone,
    MatcherEnded,
    OperationDone,
    ToEngine,
)


class NoSlot(AdapterBudgetExceeded):
    """The DEVICE budget has room for a copy, but it is too fragmented."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A worker's report: the adapter is complete in a tier, or it failed.

    Attributes:
        part: for an adapter in HOST, the number of elements that each GPU will have; 0 if they
            are not divided.
    """

    weights_digest: str
    tier: str
    stages: dict[str, float]
    error: VeneerError | None = None
    part: int = 0


@dataclass(frozen=True, slots=True)
class ConstraintReady:
    """A worker's report: a sequence's constraint is ready, or it is refused."""

    sequence: int
    error: InvalidField | None


@dataclass(frozen=True, slots=True)
class Unheld:
    """A held sequence's late constraint answer has arrived: the sequence continues or ends."""

    sequence: int


News = Arrived | ConstraintReady | Unheld | OperationDone | ConstraintDone | MatcherEnded
"""Reports from other threads of the engine."""


Inbox = queue.SimpleQueue[ToEngine | News]
