"""Chooses the adapters for a self-test: the named ones, or else some that can be loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterCorrupt,
    AdapterNotFound,
    BaseModelMismatch,
)
from veneer_registry.lease import RevisionLease

from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.serving.adapters.use import AdapterUse, source_of
from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.serving.threads import to_the_end
from veneer_server.wire.messages import AdapterSource

__all__ = ["Subject", "Subjects"]

_DEFAULT_ADAPTERS: Final = 2
_CANDIDATES: Final = 16
"""Most adapters that are tried if none were named: each may need a load from disk."""
_PAGE: Final = 1000

_Unusable = AdapterNotFound, AdapterCorrupt, BaseModelMismatch, AdapterBudgetExceeded
"""Errors for which an unnamed candidate is skipped: it was just deleted, is in quarantine, is
for another base, or does not fit in memory."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The base (no name, no source), or one leased revision."""

    name: str = ""
    source: AdapterSource | None = None


class Subjects:
    """Finds and leases subjects. Their files stay until the caller closes ``leases``."""

    def __init__(
        self, registry: AdapterRegistry, engine: TenantEngine, use: AdapterUse
    ) -> None:
        """Args: use: which adapters were requested most recently."""
        self._registry = registry
        self._engine = engine
        self._use = use

    async def named(self, names: Sequence[str], leases: ExitStack) -> list[Subject]:
        """The adapters with these names, as in requests. Raises AdapterNotFound,
        BaseModelMismatch or AdapterCorrupt."""
        return [
            await self._leased(self._registry.acquire(name), leases)
            for name in dict.fromkeys(names)
        ]

    async def chosen(self, most: int, leases: ExitStack) -> tuple[list[Subject], str]:
        """Choose and load at most ``most`` adapters; with none, the text says why."""
        if not len(self._registry):
            return [], "no adapters are registered: only the base was tested"
        if not most:
            return [], (
                f"this server runs and queues at most {self._engine.places.capacity} "
                "sequences, not enough for the base and one adapter: start it with a larger "
                "--max-running or --max-queue"
            )
        in_memory = (
            partial(self._registry.acquire_weights, digest)
            for digest in self._engine.resident()
        )
        found, _ = await self._take(in_memory, most, leases)
        if found:
            return found, ""
        asked = [f"{name}@{revision}" for name, revision in self._use.recent()]
        names = dict.fromkeys([*asked, *await to_the_end(self._servable)])
        found, why = await self._take(
            (partial(self._registry.acquire, name) for name in names), most, leases
        )
        why = why or "they are in quarantine or for another base"
        note = f"none of {len(self._registry)} adapters could be tested: {why}"
        return found, "" if found else note

    async def _leased(self, lease: RevisionLease, leases: ExitStack) -> Subject:
        """A subject whose files are here, and stay until ``leases`` closes."""
        leases.enter_context(lease)
        await self._registry.present(lease.ref)
        return Subject(lease.ref.short, source_of(self._registry, lease.record))

    async def _take(
        self, candidates: Iterable[Callable[[], RevisionLease]], most: int, leases: ExitStack
    ) -> tuple[list[Subject], str]:
        """The first candidates that can be loaded, and why the last failed one cannot."""
        found: dict[str, Subject] = {}
        why, tried = "", 0
        for acquire in candidates:
            if len(found) == min(_DEFAULT_ADAPTERS, most) or tried == _CANDIDATES:
                break
            with ExitStack() as attempt:
                try:
                    subject = await self._leased(acquire(), attempt)
                    assert subject.source is not None, "only the base has no source"
                    digest = subject.source.weights_digest
                    if digest in found:
                        continue
                    tried += 1
                    await self._load(subject.source)
                except _Unusable as error:
                    why = str(error)
                    continue
                leases.enter_context(attempt.pop_all())
                found[digest] = subject
        return list(found.values()), why

    async def _load(self, source: AdapterSource) -> None:
        """Raises AdapterBudgetExceeded. Damaged files are reported by the test itself."""
        with suppress(AdapterCorrupt):
            await self._engine.activate(source, tier="device", pin=False)

    def _servable(self) -> list[str]:
        """Some names whose revision is neither in quarantine nor for another base."""
        found: list[str] = []
        after = ""
        while len(found) < _CANDIDATES:
            page = self._registry.list(after=after, limit=_PAGE)
            found += [r.ref.name for r in page if not r.foreign and r.quarantined is None]
            if len(page) < _PAGE:
                break
            after = page[-1].ref.name
        return found[:_CANDIDATES]
