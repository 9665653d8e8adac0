"""All tenants of the server: finds the one that a call is from, and opens it when it first
calls.

The data folder itself is the tenant ``default``; the others have a folder each in its
``tenants/``. What one may see of another is in `visible`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.errors import (
    AdapterNotFound,
    InvalidField,
    QuotaExceeded,
    Unavailable,
    VeneerError,
)
from veneer_registry.lock import OwnerLock

from veneer_server.access.keys import TENANT
from veneer_server.access.principal import ANYONE, DEFAULT_TENANT, PRINCIPAL
from veneer_server.engine_client.client import EngineEvent
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.logs import TENANT as LOGGED_TENANT
from veneer_server.replication.asked import ASKED
from veneer_server.serving.tenants import FOLDER
from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.serving.tenants.tenant import Furnish, Tenant
from veneer_server.serving.threads import to_the_end
from veneer_server.wire.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterSource,
    Evicted,
    Residency,
    split_key,
)

__all__ = ["Tenants"]

RETRY_S: Final = 5.0
"""How long a tenant that cannot be opened is not tried again."""

_MOST_FAILED: Final = 1000
"""Most such tenants that are remembered."""

_log = get_logger(__name__)

Open = Callable[[Path, OwnerLock | None], AdapterRegistry]
Accepts = Callable[[str], Sequence[str]]


class Tenants:
    """Belongs to one event loop; what metrics read may be called from any thread.

    Attributes:
        all: the open ones, ``default`` first, the others by name.
        accepts: the tenants (``TENANT``) and adapters (``TENANT/name``) that a tenant knows by
            their plain names where they are shared; the first that has a name counts.
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
        """When a tenant could not be opened, on the monotonic clock."""

    # ------------------------------------------------------------------- lifecycle

    async def start(
        self, furnish: Furnish, default: AdapterRegistry, *, open_: Open, max_tenants: int
    ) -> None:
        """Furnish the default tenant, and open those whose folder exists. One that cannot be
        opened is logged, and its calls are refused until it can.

        Args:
            default: the registry of the data folder itself.
            open_: opens the registry in a folder; called in a thread.
            max_tenants: most that may be open.
        """
        self._furnish, self._open, self._most = furnish, open_, max_tenants
        await self._add(furnish.tenant(DEFAULT_TENANT, default), restore=True)
        for name in await asyncio.to_thread(_named, self._data_dir / FOLDER):
            try:
                await self._opened(name, restore=True)
            except Unavailable:
                pass  # it is logged
            except QuotaExceeded as error:
                _log.error("tenant not opened", tenant=name, why=str(error))

    async def stop(self) -> None:
        """Stop all upkeep and close the registries."""
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

    def opened(self) -> Tenant | None:
        """The caller's tenant, if it is open."""
        return self._by_name.get(PRINCIPAL.get().tenant)

    async def current(self, *, publishing: bool = False) -> Tenant:
        """The caller's tenant; opened now if need be.

        Args:
            publishing: the call may make a tenant that an operator names.

        Raises:
            QuotaExceeded: the server has as many tenants as it may have.
            InvalidField: an operator named a tenant that does not exist.
            Unavailable: it cannot be opened; the log says why.
        """
        principal = PRINCIPAL.get()
        found = self._by_name.get(principal.tenant)
        if found is not None:
            return found
        if principal.visiting and not publishing:
            folder = self._folder(principal.tenant)
            if not await asyncio.to_thread(folder.is_dir):
                raise InvalidField(
                    f"there is no tenant {principal.tenant!r}: its own first call, or an "
                    "upload, creates it",
                    metadata={"field": "veneer-tenant"},
                )
        return await self._opened(principal.tenant)

    async def ensure(self, name: str) -> Tenant:
        """A tenant by name; opened now if need be. Raises QuotaExceeded or Unavailable."""
        found = self._by_name.get(name)
        return await self._opened(name) if found is None else found

    def _folder(self, name: str) -> Path:
        # Names come from keys, tokens and headers: checked there, and here again, since this
        # is where one becomes a path.
        assert TENANT.fullmatch(name), "not a tenant's name"
        assert name != DEFAULT_TENANT, "it is always open"
        return self._data_dir / FOLDER / name

    async def _opened(self, name: str, *, restore: bool = False) -> Tenant:
        """Open a tenant, once for all who ask meanwhile."""
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
                self._open_one(name, restore), context=_context_of(name)
            )
            self._opening[name] = task
            task.add_done_callback(partial(self._opening_ended, name))
        # A caller that leaves takes it from nobody else.
        return await asyncio.shield(task)

    def _opening_ended(self, name: str, task: asyncio.Task[Tenant]) -> None:
        del self._opening[name]
        if not task.cancelled():
            task.exception()  # marks it as seen, where all who asked have left

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
        except Exception as error:  # whatever is wrong with one must not stop the others
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
        """Keep an adapter's files while a restarted engine reads them. By digest: the name that
        the engine knows may be gone while another has them. Raises AdapterNotFound."""
        name, digest = split_key(source.weights_digest)
        tenant = self._by_name.get(name)
        if tenant is None:
            raise AdapterNotFound(f"tenant {name!r} is not open", metadata={"tenant": name})
        return tenant.registry.acquire_weights(digest)

    def on_engine_event(self, event: EngineEvent) -> None:
        """Listener for `EngineClient`: tells the tenant whose copy it is, and nobody else."""
        if not isinstance(event, Residency | AdapterLoaded | AdapterFailed | Evicted):
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
        """Names of all tenants."""
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
        """What callers may write now for the weights of a resident copy."""
        name, digest = split_key(key)
        tenant = self._by_name.get(name)
        return () if tenant is None else tenant.registry.asked_as(digest)


def _context_of(name: str) -> Context:
    """For a tenant's upkeep, which outlives the call that opens it."""
    context = copy_context()
    context.run(REQUEST_ID.set, "")
    context.run(PRINCIPAL.set, ANYONE)
    context.run(ASKED.set, None)
    context.run(LOGGED_TENANT.set, name)
    return context


def _cannot_open(name: str) -> Unavailable:
    return Unavailable(
        f"the adapters of tenant {name!r} cannot be opened: see the server's log",
        metadata={"tenant": name},
        retry_after_s=RETRY_S,
    )


def _named(folder: Path) -> list[str]:
    """The tenants that have a folder."""
    try:
        found = sorted(each.name for each in folder.iterdir() if each.is_dir())
    except OSError:
        return []
    return [name for name in found if TENANT.fullmatch(name) and name != DEFAULT_TENANT]
