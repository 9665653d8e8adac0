"""The engine as one tenant sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

import msgspec

from veneer_server.engine_client.client import EngineClient, TokenCounter
from veneer_server.engine_client.places import Place, Places
from veneer_server.engine_client.resident_set import Resident
from veneer_server.wire.messages import (
    AdapterSource,
    EngineInfo,
    EvictMode,
    MemoryTier,
    ResidencyChanged,
    SequenceOutput,
    SequenceRequest,
    copy_key,
    split_key,
)


class TenantEngine:
    """An `EngineClient` for one tenant: translates between weights digests and the keys of the
    tenant's own copies, in both directions, and hides the copies of other tenants."""

    def __init__(self, engine: EngineClient, tenant: str) -> None:
        self._engine = engine
        self._tenant = tenant
        self._version: object = None
        self._own: object = None

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def in_flight(self) -> int:
        """Number of unfinished sequences, of all tenants."""
        return self._engine.in_flight

    @property
    def places(self) -> Places:
        """The places of all tenants."""
        return self._engine.places

    def generate(
        self,
        request: SequenceRequest,
        place: Place | None = None,
        *,
        sibling: bool = False,
        counts: TokenCounter | None = None,
    ) -> AsyncGenerator[SequenceOutput, None]:
        if request.adapter is not None:
            request = msgspec.structs.replace(request, adapter=request.adapter.of(self._tenant))
        return self._engine.generate(request, place, sibling=sibling, counts=counts)

    async def reference(self, tokens: list[int], adapter: AdapterSource | None) -> list[float]:
        # A reference is computed from the adapter's files, no matter whose copy is in memory.
        return await self._engine.reference(tokens, adapter)

    async def activate(self, adapter: AdapterSource, *, tier: MemoryTier, pin: bool) -> bool:
        return await self._engine.activate(adapter.of(self._tenant), tier=tier, pin=pin)

    async def evict(
        self, weights_digest: str, *, mode: EvictMode, unpin: bool
    ) -> tuple[bool, int]:
        key = copy_key(self._tenant, weights_digest)
        return await self._engine.evict(key, mode=mode, unpin=unpin)

    async def unpin(self, weights_digest: str) -> None:
        await self._engine.unpin(copy_key(self._tenant, weights_digest))

    def tier(self, weights_digest: str) -> ResidencyChanged | None:
        return self._engine.tier(copy_key(self._tenant, weights_digest))

    def resident(self) -> list[str]:
        """Weights digests of the tenant's adapters in memory, most recently used first."""
        keys = map(split_key, self._engine.resident())
        return [digest for tenant, digest in keys if tenant == self._tenant]

    @property
    def residents_version(self) -> object:
        """Changes whenever the adapters, tiers or pins of `resident_set` change, but not when
        only another tenant's do."""
        now = self._engine.residents_version
        if self._version is None or now != self._version:
            self._version = now
            residents = self.resident_set()
            self._own = frozenset((r.source.weights_digest, r.tier, r.pin) for r in residents)
        return self._own

    def resident_set(self) -> tuple[Resident, ...]:
        """The tenant's adapters in memory or being restored, most recently used first."""
        found = []
        for resident in self._engine.resident_set():
            tenant, digest = split_key(resident.source.weights_digest)
            if tenant == self._tenant:
                source = msgspec.structs.replace(resident.source, weights_digest=digest)
                found.append(Resident(source, resident.tier, resident.pin))
        return tuple(found)

    def expect_residents(self, residents: Iterable[Resident]) -> None:
        self._engine.expect_residents(
            Resident(resident.source.of(self._tenant), resident.tier, resident.pin)
            for resident in residents
        )
