"""The state that `residency` keeps of each adapter, and the actions it gives the step loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from veneer_server.wire.messages import AdapterSource, EvictionCause, MemoryTier

TIERS: Final[tuple[MemoryTier, ...]] = ("device", "host")


class Presence(Enum):
    """State of one adapter in one memory tier."""

    ABSENT = "absent"
    COMING = "coming"
    THERE = "there"


@dataclass(frozen=True, slots=True)
class Load:
    """Read an adapter from disk into HOST, in a worker thread."""

    source: AdapterSource


@dataclass(frozen=True, slots=True)
class MoveToDevice:
    """Copy an adapter from HOST to DEVICE."""

    weights_digest: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Free an adapter's copy in a tier."""

    weights_digest: str
    tier: MemoryTier
    cause: EvictionCause


Action = Load | MoveToDevice | Drop


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """The decisions of `Residency.plan`.

    Attributes:
        actions: actions to carry out, in order.
        blocked: the first want that finds no room now, because all other copies are held
            or wanted by earlier sequences. It will fit when holds end.
        impossible: wants that can never fit, because of the budgets or pinned adapters.
    """

    actions: tuple[Action, ...] = ()
    blocked: str | None = None
    impossible: tuple[str, ...] = ()


@dataclass(slots=True)
class CopyStanding:
    """How much a copy in a tier is worth keeping, see `eviction`.

    Attributes:
        uses: requests counted for it; 0 while it is on trial.
        age: the tier's age when it was last used.
    """

    uses: int = 0
    age: float = 0.0


@dataclass(slots=True, eq=False)
class LedgerEntry:
    """One adapter's copies and the claims on them; only `Residency` changes them.

    Attributes:
        sizes: bytes of the copy in each tier. For DEVICE, bytes on each card; if copies are
            divided among several cards, this is a lower bound until the adapter is read.
    """

    source: AdapterSource
    sizes: Mapping[MemoryTier, int]
    host: Presence = Presence.ABSENT
    device: Presence = Presence.ABSENT
    leases: int = 0
    holds: int = 0
    pinned: MemoryTier | None = None
    wanted: MemoryTier | None = None
    """A tier that an operator requested and that the adapter has not reached yet."""
    draining: bool = False
    """An operator is evicting it: both copies are freed when the last hold ends, and until
    then no further sequence may hold it. Waiting sequences load it again."""
    forgotten: bool = False
    """No registered name refers to it any more: both copies are freed when the last lease
    ends."""
    used: int = 0
    """Logical time of the last use."""
    leaving: bool = False
    """A budget was lowered: the DEVICE copy is freed when its last hold ends, and until then
    no further sequence may hold it."""
    standing: dict[MemoryTier, CopyStanding] = field(
        default_factory=lambda: {"device": CopyStanding(), "host": CopyStanding()}
    )

    @property
    def digest(self) -> str:
        return self.source.weights_digest

    def at(self, tier: MemoryTier) -> Presence:
        return self.device if tier == "device" else self.host
