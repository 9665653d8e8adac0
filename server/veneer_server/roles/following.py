"""The role of a server that follows another server's registry."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from veneer_registry.adapter import BaseSpec
from veneer_registry.core import ReadAdapter
from veneer_registry.errors import QuotaExceeded, Unavailable, VeneerError
from veneer_registry.lock import OwnerLock

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.config import ServerConfig
from veneer_server.follower.follower import Follower, NameChange
from veneer_server.logs import get_logger
from veneer_server.models.config import DecoderConfig
from veneer_server.roles.role import MakeEngine
from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.rpc.passing_on import PassingOn, PublishingByRegistry
from veneer_server.rpc.replication_service import Asking, NoFollowers
from veneer_server.rpc.server_service import ReplicationFacts
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.serving.registering import FolderPublishing, Transfers
from veneer_server.serving.registry import AdapterRegistry
from veneer_server.serving.tenants import Tenant, Tenants, objects_of
from veneer_server.sizing.memory_plan import MemoryPlan
from veneer_server.startup import memory_for, replan
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.replication_series import FollowerSeries

_NEWER_VIEW_S: Final = 1.0
"""Seconds that a start waits for the registry if the view of an earlier run can be served.
Otherwise it waits until the registry answers: a server that knows no names must not replace one
that does."""

_TOLD_S: Final = 30.0
"""Seconds between two log lines about a registry that does not answer."""

_log = get_logger(__name__)


class FollowerRole:
    """``--role engine``."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._follower: Follower | None = None
        self._tenants: Tenants | None = None

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
        series = FollowerSeries()
        self._follower = Follower(
            self._config,
            base,
            on_fetched=series.fetch_seconds.observe,
            objects=partial(objects_of, self._config.store) if self._config.store else None,
        )
        series.watch(self._follower, metrics.registry)
        return self._follower.open

    @property
    def _following(self) -> Follower:
        assert self._follower is not None, "calls come after `open`"
        return self._follower

    @property
    def _asking(self) -> Asking:
        following = self._following
        return Asking(
            following.channel, following.standing, asks_callers=self._config.asks_callers
        )

    def adapters(
        self, tenants: Tenants, budgets: AdapterBudgets, transfers: Transfers
    ) -> AdapterService:
        return PassingOn(
            tenants,
            budgets=budgets,
            transfers=transfers,
            registry=self._asking,
            until=self._following.until,
        )

    def replication(self, tenants: Tenants) -> NoFollowers:
        return NoFollowers(self._following.standing.registry)

    def loading(self) -> FolderPublishing:
        return PublishingByRegistry(self._asking, self._following.until)

    async def start(self, tenants: Tenants) -> None:
        self._tenants = tenants
        for name in sorted(self._following.tenants - {DEFAULT_TENANT}):
            with suppress(QuotaExceeded, Unavailable):  # it is logged
                await tenants.ensure(name)
        self._following.start(
            self._applied,
            lambda digest: any(each.engine.tier(digest) is not None for each in tenants.all),
        )

    async def ready(self) -> None:
        standing, within_s = self._following.standing, _NEWER_VIEW_S
        while not await self._following.link.synced(within_s):
            within_s = _TOLD_S
            known = {"registry": standing.registry, "why": standing.fault}
            if standing.usable:
                _log.warning(
                    "registry not answering yet: serving the view of an earlier run", **known
                )
                return
            _log.warning(
                "registry not answering: waiting for it, since there is no view of an earlier "
                "run"
                if not standing.synced
                else "registry not answering: waiting for it, since the view of an earlier run "
                "is older than --max-registry-lag",
                **known,
            )

    def drain(self) -> None:
        pass

    async def stop(self) -> None:
        if self._follower is not None:
            await self._follower.stop()

    def facts(self) -> ReplicationFacts:
        standing = self._following.standing
        return ReplicationFacts(
            role=self._config.role,
            registry=standing.registry,
            connected=standing.connected,
            lag_s=standing.lag_s,
            sequence=standing.sequence,
        )

    def is_ready(self, engine_up: bool) -> bool:
        return engine_up

    async def _applied(self, change: NameChange) -> None:
        """Tell a tenant's watchers of a change, and unload the revisions that it dropped."""
        assert self._tenants is not None
        try:
            # Open the tenant: others may use adapters that it shares before it calls here.
            tenant = await self._tenants.ensure(change.mirror.tenant)
        except (QuotaExceeded, Unavailable) as error:
            _log.warning("tenant not mirrored", tenant=change.mirror.tenant, why=str(error))
            return
        try:
            _tell(tenant, change)
        except VeneerError as error:
            _log.warning("a mirrored change was not announced", why=str(error))
        if change.dropped:
            await tenant.changes.mirrored([record.ref for record in change.dropped])


def _tell(tenant: Tenant, change: NameChange) -> None:
    if change.state.entry is None:
        tenant.events.deleted(change.dropped)
    elif (now := change.state.entry.current) is not None:
        record = change.mirror.get(f"{now.name}@{now.revision}")
        tenant.events.mirrored(record, change.before)
