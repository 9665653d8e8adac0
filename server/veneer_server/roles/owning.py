"""Roles of a server that owns its adapters: with an engine (``all``), or without
(``registry``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from veneer_registry.adapter import BaseSpec
from veneer_registry.core import ReadAdapter
from veneer_registry.lock import OwnerLock
from veneer_registry.registry import Registry

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.config import ServerConfig
from veneer_server.engine_client.no_engine import NoEngine, refuse_engine_work
from veneer_server.models.config import DecoderConfig
from veneer_server.replication.feed import Feed
from veneer_server.replication.replicas import Replicas
from veneer_server.roles.role import MakeEngine
from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.rpc.replication_service import ReplicationService
from veneer_server.rpc.server_service import ReplicationFacts
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.serving.registering import FolderPublishing, PublishingHere, Transfers
from veneer_server.serving.registry import AdapterRegistry
from veneer_server.serving.tenants import Tenants, places_of
from veneer_server.sizing.memory_plan import KvCachePlan, MemoryPlan, plan_registry
from veneer_server.startup import memory_for, replan
from veneer_server.system.machine import host_memory
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.replication_series import RegistrySeries


class Owning:
    """``--role all``, the default. Other servers may follow it, too."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._feed = Feed()
        self._replicas = Replicas()

    def engine(self, make: MakeEngine) -> MakeEngine:
        return make

    def memory(self, decoder: DecoderConfig, config: ServerConfig) -> MemoryPlan:
        return memory_for(decoder, config)

    def replan(
        self,
        decoder: DecoderConfig,
        config: ServerConfig,
        plan: MemoryPlan,
        host: int,
        device: int,
    ) -> MemoryPlan:
        return replan(decoder, config, plan, host, device)

    def open(
        self, base: BaseSpec, read: ReadAdapter, metrics: Metrics
    ) -> Callable[[Path, OwnerLock | None], AdapterRegistry]:
        metrics.registry.register(RegistrySeries(lambda: len(self._replicas)))
        loop = asyncio.get_running_loop()
        return partial(self._open, loop, base, read)

    def _open(
        self,
        loop: asyncio.AbstractEventLoop,
        base: BaseSpec,
        read: ReadAdapter,
        folder: Path,
        lock: OwnerLock | None,
    ) -> Registry:
        config = self._config
        registry = Registry.open(
            folder,
            base,
            lock=lock,
            places=places_of(config, folder),
            retain_superseded=config.retain_superseded,
            max_adapter_bytes=config.max_adapter_bytes,
            read=read,
        )
        tenant = DEFAULT_TENANT if folder == config.data_dir else folder.name
        loop.call_soon_threadsafe(self._feed.add, tenant, registry)
        return registry

    def adapters(
        self, tenants: Tenants, budgets: AdapterBudgets, transfers: Transfers
    ) -> AdapterService:
        return AdapterService(
            tenants,
            budgets=budgets,
            transfers=transfers,
            reached=lambda wait: self._replicas.reached(self._feed.sequence, wait),
        )

    def replication(self, tenants: Tenants) -> ReplicationService:
        def source(name: str) -> Registry | None:
            tenant = tenants.named(name)
            return None if tenant is None else cast(Registry, tenant.registry)

        return ReplicationService(
            self._feed,
            self._replicas,
            source,
            asks_callers=self._config.asks_callers,
            reader_limit_s=self._config.reader_limit,
        )

    def loading(self) -> FolderPublishing:
        return PublishingHere()

    async def start(self, tenants: Tenants) -> None:
        pass

    async def ready(self) -> None:
        self._replicas.begin()

    def drain(self) -> None:
        self._feed.close()

    async def stop(self) -> None:
        pass

    def facts(self) -> ReplicationFacts:
        return ReplicationFacts(
            role=self._config.role,
            connected=True,
            sequence=self._feed.sequence,
            followers=len(self._replicas),
        )

    def is_ready(self, engine_up: bool) -> bool:
        return engine_up


class RegistryOnly(Owning):
    """``--role registry``: has no engine, and loads no base and no adapter."""

    def engine(self, make: MakeEngine) -> MakeEngine:
        return NoEngine

    def memory(self, decoder: DecoderConfig, config: ServerConfig) -> MemoryPlan:
        pool = plan_registry(host_memory())
        return MemoryPlan((pool,), KvCachePlan(0, 0, decoder.context_length, 1), 0)

    def replan(
        self,
        decoder: DecoderConfig,
        config: ServerConfig,
        plan: MemoryPlan,
        host: int,
        device: int,
    ) -> MemoryPlan:
        refuse_engine_work()  # first: a plan for an engine might not fit this machine

    def is_ready(self, engine_up: bool) -> bool:
        return True
