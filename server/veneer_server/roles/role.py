"""What `App` needs of a role."""

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
        """What makes the engine's client, where ``make`` is for a server that generates."""
        ...

    def memory(self, decoder: DecoderConfig, config: ServerConfig) -> MemoryPlan:
        """The memory plan. May take seconds. Raises MemoryTooSmall."""
        ...

    def replan(
        self,
        decoder: DecoderConfig,
        config: ServerConfig,
        plan: MemoryPlan,
        host: int,
        device: int,
    ) -> MemoryPlan:
        """The plan with other budgets for adapters. Raises MemoryTooSmall, and
        FailedPrecondition if the role has none."""
        ...

    def open(
        self, base: BaseSpec, read: ReadAdapter, metrics: Metrics
    ) -> Callable[[Path, OwnerLock | None], AdapterRegistry]:
        """What opens the registry of the tenant with a folder; called in worker threads."""
        ...

    def adapters(
        self, tenants: Tenants, budgets: AdapterBudgets, transfers: Transfers
    ) -> AdapterService: ...

    def replication(self, tenants: Tenants) -> ReplicationService | NoFollowers: ...

    def loading(self) -> FolderPublishing:
        """Publishes what lies in a folder of this machine."""
        ...

    async def start(self, tenants: Tenants) -> None:
        """After the tenants are open, and before the engine is loaded."""
        ...

    async def ready(self) -> None:
        """Before the first call is answered."""
        ...

    def drain(self) -> None:
        """No new calls are answered from now on."""
        ...

    async def stop(self) -> None:
        """Before the registries are closed."""
        ...

    def facts(self) -> ReplicationFacts:
        """For GetServerInfo."""
        ...

    def is_ready(self, engine_up: bool) -> bool:
        """Whether a server that has finished loading can do what it is for."""
        ...
