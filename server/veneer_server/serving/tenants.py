"""Tenants: the parts that each has to itself, how they are opened, and where their data is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from veneer_registry.errors import (
    AdapterNotFound,
    FailedPrecondition,
    InvalidField,
    QuotaExceeded,
    Unavailable,
    VeneerError,
)
from veneer_registry.extras import install_extra
from veneer_registry.lock import OwnerLock
from veneer_registry.opening import FolderLocations, Locations
from veneer_registry.records import UploadRequest
from veneer_registry.registry import Registry

from veneer_server.access.caller import Caller
from veneer_server.access.keys import TENANT
from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.config import ServerConfig
from veneer_server.engine_client.client import EngineClient, EngineEvent
from veneer_server.engine_client.tenant_engine import TenantEngine
from veneer_server.logs import get_logger, upkeep_of
from veneer_server.quotas.stores import TenantStorage
from veneer_server.quotas.uploads import UploadQuotas
from veneer_server.replication.states import LEASE_S
from veneer_server.serving.changes import AdapterChanges
from veneer_server.serving.events import AdapterEvents, AdapterUse, tell_of_others
from veneer_server.serving.housekeeping import Housekeeping
from veneer_server.serving.self_test import SelfTest
from veneer_server.serving.spare_time import to_the_end
from veneer_server.serving.uploads import UploadPlaces, Uploads
from veneer_server.text.prompts import Prompts
from veneer_server.wire.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterSource,
    Evicted,
    ResidencyChanged,
    split_key,
)

FOLDER: Final = "tenants"
"""Folder in the data folder, with one folder for each tenant but the default one."""


# -------------------- tenant
# One tenant: its registry, and the parts that serve it.


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """The parts that a tenant has to itself."""

    name: str
    registry: Registry
    engine: TenantEngine
    events: AdapterEvents
    use: AdapterUse
    uploads: Uploads
    changes: AdapterChanges
    self_test: SelfTest
    housekeeping: Housekeeping


@dataclass(frozen=True, slots=True)
class Furnish:
    """Makes tenants from the parts that they share.

    Attributes:
        places: places for uploads.
        quotas: limits of callers' uploads; None for no limits.
        shares: whether a tenant of that name shares adapters.
        turn: lock that makes self-tests take turns, since the sequences of each should share a
            step.
    """

    config: ServerConfig
    engine: EngineClient
    prompts: Prompts
    places: UploadPlaces
    quotas: UploadQuotas | None = None
    shares: Callable[[str], bool] = lambda name: False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def tenant(self, name: str, registry: Registry) -> Tenant:
        """Make one tenant. Its housekeeping is not started yet."""
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
                registry,
                engine,
                self.prompts,
                use,
                dtype=config.dtype,
                int8_activations=config.int8_activations,
                exact=config.exact,
                turn=self.turn,
            ),
            housekeeping=housekeeping,
        )


# -------------------- tenants
# All tenants of the server: finds a call's tenant, and opens it at its first call.
#
# The data folder itself belongs to the tenant ``default``; each other tenant has a folder in
# its ``tenants/``. `visible` decides which adapters a tenant sees of the others.

RETRY_S: Final = 5.0
"""Seconds before a tenant that could not be opened is tried again."""

_MOST_FAILED: Final = 1000
"""Most such tenants that are remembered."""

ELSEWHERE_S: Final = 2.0
"""Seconds between two looks for tenants that other registries of a shared catalog have made."""

_log = get_logger(__name__)

Open = Callable[[Path, OwnerLock | None], Registry]
Accepts = Callable[[str], Sequence[str]]


class Tenants:
    """All tenants of the server. Belongs to one event loop; the methods that metrics read may
    be called from any thread.

    Attributes:
        all: the open tenants, ``default`` first, the others by name.
        accepts: returns the tenants (``TENANT``) and adapters (``TENANT/name``) whose shared
            adapters a tenant can call by their plain names; the first that has a name counts.
    """

    def __init__(self, data_dir: Path, accepts: Accepts = lambda tenant: ()) -> None:
        self.accepts = accepts
        self.all: tuple[Tenant, ...] = ()
        self._data_dir = data_dir
        self._most = 1
        self._open: Open | None = None
        self._furnish: Furnish | None = None
        self._by_name: dict[str, Tenant] = {}
        self._opening: dict[str, asyncio.Task[Tenant]] = {}
        self._failed: dict[str, float] = {}
        """When opening a tenant last failed, on the monotonic clock."""
        self._elsewhere: Callable[[], Iterable[str]] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._look = asyncio.Lock()
        self._too_many: set[str] = set()
        """Tenants that were not opened because there are too many."""

    # ------------------------------------------------------------------- lifecycle

    async def start(
        self,
        furnish: Furnish,
        default: Registry,
        *,
        open_: Open,
        max_tenants: int,
        elsewhere: Callable[[], Iterable[str]] | None = None,
    ) -> None:
        """Make the default tenant, and open the tenants whose folder exists. If a tenant cannot
        be opened, that is logged, and its calls are refused until it can.

        Args:
            default: the registry of the data folder itself.
            open_: opens the registry in a folder; called in a thread.
            max_tenants: most tenants that may be open.
            elsewhere: returns the names of all tenants in a catalog that other registries use,
                too; called in a thread, now and every `ELSEWHERE_S`.
        """
        self._furnish, self._open, self._most = furnish, open_, max_tenants
        self._elsewhere = elsewhere
        await self._add(furnish.tenant(DEFAULT_TENANT, default), restore=True)
        for name in await asyncio.to_thread(_named, self._data_dir / FOLDER):
            await self._open_unasked(name)
        if elsewhere is not None:
            await self._look_elsewhere()
            self._looking = asyncio.get_running_loop().create_task(self._keep_looking())

    async def _open_unasked(self, name: str) -> None:
        """Open a tenant without a call of its own."""
        try:
            await self._opened(name, restore=True)
        except Unavailable:
            pass  # already logged
        except QuotaExceeded as error:
            if name not in self._too_many:
                _log.error("tenant not opened", tenant=name, why=str(error))
            self._too_many.add(name)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(ELSEWHERE_S)
            try:
                await self._look_elsewhere()
            except Exception as error:  # nothing of the database may end the loop
                _log.error("tenants of the catalog cannot be listed", error)

    async def _look_elsewhere(self) -> None:
        """Open the tenants that other registries have made, so that followers of this one, and
        callers of adapters that those share, find them."""
        assert self._elsewhere is not None
        async with self._look:
            try:
                names = await to_the_end(self._elsewhere)
            except VeneerError:  # tried again soon; the catalog's watcher logs why
                return
            for name in names:
                if name not in self._by_name and TENANT.fullmatch(name):
                    await self._open_unasked(name)

    async def stop(self) -> None:
        """Stop all upkeep and close the registries."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        for tenant in self.all:
            await tenant.housekeeping.stop()
        for tenant in self.all:
            tenant.registry.close()

    def close_watches(self) -> None:
        """End all watches, which do not end by themselves."""
        for tenant in self.all:
            tenant.events.close()

    # --------------------------------------------------------------------- finding

    @property
    def default(self) -> Tenant:
        """The tenant of the data folder itself."""
        return self._by_name[DEFAULT_TENANT]

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name, if it is open."""
        return self._by_name.get(name)

    def shares(self, name: str) -> bool:
        """Whether a tenant of that name shares adapters."""
        tenant = self._by_name.get(name)
        return tenant is not None and bool(tenant.registry.shared())

    async def current(self, caller: Caller, *, publishing: bool = False) -> Tenant:
        """Return the caller's tenant, and open it if necessary.

        Args:
            publishing: the call may create the tenant that an operator names.

        Raises:
            QuotaExceeded: the server already has the most tenants that it may have.
            InvalidField: an operator named a tenant that does not exist.
            Unavailable: the tenant cannot be opened (the log says why); or, unless the call
                publishes, the view of its names is older than the caller allows.
        """
        principal = caller.principal
        found = self._by_name.get(principal.tenant)
        if found is None and principal.visiting and not publishing:
            folder = self._folder(principal.tenant)
            if self._elsewhere is not None:
                await self._look_elsewhere()
            if not await asyncio.to_thread(folder.is_dir):
                raise InvalidField(
                    f"there is no tenant {principal.tenant!r}: its own first call, or an "
                    "upload, creates it",
                    metadata={"field": "veneer-tenant"},
                )
        if found is None:
            found = await self._opened(principal.tenant)
        if not publishing:
            found.registry.check_age(caller.most_lag_s)
        return found

    async def there(self, names: Iterable[str]) -> list[Tenant]:
        """The tenants with these names that exist, opened if other registries of the catalog
        have made them. Raises Unavailable if one cannot be opened."""
        wanted = set(names)
        if self._elsewhere is not None and wanted - self._by_name.keys():
            async with self._look:
                made = await to_the_end(self._elsewhere)
            for name in sorted(wanted.intersection(made)):
                try:
                    await self.ensure(name, restore=True)
                except QuotaExceeded as error:  # here it has no names
                    _log.error("tenant not opened", tenant=name, why=str(error))
        return [self._by_name[name] for name in sorted(wanted & self._by_name.keys())]

    async def ensure(self, name: str, *, restore: bool = False) -> Tenant:
        """Return a tenant by name, and open it if necessary. Raises QuotaExceeded or
        Unavailable.

        Args:
            restore: load what it had in memory at the end of the last run.
        """
        found = self._by_name.get(name)
        return await self._opened(name, restore=restore) if found is None else found

    def admits(self, name: str) -> bool:
        """Whether a tenant is open or may be opened."""
        known = self._by_name.keys() | self._opening.keys()
        return name in known or len(known) < self._most

    def _folder(self, name: str) -> Path:
        # Names come from keys, tokens and headers. They are checked there, and again here,
        # where a name becomes a path.
        assert TENANT.fullmatch(name), "not a tenant's name"
        assert name != DEFAULT_TENANT, "it is always open"
        return self._data_dir / FOLDER / name

    async def _opened(self, name: str, *, restore: bool = False) -> Tenant:
        """Open a tenant; concurrent callers share one attempt."""
        if name in self._failed and time.monotonic() - self._failed[name] < RETRY_S:
            raise _cannot_open(name)
        task = self._opening.get(name)
        if task is None:
            max_tenants = self._most
            if len(self._by_name.keys() | self._opening.keys()) >= max_tenants:
                raise QuotaExceeded(
                    f"this server has {max_tenants} tenants already: start it with a larger "
                    "--max-tenants (and limit on open files), or move away the folder of an "
                    "unused tenant and restart the server",
                    metadata={"limit": str(max_tenants), "cause": "tenants"},
                )
            task = asyncio.get_running_loop().create_task(
                self._open_one(name, restore), context=upkeep_of(name)
            )
            self._opening[name] = task
            task.add_done_callback(partial(self._opening_ended, name))
        # A caller that leaves must not cancel it for the others.
        return await asyncio.shield(task)

    def _opening_ended(self, name: str, task: asyncio.Task[Tenant]) -> None:
        del self._opening[name]
        if not task.cancelled():
            task.exception()  # marks it as seen, in case all callers have left

    async def _open_one(self, name: str, restore: bool) -> Tenant:
        open_, furnish, folder = self._open, self._furnish, self._folder(name)
        assert open_ is not None, "calls come after `start`"
        assert furnish is not None
        try:
            registry = await to_the_end(lambda: open_(folder, None))
            tenant = furnish.tenant(name, registry)
            try:
                await self._add(tenant, restore=restore)
            except BaseException:
                self._remove(tenant)
                await tenant.housekeeping.stop()
                registry.close()
                raise
        except Exception as error:  # a problem with one tenant must not stop the others
            known = isinstance(error, VeneerError | OSError)
            _log.error("tenant cannot be opened", None if known else error, why=str(error))
            if len(self._failed) >= _MOST_FAILED:
                self._failed.clear()
            self._failed[name] = time.monotonic()
            raise _cannot_open(name) from error
        self._failed.pop(name, None)
        _log.info("tenant opened", adapters=len(registry))
        return tenant

    async def _add(self, tenant: Tenant, *, restore: bool) -> None:
        self._by_name[tenant.name] = tenant
        self._sort()
        await tenant.housekeeping.start(tenant.engine, restore=restore)

    def _remove(self, tenant: Tenant) -> None:
        del self._by_name[tenant.name]
        self._sort()

    def _sort(self) -> None:
        others = sorted(name for name in self._by_name if name != DEFAULT_TENANT)
        self.all = tuple(self._by_name[name] for name in (DEFAULT_TENANT, *others))

    # ------------------------------------------------------------------ the engine

    def hold(self, source: AdapterSource) -> AbstractContextManager[object]:
        """Keep an adapter's files while a restarted engine reads them. They are found by
        digest: the name that the engine knows may be gone while another name still has the
        weights. Raises AdapterNotFound."""
        name, digest = split_key(source.weights_digest)
        tenant = self._by_name.get(name)
        if tenant is None:
            raise AdapterNotFound(f"tenant {name!r} is not open", metadata={"tenant": name})
        return tenant.registry.acquire_weights(digest)

    def on_engine_event(self, event: EngineEvent) -> None:
        """Listener for `EngineClient`: passes an event on to the tenant that owns the copy."""
        if not isinstance(event, ResidencyChanged | AdapterLoaded | AdapterFailed | Evicted):
            return
        name, digest = split_key(event.weights_digest)
        tenant = self._by_name.get(name)
        if tenant is None:
            return
        if name != DEFAULT_TENANT:
            event = msgspec.structs.replace(event, weights_digest=digest)
        tenant.events.on_engine_event(event)
        tenant.housekeeping.on_engine_event(event)

    # ------------------------------------------------------------- metrics and logs

    def __len__(self) -> int:
        """Number of registered names of all tenants."""
        return sum(len(tenant.registry) for tenant in self.all)

    def __contains__(self, name: object) -> bool:
        """Whether a (tenant, name) is registered."""
        if not isinstance(name, tuple):
            return False
        tenant = self._by_name.get(name[0])
        return tenant is not None and name[1] in tenant.registry

    def names(self, key: str) -> Iterator[str]:
        """The names that have the weights of a resident copy."""
        name, digest = split_key(key)
        tenant = self._by_name.get(name)
        return iter(()) if tenant is None else iter(tenant.registry.names(digest))

    def asked_as(self, key: str) -> tuple[str, ...]:
        """The specs by which callers can now ask for the weights of a resident copy."""
        name, digest = split_key(key)
        tenant = self._by_name.get(name)
        return () if tenant is None else tenant.registry.asked_as(digest)


def _cannot_open(name: str) -> Unavailable:
    return Unavailable(
        f"the adapters of tenant {name!r} cannot be opened: see the server's log",
        metadata={"tenant": name},
        retry_after_s=RETRY_S,
    )


def _named(folder: Path) -> list[str]:
    """The names of the tenants that have a folder."""
    try:
        found = sorted(each.name for each in folder.iterdir() if each.is_dir())
    except OSError:
        return []
    return [name for name in found if TENANT.fullmatch(name) and name != DEFAULT_TENANT]


# -------------------- stores
# How much the open tenants have stored, for limits and usage.


class TenantStores:
    """Storage of each tenant, from its own registry; a tenant that is not open counts as
    empty."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def tenants(self) -> Sequence[str]:
        """The names of the open tenants."""
        return [tenant.name for tenant in self._tenants.all]

    def stored(self, tenant: str) -> TenantStorage:
        """As `quotas.stores.Stores`."""
        registry = self._registry(tenant)
        if registry is None:
            return TenantStorage(0, 0)
        return TenantStorage(len(registry), registry.stored_bytes())

    def adds(self, tenant: str, request: UploadRequest) -> TenantStorage:
        """As `quotas.stores.Stores`."""
        registry = self._registry(tenant)
        size = sum(file.size for file in request.files)
        if registry is None:
            return TenantStorage(1, size)
        new = request.name not in registry
        return TenantStorage(int(new), 0 if registry.stores(request) else size)

    def there(self, tenant: str, request: UploadRequest) -> int:
        """As `quotas.stores.Stores`."""
        registry = self._registry(tenant)
        return 0 if registry is None else sum(registry.committed(request).values())

    def _registry(self, tenant: str) -> Registry | None:
        found = self._tenants.named(tenant)
        return None if found is None else found.registry


# -------------------- places
# Where each tenant's catalog and content are: in its data folder, or elsewhere.

if TYPE_CHECKING:
    from veneer_registry.shared.objects import Objects
    from veneer_registry.shared.peers import RegistryPeers
    from veneer_registry.shared.postgres import PostgresAddress


class LocationConfig(Protocol):
    """The settings that decide where a tenant's catalog and content are."""

    @property
    def data_dir(self) -> Path:
        """Folder of the default tenant."""

    @property
    def store(self) -> str:
        """``s3://bucket/prefix``, or ""."""

    @property
    def catalog(self) -> str:
        """``postgresql://...``, or ""."""

    @property
    def catalog_password_file(self) -> Path | None:
        """File with the database's password."""

    @property
    def store_cache_bytes(self) -> int:
        """Most bytes of weights from an object store on the local disk, for each tenant."""


def places_of(config: LocationConfig, folder: Path) -> Locations:
    """Return where the catalog and content of the tenant with this folder are. Does not
    connect.

    Tenants other than the default one have a prefix below ``tenants/``, and a schema with their
    name in the same database.

    Raises:
        InvalidField: an address is malformed.
        FailedPrecondition: a package is not installed.
    """
    if not config.store:
        return FolderLocations(folder)
    with _needs_packages():
        from veneer_registry.shared.locations import SharedLocations
    tenant = DEFAULT_TENANT if folder == config.data_dir else folder.name
    address, objects = address_of(config, tenant), objects_of(config.store, tenant)
    return SharedLocations(folder, address, objects, cache_bytes=config.store_cache_bytes)


def address_of(config: LocationConfig, tenant: str) -> PostgresAddress:
    """Return the address of a tenant's catalog in PostgreSQL. Raises as `places_of`."""
    with _needs_packages():
        from veneer_registry.shared.postgres import PostgresAddress
    schema = "veneer" if tenant == DEFAULT_TENANT else f"veneer/{tenant}"
    return PostgresAddress(config.catalog, config.catalog_password_file, schema)


def peers_of(config: LocationConfig, run: str) -> RegistryPeers:
    """Return the other registries of the catalog, for the run of that id. Does not connect.
    Raises as `places_of`."""
    with _needs_packages():
        from veneer_registry.shared.peers import RegistryPeers
    return RegistryPeers(address_of(config, DEFAULT_TENANT), run, LEASE_S)


class CatalogTenants:
    """Lists the tenants that have adapters in the catalog, whichever registry made them. Each
    tenant but the default one has a schema of its own, see `address_of`."""

    def __init__(self, config: LocationConfig) -> None:
        """Does not connect. Raises as `places_of`."""
        with _needs_packages():
            from veneer_registry.shared.postgres import PostgresLink
        self._link = PostgresLink(address_of(config, DEFAULT_TENANT), "tenants")

    def __call__(self) -> list[str]:
        """Return the names, sorted. Called by one thread at a time. Raises Unavailable."""
        with self._link.answering() as connection:
            rows = connection.execute(
                "SELECT nspname FROM pg_namespace WHERE starts_with(nspname, 'veneer/')"
            ).fetchall()
        return sorted(schema.removeprefix("veneer/") for (schema,) in rows)

    def close(self) -> None:
        """Close the connection."""
        self._link.close()
        self._link.drop()


def objects_of(store: str, tenant: str) -> Objects:
    """Return a tenant's objects below ``s3://bucket/prefix``. Does not connect. Raises as
    `places_of`."""
    with _needs_packages():
        from veneer_registry.shared.objects import Objects
    url = store.rstrip("/")
    return Objects(url if tenant == DEFAULT_TENANT else f"{url}/{FOLDER}/{tenant}")


@contextmanager
def _needs_packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"--store and --catalog need the package {error.name}: {install_extra('scale')}",
            metadata={"extra": "scale"},
        ) from error
