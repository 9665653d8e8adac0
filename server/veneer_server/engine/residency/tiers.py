"""What `residency` keeps of each adapter, and what it tells the step loop to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from veneer_server.wire.messages import AdapterSource, EvictionCause, MemoryTier

__all__ = [
    "TIERS",
    "Action",
    "Drop",
    "LedgerEntry",
    "Load",
    "MemoryTier",
    "MoveToDevice",
    "Plan",
    "Presence",
    "Standing",
]


TIERS: Final[tuple[MemoryTier, ...]] = ("device", "host")


class Presence(Enum):
    """State of one adapter in one memory tier."""

    ABSENT = "absent"
    COMING = "coming"
    THERE = "there"


@dataclass(frozen=True, slots=True)
class Load:
    """Read from disk into HOST, in a worker thread."""

    source: AdapterSource


@dataclass(frozen=True, slots=True)
class MoveToDevice:
    """Copy from HOST to DEVICE."""

    weights_digest: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Free the copy in a tier."""

    weights_digest: str
    tier: MemoryTier
    cause: EvictionCause


Action = Load | MoveToDevice | Drop


@dataclass(frozen=True, slots=True)
class Plan:
    """What `Residency.plan` decided.

    Attributes:
        actions: to carry out, in order.
        blocked: the first want that finds no room now: all else is held, or
            wanted by an earlier sequence. It fits when holds end.
        impossible: wants that the budgets, or pinned adapters, leave no room for, ever.
    """

    actions: tuple[Action, ...] = ()
    blocked: str | None = None
    impossible: tuple[str, ...] = ()


@dataclass(slots=True)
class Standing:
    """What speaks for keeping a copy in a tier, see `eviction`.

    Attributes:
        uses: requests that count for it; 0 while it is on trial.
        age: the tier's age when it was used last.
    """

    uses: int = 0
    age: float = 0.0


@dataclass(slots=True, eq=False)
class LedgerEntry:
    """One adapter's copies and the grips on it; only `Residency` changes it."""

    source: AdapterSource
    bytes: int
    host: Presence = Presence.ABSENT
    device: Presence = Presence.ABSENT
    leases: int = 0
    holds: int = 0
    pinned: MemoryTier | None = None
    wanted: MemoryTier | None = None
    """Tier an operator asked for and that it has not reached."""
    draining: bool = False
    """An operator evicts it: both copies go when the last hold ends, and until then no
    further sequence may take hold of it. Those that wait load it anew."""
    forgotten: bool = False
    """No name has it any more: both copies go when the last lease ends."""
    used: int = 0
    """Logical time of the last use."""
    leaving: bool = False
    """A budget was lowered: the DEVICE copy goes when its last hold ends, and until then
    no further sequence may take hold of it."""
    standing: dict[MemoryTier, Standing] = field(
        default_factory=lambda: {"device": Standing(), "host": Standing()}
    )

    @property
    def digest(self) -> str:
        return self.source.weights_digest

    def at(self, tier: MemoryTier) -> Presence:
        return self.device if tier == "device" else self.host
