"""One tenant: its registry, and what serves it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from veneer_server.config import ServerConfig
from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.quotas.uploads import UploadQuotas
from veneer_server.serving.adapters.changes import AdapterChanges
from veneer_server.serving.adapters.events import AdapterEvents
from veneer_server.serving.adapters.self_test import SelfTest
from veneer_server.serving.adapters.upload_places import UploadPlaces
from veneer_server.serving.adapters.uploads import Uploads
from veneer_server.serving.adapters.use import AdapterUse
from veneer_server.serving.housekeeping import Housekeeping
from veneer_server.serving.tenants.elsewhere import tell_of_others
from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.text.prompts import Prompts

__all__ = ["Furnish", "Tenant"]


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """The parts that a tenant has to itself."""

    name: str
    registry: AdapterRegistry
    engine: TenantEngine
    events: AdapterEvents
    use: AdapterUse
    uploads: Uploads
    changes: AdapterChanges
    self_test: SelfTest
    housekeeping: Housekeeping


@dataclass(frozen=True, slots=True)
class Furnish:
    """Makes tenants from what they share.

    Attributes:
        places: for uploads.
        quotas: what callers may upload; None if that is not limited.
        shares: whether a tenant of that name shares adapters.
        turn: self-tests take turns, since each wants to share one step.
    """

    config: ServerConfig
    engine: EngineClient
    prompts: Prompts
    places: UploadPlaces
    quotas: UploadQuotas | None = None
    shares: Callable[[str], bool] = lambda name: False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def tenant(self, name: str, registry: AdapterRegistry) -> Tenant:
        """The parts of one tenant. Its housekeeping has not started."""
        config = self.config
        engine = TenantEngine(self.engine, name)
        events, use = AdapterEvents(), AdapterUse()
        events.name_by(registry.names)
        tell_of_others(registry, events)
        broken = (config.max_broken_uploads, config.max_broken_upload_bytes)
        housekeeping = Housekeeping(
            registry,
            events,
            upload_ttl_s=config.upload_ttl * 3600,
            broken_uploads=broken,
            quarantine_bytes=config.quarantine_bytes,
            quarantine_ttl_s=config.quarantine_ttl * 3600,
        )
        uploads = Uploads(
            registry,
            min_rate=config.min_upload_rate,
            deadline_s=config.upload_deadline,
            broken=broken,
            quotas=self.quotas,
            tenant=name,
            places=self.places,
            shares=self.shares,
        )
        return Tenant(
            name=name,
            registry=registry,
            engine=engine,
            events=events,
            use=use,
            uploads=uploads,
            changes=AdapterChanges(
                registry,
                engine,
                use,
                uploads,
                events,
                keep_residents=housekeeping.keep_residents,
            ),
            self_test=SelfTest(
                *(registry, engine, self.prompts, use),
                dtype=config.dtype,
                int8_activations=config.int8_activations,
                exact=config.exact,
                turn=self.turn,
            ),
            housekeeping=housekeeping,
        )
