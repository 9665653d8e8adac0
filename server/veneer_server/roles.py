"""What differs between a server that owns its adapters and one that follows another's.

`Role` is the seam: `App` composes a server of one, and nothing else asks which it is. A server
without an engine (``--role registry``) owns its adapters like any other; what it lacks is in
`engine_client.no_engine` and `startup`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from veneer_registry.adapter import BaseSpec
from veneer_registry.core import ReadAdapter
from veneer_registry.errors import QuotaExceeded, Unavailable, VeneerError
from veneer_registry.lock import OwnerLock
from veneer_registry.registry import Registry

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.config import ServerConfig
from veneer_server.follower.follower import Follower, NameChange
from veneer_server.logs import get_logger
from veneer_server.replication.feed import Feed
from veneer_server.replication.other_registries import OtherRegistries
from veneer_server.replication.replicas import Reached, Replicas, Wait
from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.rpc.passing_on import PassingOn, PublishingByRegistry
from veneer_server.rpc.replication_service import Asking, NoFollowers, ReplicationService
from veneer_server.rpc.server_service import ReplicationFacts
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.serving.registering import FolderPublishing, PublishingHere, Transfers
from veneer_server.serving.spare_time import to_the_end
from veneer_server.serving.tenants import (
    Tenant,
    Tenants,
    objects_of,
    peers_of,
    places_of,
)
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.replication_series import FollowerSeries, RegistrySeries

_NEWER_VIEW_S: Final = 1.0
"""Seconds that a start waits for the registry if the view of an earlier run can be served.
Otherwise it waits until the registry answers: a server that knows no names must not replace one
that does."""

_TOLD_S: Final = 30.0
"""Seconds between two log lines about a registry that does not answer."""

_CATCH_UP_S: Final = 1.5
"""Seconds that a follower waits for its registry to read the catalog: less than it waits for an
answer. Then it tries again."""

_CATCHING_UP: Final = ThreadPoolExecutor(2, thread_name_prefix="catch-up")
"""Threads of their own: another registry may hold the catalog's lock for long."""

_log = get_logger(__name__)


class Role(Protocol):
    """The parts of a server that differ by its role. Belongs to one event loop."""

    def open(
        self, base: BaseSpec, read: ReadAdapter, metrics: Metrics
    ) -> Callable[[Path, OwnerLock | None], Registry]:
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


def role_of(config: ServerConfig) -> Role:
    """Create the configured role."""
    return FollowerRole(config) if config.role == "engine" else OwnerRole(config)


class OwnerRole:
    """``--role all`` and ``--role registry``. Other servers may follow it."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._feed = Feed()
        self._replicas = Replicas()
        self._catching_up: dict[str, asyncio.Future[None]] = {}
        self._others = (
            OtherRegistries(self._feed, self._replicas, peers_of(config, self._feed.run))
            if config.catalog
            else None
        )

    def open(
        self, base: BaseSpec, read: ReadAdapter, metrics: Metrics
    ) -> Callable[[Path, OwnerLock | None], Registry]:
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
            reached=self._reached,
        )

    async def _reached(self, home: Tenant, wait: Wait) -> Reached | None:
        sequence = self._feed.sequence
        if self._others is None or wait.mode == "none":
            return await self._replicas.reached(sequence, wait)
        number = await to_the_end(lambda: home.registry.last_change)
        return await self._others.reached(home.name, number, sequence, wait)

    async def _caught_up(self, tenants: Tenants, catalogs: Mapping[str, int]) -> None:
        """See `replication_service.CaughtUp`."""
        # Others do not exist: a backup was restored, or it is another catalog.
        for tenant in await tenants.there(catalogs):
            if tenant.registry.told >= catalogs[tenant.name]:
                continue
            running = self._catching_up.get(tenant.name)
            if running is None:
                # All followers wait for the same task, each for as long as it likes.
                work = partial(tenant.registry.catch_up, catalogs[tenant.name])
                running = asyncio.get_running_loop().run_in_executor(_CATCHING_UP, work)
                running = asyncio.ensure_future(running)
                self._catching_up[tenant.name] = running
                running.add_done_callback(partial(self._caught, tenant.name))
            done, _ = await asyncio.wait({running}, timeout=_CATCH_UP_S)
            if not done:
                raise Unavailable(
                    "this registry has not read from its catalog what the follower has: retry",
                    metadata={"cause": "catalog", "tenant": tenant.name},
                    retry_after_s=1.0,
                )
            running.result()

    def _caught(self, tenant: str, task: asyncio.Future[None]) -> None:
        del self._catching_up[tenant]
        if not task.cancelled():
            task.exception()  # marks it as seen, in case all followers have left

    def replication(self, tenants: Tenants) -> ReplicationService:
        def source(name: str) -> Registry | None:
            tenant = tenants.named(name)
            return None if tenant is None else tenant.registry

        return ReplicationService(
            self._feed,
            self._replicas,
            source,
            caught_up=partial(self._caught_up, tenants) if self._config.catalog else None,
            asks_callers=self._config.asks_callers,
            reader_limit_s=self._config.reader_limit,
        )

    def loading(self) -> FolderPublishing:
        return PublishingHere()

    async def start(self, tenants: Tenants) -> None:
        pass

    async def ready(self) -> None:
        self._replicas.begin()
        if self._others is not None:
            self._others.start()

    def drain(self) -> None:
        self._feed.close()

    async def stop(self) -> None:
        if self._others is not None:
            await self._others.stop()

    def facts(self) -> ReplicationFacts:
        return ReplicationFacts(
            role=self._config.role,
            connected=True,
            sequence=self._feed.sequence,
            followers=len(self._replicas),
        )


class FollowerRole:
    """``--role engine``."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._follower: Follower | None = None
        self._tenants: Tenants | None = None

    def open(
        self, base: BaseSpec, read: ReadAdapter, metrics: Metrics
    ) -> Callable[[Path, OwnerLock | None], Registry]:
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
                await tenants.ensure(name, restore=True)
        self._following.start(
            self._applied,
            lambda digest: any(each.engine.tier(digest) is not None for each in tenants.all),
            tenants.admits,
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

    async def _applied(self, change: NameChange) -> None:
        """Tell a tenant's watchers of a change, and unload the revisions that it dropped."""
        assert self._tenants is not None
        try:
            # Open the tenant: others may use adapters that it shares before it calls here.
            tenant = await self._tenants.ensure(change.state.tenant)
        except (QuotaExceeded, Unavailable) as error:
            _log.warning("tenant not mirrored", tenant=change.state.tenant, why=str(error))
            return
        try:
            await _tell(tenant, change)
        except VeneerError as error:
            _log.warning("a mirrored change was not announced", why=str(error))
        if change.dropped:
            await tenant.changes.mirrored([record.ref for record in change.dropped])


async def _tell(tenant: Tenant, change: NameChange) -> None:
    if change.state.entry is None:
        tenant.events.deleted(change.dropped)
    elif (now := change.state.entry.current) is not None:
        spec = f"{now.name}@{now.revision}"
        record = await to_the_end(lambda: change.registry.get(spec))
        tenant.events.mirrored(record, change.before)
