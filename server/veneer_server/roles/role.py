"""The interface between `App` and a server's role."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from veneer_registry.adapter import BaseSpec
from veneer_registry.core import ReadAdapter
from veneer_registry.lock import OwnerLock

from veneer_server.config import ServerConfig
from veneer_server.engine_client.client import EngineClient
from veneer_server.models.config import DecoderConfig
from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.rpc.replication_service import NoFollowers, ReplicationService
from veneer_server.rpc.server_service import ReplicationFacts
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.serving.registering import FolderPublishing, Transfers
from veneer_server.serving.registry import AdapterRegistry
from veneer_server.serving.tenants import Tenants
from veneer_server.sizing.memory_plan import MemoryPlan
from veneer_server.telemetry.metrics import Metrics

MakeEngine = Callable[..., EngineClient]


class Role(Protocol):
    """The parts of a server that differ by its role. Belongs to one event loop."""

    def engine(self, make: MakeEngine) -> MakeEngine:
        """Return the factory of the engine's client: ``make`` for a server that generates."""
        ...

    def memory(self, decoder: DecoderConfig, config: ServerConfig) -> MemoryPlan:
        """Make the memory plan. May take seconds. Raises MemoryTooSmall."""
        ...

    def replan(
        self,
        decoder: DecoderConfig,
        config: ServerConfig,
        plan: MemoryPlan,
        host: int,
        device: int,
    ) -> MemoryPlan:
        """Make the plan again with other adapter budgets. Raises MemoryTooSmall, and
        FailedPrecondition if the role has no engine."""
        ...

    def open(
        self, base: BaseSpec, read: ReadAdapter, metrics: Metrics
    ) -> Callable[[Path, OwnerLock | None], AdapterRegistry]:
        """Return a function that opens the registry of a tenant, given the tenant's folder. It
        is called in worker threads."""
        ...

    def adapters(
        self, tenants: Tenants, budgets: AdapterBudgets, transfers: Transfers
    ) -> AdapterService: ...

    def replication(self, tenants: Tenants) -> ReplicationService | NoFollowers: ...

    def loading(self) -> FolderPublishing:
        """Return what publishes adapters from a folder of this machine."""
        ...

    async def start(self, tenants: Tenants) -> None:
        """Called after the tenants are open, and before the engine is loaded."""
        ...

    async def ready(self) -> None:
        """Called before the first call is answered."""
        ...

    def drain(self) -> None:
        """Called when draining begins: no new calls are answered from now on."""
        ...

    async def stop(self) -> None:
        """Called before the registries are closed."""
        ...

    def facts(self) -> ReplicationFacts:
        """Replication facts for GetServerInfo."""
        ...

    def is_ready(self, engine_up: bool) -> bool:
        """Whether a server that has finished loading can do its role's work."""
        ...
