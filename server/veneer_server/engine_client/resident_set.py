"""Tracks the adapters in the engine's memory, so that a new engine process can reload them.

After a restart of the engine, or of the server if it calls `expect`, the adapters are
activated again in the background: pinned ones first, then the most recently used, one at a
time, within the budgets, and only while no request is waiting for its adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import msgspec
from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterPinned,
    EngineFailed,
    VeneerError,
)

from veneer_server.progress import Stage, stage
from veneer_server.wire.messages import AdapterSource, MemoryTier, Occupancy, ResidencyChanged

log = logging.getLogger(__name__)

Activate = Callable[[AdapterSource, MemoryTier, bool], Awaitable[None]]
Hold = Callable[[AdapterSource], AbstractContextManager[object]]

_MOST_TRIES: Final = 2
MOST_KNOWN: Final = 4096
"""Most adapters whose source is remembered; beyond it, adapters not in memory are forgotten."""


@dataclass(frozen=True, slots=True)
class Resident:
    """An adapter in memory, as recorded for the next start of the server.

    Attributes:
        tier: the nearest tier that holds it.
        pin: the tier that an operator pinned it to, if any.
    """

    source: AdapterSource
    tier: MemoryTier
    pin: MemoryTier | None


@dataclass(slots=True)
class _Known:
    source: AdapterSource
    now: ResidencyChanged | None = None
    """Residency as the engine last reported it; None if the engine holds no copy."""
    pin: MemoryTier | None = None
    """The tier that an operator pinned it to, if any."""


@dataclass(slots=True)
class Lost:
    """An adapter that a dead engine held and that its successor should load.

    Attributes:
        tier: the nearest tier that held it.
        tries: how often an engine was asked to load it. After two engines died while loading
            it, it is not restored.
    """

    source: AdapterSource
    tier: MemoryTier
    pin: MemoryTier | None
    tries: int = 0


class ResidentSet:
    """Tracks the engine's adapters and restores them. Belongs to one event loop.

    Args:
        host_budget, device_budget: bytes; adapters that do not fit are not restored.
        activate: loads an adapter into a tier and, if its last argument is true, pins it.
        hold: keeps an adapter's files while they are read; raises `VeneerError` if the
            adapter is gone.

    Attributes:
        restoring: the task that restores a dead engine's adapters, if one was started.
        version: increases whenever the adapters, tiers or pins of `snapshot` change; a
            change of order alone does not count.
    """

    def __init__(
        self, *, host_budget: int, device_budget: int, activate: Activate, hold: Hold
    ) -> None:
        self._budgets: dict[MemoryTier, int] = {"host": host_budget, "device": device_budget}
        self._used: dict[MemoryTier, int] = {"host": 0, "device": 0}
        self.version = 0
        self._itemsize = 0
        """Bytes of one number of a resident adapter; 0 before the first engine."""
        self._activate = activate
        self._hold = hold
        self._known: dict[str, _Known] = {}
        """Remembered adapters by digest, least recently used first."""
        self._lost: dict[str, Lost] = {}
        """Adapters not restored yet, in the order to restore them."""
        self._calm = asyncio.Event()
        self._calm.set()
        self.restoring: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ what is there

    @property
    def known(self) -> int:
        """Number of adapters whose source is remembered."""
        return len(self._known)

    def used(self, source: AdapterSource) -> None:
        """Record that a request wants this adapter now."""
        digest = source.weights_digest
        known = self._known.pop(digest, None) or _Known(source)
        known.source = source
        self._known[digest] = known
        if len(self._known) > MOST_KNOWN:
            idle = next(
                (d for d, k in self._known.items() if k.now is None and d not in self._lost),
                digest,
            )
            if idle != digest:
                del self._known[idle]

    def pinned(self, source: AdapterSource, tier: MemoryTier) -> None:
        """Record that an operator's pin was set."""
        self.used(source)
        self._known[source.weights_digest].pin = tier
        self.version += 1

    def unpinned(self, weights_digest: str) -> None:
        """Record that an operator's pin is being removed, if it is not restored yet. Otherwise
        the engine reports the change."""
        if (lost := self._lost.get(weights_digest)) is not None:
            lost.pin = self._known[weights_digest].pin = None
            self.version += 1

    @contextmanager
    def giving_up(self, weights_digest: str, *, unpin: bool) -> Iterator[None]:
        """Do not restore the adapter while an operator evicts it, nor afterwards unless the
        eviction was refused.

        Raises:
            AdapterPinned: ``unpin`` is not set, and the adapter's pin is not restored yet, so
                that the engine does not know of it and would not refuse.
        """
        lost = self._lost.get(weights_digest)
        if lost is None:
            yield
            return
        if lost.pin is not None and not unpin:
            raise AdapterPinned(f"adapter {lost.source.name} is pinned; evict it with `unpin`")
        del self._lost[weights_digest]
        self.version += 1
        try:
            yield
        except VeneerError:
            self._lost[weights_digest] = lost
            self.version += 1
            if self.restoring is not None and self.restoring.done():
                self.restore(self._itemsize)
            raise

    def tier(self, weights_digest: str) -> ResidencyChanged | None:
        """Last known residency of an adapter, or None if it is only on disk."""
        known = self._known.get(weights_digest)
        return None if known is None else known.now

    def in_memory(self) -> list[str]:
        """Weights digests of the adapters in memory, most recently used first."""
        return [
            digest
            for digest, known in reversed(self._known.items())
            if known.now is not None and known.now.tier != "disk"
        ]

    def update(self, event: ResidencyChanged) -> None:
        """Record a change of residency that the engine has reported."""
        self._used = {"host": event.host_bytes, "device": event.device_bytes}
        known = self._known.get(event.weights_digest)
        if known is None:
            return
        before = None if known.now is None else (known.now.tier, known.now.pinned)
        gone = event.tier == "disk" and not event.pinned
        known.now = None if gone else event
        if not event.pinned:
            known.pin = None
        if before != (None if gone else (event.tier, event.pinned)):
            self.version += 1

    def occupancy(self, event: Occupancy) -> None:
        """Hold back restoring while the engine reports requests that wait for an adapter."""
        if event.waiting_for_adapter:
            self._calm.clear()
        else:
            self._calm.set()

    # ------------------------------------------------------------------------ budgets

    def check_budgets(self, *, host: int | None, device: int | None) -> None:
        """Check new budgets against pins that are not restored yet, which the engine does
        not know of.

        Raises:
            AdapterBudgetExceeded: all pinned adapters together would not fit.
        """
        if not any(lost.pin for lost in self._lost.values()):
            return
        wanted: dict[MemoryTier, int | None] = {"host": host, "device": device}
        for tier, budget in wanted.items():
            pinned = sum(self._bytes(r.source) for r in self.snapshot() if r.pin == tier)
            if budget is not None and pinned > budget:
                raise AdapterBudgetExceeded(
                    f"a {tier} budget of {budget} bytes is less than the pinned adapters use "
                    f"there ({pinned}; some are still being restored): unpin some, or choose "
                    "a larger budget",
                    metadata={
                        "budget": str(budget),
                        "pinned": str(pinned),
                        "tier": tier,
                        "cause": "restoring",
                    },
                )

    def set_budgets(self, *, host: int, device: int) -> None:
        """Record the engine's new budgets."""
        self._budgets = {"host": host, "device": device}

    def _bytes(self, source: AdapterSource) -> int:
        return source.parameters * self._itemsize

    # ------------------------------------------------------------------------ restart

    def snapshot(self) -> tuple[Resident, ...]:
        """Adapters in memory or being restored, most recently used first."""
        found = []
        for digest, known in reversed(self._known.items()):
            lost = self._lost.get(digest)
            if known.now is not None:
                tier: MemoryTier = "device" if known.now.tier == "device" else "host"
                pin = known.pin if lost is None else lost.pin or known.pin
                found.append(Resident(known.source, tier, pin))
            elif lost is not None:
                found.append(Resident(lost.source, lost.tier, lost.pin))
        return tuple(found)

    def expect(self, residents: Iterable[Resident]) -> None:
        """Restore the last `snapshot` of the server's previous run. Call before the first
        engine is up; may be called once for each tenant."""
        expected = list(residents)
        for resident in reversed(expected):
            self.used(resident.source)
            self._known[resident.source.weights_digest].pin = resident.pin
        for resident in expected:
            lost = Lost(resident.source, resident.tier, resident.pin)
            self._lost[resident.source.weights_digest] = lost
        self._lost = _pins_first(self._lost)

    def lose(self) -> list[ResidencyChanged]:
        """Record that the engine has died; return the new residency of each adapter it held."""
        if self.restoring is not None:
            self.restoring.cancel()
            self.restoring = None
        changes = []
        lost = {}
        for digest, known in reversed(self._known.items()):
            entry = self._lost.get(digest)
            if known.now is not None:
                tier: MemoryTier = "device" if known.now.tier == "device" else "host"
                tries = 0 if entry is None else entry.tries
                pin = known.pin if entry is None else entry.pin or known.pin
                entry = Lost(known.source, tier, pin, tries)
                changes.append(_gone(known.now))
                known.now = None
            if entry is not None:
                lost[digest] = entry
        self._lost = _pins_first(lost)
        self._used = {"host": 0, "device": 0}
        self._calm.set()
        return changes

    def restore(self, itemsize: int) -> None:
        """Start to restore the last engine's adapters in a new engine, which is up.

        Args:
            itemsize: bytes of one number of a resident adapter.
        """
        self._itemsize = itemsize
        if self._lost:
            self.restoring = asyncio.create_task(self._restore(), name="restore-adapters")

    async def _restore(self) -> None:
        wanted = len(self._lost)
        with (
            suppress(EngineFailed),  # `lose` keeps the remaining ones for the next engine
            stage("restoring adapters", total=wanted, unit="adapters") as restoring,
        ):
            await self._restore_each(restoring)

    async def _restore_each(self, restoring: Stage) -> None:
        wanted, restored = len(self._lost), 0
        while self._lost:
            restoring.update(max(0, wanted - len(self._lost)))
            await self._calm.wait()
            if not self._lost:
                break
            digest, lost = next(iter(self._lost.items()))
            try:
                if self._wants(lost):
                    lost.tries += 1
                    with self._hold(lost.source):
                        await self._bring_back(lost)
                    restored += 1
            except EngineFailed:
                raise
            except VeneerError as error:
                log.warning("adapter %s is not restored: %s", lost.source.name, error)
            if self._lost.pop(digest, None) is not None:
                self.version += 1
        restoring.update(restored)

    def _wants(self, lost: Lost) -> bool:
        """Whether the adapter is not there yet, fits the budgets, and has not been tried too
        often."""
        if lost.tries >= _MOST_TRIES:
            log.warning(
                "adapter %s is not restored: the engine died %d times while loading it",
                lost.source.name,
                lost.tries,
            )
            return False
        now = self.tier(lost.source.weights_digest)
        if lost.pin is not None:
            return now is None or not now.pinned
        if now is not None and (now.tier == "device" or lost.tier == "host"):
            return False
        return all(
            self._used[tier] + self._bytes(lost.source) <= self._budgets[tier]
            for tier in self._budgets
            if tier == "host" or lost.tier == "device"
        )

    async def _bring_back(self, lost: Lost) -> None:
        if lost.pin is not None:
            await self._activate(lost.source, lost.pin, True)
            self._known[lost.source.weights_digest].pin = lost.pin
        if lost.pin is None or (lost.pin, lost.tier) == ("host", "device"):
            await self._activate(lost.source, lost.tier, False)


def _pins_first(lost: dict[str, Lost]) -> dict[str, Lost]:
    return dict(sorted(lost.items(), key=lambda item: item[1].pin is None))


def _gone(residency: ResidencyChanged) -> ResidencyChanged:
    return msgspec.structs.replace(
        residency,
        tier="disk",
        pinned=False,
        host_bytes=0,
        device_bytes=0,
        host_count=0,
        device_count=0,
    )
