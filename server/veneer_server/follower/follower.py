"""A follower: puts together the view, the registries of all tenants, the cache, and the
connections.

::

    follower/names/TENANT/   the tenant's registry: see `veneer_registry.registry_copy`
    follower/current         its time of change is when the names were last known to be current
    follower/weights/ ...    see `cache`

Each change is durable before it is acknowledged to the registry. Changes are applied one after
the other, so the newest number in all copies is the place up to which they have everything.
Only while a snapshot is applied they are at different places: then the default tenant's copy
has no run, which it is given last. The folder may be deleted while the server is stopped.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.disk import FOLDER_MODE, disk_errors
from veneer_registry.errors import CatalogDamaged, FailedPrecondition, VeneerError
from veneer_registry.lock import OwnerLock
from veneer_registry.records import AdapterRecord
from veneer_registry.recovery import base_identity
from veneer_registry.registry_copy import Changed, NewName, RegistryCopy, open_copy
from veneer_registry.weights_cache import WeightsCache

from veneer_server.access.keys import TENANT
from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.config import ServerConfig
from veneer_server.follower.fetched_store import FetchedStore
from veneer_server.follower.fetching import Fetching, Remote
from veneer_server.follower.link import RegistryLink
from veneer_server.follower.registry_channel import RegistryAddress, RegistryChannel
from veneer_server.follower.standing import Standing
from veneer_server.follower.store_first import ObjectsOf, StoreFirst
from veneer_server.follower.view import KnownName, Received, View
from veneer_server.logs import get_logger
from veneer_server.replication.states import Key, NameState

FOLDER: Final = "follower"
"""Subfolder of the data folder that may be deleted while the server is stopped."""

_AGE_S: Final = 1.0
"""Seconds between two notes on disk that the names are current."""

AGAIN_S: Final = 1.0
LONGEST_AGAIN_S: Final = 30.0
"""First and longest wait before a name that could not be applied is tried again."""

_BATCH: Final = 200
"""Names of a snapshot that are applied in one transaction, before other tasks get a turn."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NameChange:
    """A name has changed.

    Attributes:
        before: its revision before the change; None if the name did not exist.
        dropped: revisions that the name no longer has.
    """

    registry: RegistryCopy
    state: NameState
    before: AdapterRef | None
    dropped: tuple[AdapterRecord, ...]


Applied = Callable[[NameChange], Awaitable[None]]


class Follower:
    """Follows a registry. Belongs to one event loop, except for `open`."""

    def __init__(
        self,
        config: ServerConfig,
        base: BaseSpec,
        *,
        on_fetched: Callable[[float], None] = lambda seconds: None,
        objects: ObjectsOf | None = None,
        view: type[View] = View,
    ) -> None:
        """Args:
            objects: the registry's object store, which is asked first for weights.

        Raises:
            InvalidField: a configured file cannot be read.
        """
        self.place = RegistryAddress.of(config)
        self.standing = Standing(
            self.place.address, most_lag_s=config.max_registry_lag or math.inf
        )
        self.view = view()
        self.cache = WeightsCache(
            config.data_dir / FOLDER,
            config.adapter_cache_bytes,
            self._leased,
            lambda digest: self._resident(digest),
        )
        self.channel = RegistryChannel(self.place)
        remote: Remote = self.channel
        if objects is not None:
            remote = StoreFirst(objects, self.channel, most_bytes=config.max_adapter_bytes)
        self.fetching = Fetching(self.cache, remote, self.standing, on_fetched=on_fetched)
        self.link = RegistryLink(
            self.place,
            self.view,
            self.standing,
            name=f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}",
            base=base_identity(base),
            asks_callers=config.asks_callers,
            apply=self._apply,
        )
        self._config = config
        self._base = base
        self._base_id = base_identity(base)
        self._folder = config.data_dir / FOLDER
        self._aged = -math.inf
        self._given: set[str] = set()
        """Tenants whose registries were returned by `open`."""
        self._copies: dict[str, RegistryCopy] = {}
        self._lock = threading.Lock()
        self._applied: Applied | None = None
        self._changed = asyncio.Event()
        """Set and replaced whenever a name changes."""
        self._resident: Callable[[str], bool] = lambda digest: False
        self._tasks: set[asyncio.Task[None]] = set()
        self._behind: dict[Key, NameState] = {}
        """Last states of names that could not be applied."""
        self._mixed = False
        """Whether the copies are at different places, since a snapshot is not complete."""
        self._voided = False
        """Whether the default tenant's copy says so."""
        self._applying = asyncio.Lock()
        """Held from the decision to write a state until it is written."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="follower")
        self._admits: Callable[[str], bool] = lambda tenant: True
        self._refused: set[str] = set()
        self._catching_up: asyncio.Task[None] | None = None

    def open(self, folder: Path, lock: OwnerLock | None) -> RegistryCopy:
        """Return the registry of the tenant that this folder stands for; for the default
        tenant, also open the cache and what earlier runs left. Called from worker threads. The
        caller closes it, after `stop`, and the caller's lock stays the caller's.
        """
        tenant = folder.name
        if folder == self._config.data_dir:
            tenant = DEFAULT_TENANT
            self.cache.open()
            self._restore()
        self._given.add(tenant)
        return self._copy(tenant)

    def start(
        self,
        applied: Applied,
        resident: Callable[[str], bool],
        admits: Callable[[str], bool] = lambda tenant: True,
    ) -> None:
        """Begin to follow the registry.

        Args:
            applied: called with each applied change, for the tenant's other parts.
            resident: whether weights are in memory: see `WeightsCache`.
            admits: whether this server may open a tenant; names of others are left out.
        """
        self._admits = admits
        self._applied = applied
        self._resident = resident
        self.link.start()

    @property
    def tenants(self) -> set[str]:
        """Tenants that have names."""
        return {tenant for tenant, _ in self.view.names}

    async def until(self, holds: Callable[[], bool], within_s: float) -> bool:
        """Wait until the predicate holds; return False on timeout. It is checked again after
        each change of a name."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not holds():
                    await self._changed.wait()
        return holds()

    async def stop(self) -> None:
        """End the connections. Idempotent."""
        await self.link.stop()
        await self.fetching.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.channel.close()
        await asyncio.to_thread(self._writer.shutdown)  # waits for a running change
        for tenant, copy in list(self._copies.items()):
            if tenant not in self._given:  # otherwise whoever has it closes it
                await asyncio.to_thread(copy.close)

    # ------------------------------------------------------------- from earlier runs

    def _restore(self) -> None:
        """Open the copies of an earlier run. If one is damaged, or they do not belong together,
        remove all of them: the registry is asked again."""
        names = self._folder / "names"
        # Files of versions before December 2026.
        for old in (self._folder / "view", self._folder / "view.changes"):
            old.unlink(missing_ok=True)
        found = sorted(each.name for each in names.iterdir()) if names.is_dir() else []
        others = [each for each in found if TENANT.fullmatch(each) and each != DEFAULT_TENANT]
        for tenant in others[self._config.max_tenants - 1 :]:
            # It would be out of date if the limit were raised later.
            shutil.rmtree(names / tenant, ignore_errors=True)
        try:
            for tenant in others[: self._config.max_tenants - 1]:
                self._copy(tenant)
            place = self._copy(DEFAULT_TENANT).place
        except (CatalogDamaged, FailedPrecondition, ValueError) as error:
            _log.warning("names of an earlier run are damaged, ignoring them", why=str(error))
            place = {}
        if not place.get("run") or place.get("base") != self._base_id:
            for copy in self._copies.values():
                copy.close()
            self._copies.clear()
            shutil.rmtree(names, ignore_errors=True)
            return
        self.view.restore(
            {
                (tenant, name): KnownName.of((tenant, name), entry, len(entry.revisions))
                for tenant, copy in self._copies.items()
                for name, entry in copy.entries().items()
            },
            # If a name was behind, only a snapshot tells which one.
            run=""
            if any(each.place.get("behind") for each in self._copies.values())
            else place["run"],
            sequence=max(
                each.place.get("sequence", 0)
                for each in self._copies.values()
                if each.place.get("run") == place["run"]
            ),
            store=place["store"],
            catalogs={
                tenant: each.place.get("catalog", 0) for tenant, each in self._copies.items()
            },
        )
        with suppress(FileNotFoundError):
            age_s = time.time() - (self._folder / "current").stat().st_mtime
            if age_s >= 0:  # otherwise the clock was set back, and the age is unknown
                self.standing.restored(age_s)
            _log.info("names restored", names=len(self.view.names), age_s=round(age_s, 1))

    def _note_age(self) -> None:
        """Note on disk, once in a while, that the names are current."""
        now = time.monotonic()
        if now >= self._aged + _AGE_S:
            self._aged = now
            file, then = self._folder / "current", time.time() - self.standing.lag_s
            with suppress(OSError):
                file.touch(0o600)
                os.utime(file, (then, then))

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ------------------------------------------------------------------------ names

    def _copy(self, tenant: str) -> RegistryCopy:
        """The registry of a tenant; opened if it is not open yet. Blocks."""
        with self._lock:
            copy = self._copies.get(tenant)
            if copy is not None and not copy.closed:
                return copy
            folder = self._folder / "names" / tenant
            with disk_errors(self._folder):
                folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            refuse, lock = self.standing.refuse, OwnerLock(folder)
            try:
                copy = open_copy(
                    folder,
                    self._base,
                    lock=lock,
                    store=FetchedStore(folder, tenant, self.cache, self.fetching, refuse),
                    freshness=self.standing,
                    refuse=refuse,
                    retain=self._config.retain_superseded,
                )
            except BaseException:
                lock.release()
                raise
            self._copies[tenant] = copy
            return copy

    def _leased(self, digest: str) -> bool:
        return any(copy.leases(digest) for copy in list(self._copies.values()))

    async def _apply(self, received: Received) -> bool:
        """Apply a message's changes. Return whether the copies have, durably, all that the view
        has."""
        async with self._applying:
            if received.snapshot:
                self._mixed, self._voided = True, False
            by_tenant: dict[str, list[NameState]] = {}
            for state in received.changes:
                by_tenant.setdefault(state.tenant, []).append(state)
            for tenant, states in by_tenant.items():
                left = iter(states)
                while batch := tuple(islice(left, _BATCH)):
                    await self._try(tenant, batch)
            await self._finish()
        done = bool(self.view.run) and not self._mixed and not self._behind
        if done and received.current:
            self._note_age()
        return done

    async def _finish(self) -> None:
        """Note in the default tenant's copy that a snapshot is complete."""
        if self._mixed and not self._behind:
            self._mixed = False
            if not await self._try(DEFAULT_TENANT, ()):
                self._mixed = True

    def _place(self, tenant: str) -> Mapping[str, Any]:
        """What is written with a tenant's changes; see `_restore`."""
        place = {
            "run": self.view.run,
            "sequence": self.view.sequence,
            "catalog": self.view.catalogs.get(tenant, 0),
            "behind": bool(self._behind),
        }
        if tenant != DEFAULT_TENANT:
            return place
        if self._mixed:
            return {}
        return place | {
            "base": self._base_id,
            "store": self.view.store,
        }

    async def _try(self, tenant: str, states: Iterable[NameState]) -> bool:
        """Apply states of different names; after an error, retry those that failed in the
        background until they succeed. One name must not block the others. Return whether all
        succeeded. The caller holds `_applying`."""
        states = tuple(states)
        try:
            await self._take_over(tenant, states)
        except Exception as error:
            if len(states) > 1:
                return all([await self._try(tenant, [each]) for each in states])
            _log.error("not followed yet", error, tenant=tenant, name=[s.name for s in states])
            self._behind.update((each.key, each) for each in states)
            if self._catching_up is None or self._catching_up.done():
                self._catching_up = self._start(self._catch_up())
            return False
        finally:
            self._changed.set()
            self._changed = asyncio.Event()
        for each in states:
            self._behind.pop(each.key, None)
        return True

    async def _catch_up(self) -> None:
        """Retry failed names with their latest states."""
        wait_s = AGAIN_S
        while self._behind or self._mixed:
            await asyncio.sleep(wait_s)
            for state in tuple(self._behind.values()):
                async with self._applying:
                    if self._behind.get(state.key) is state:  # otherwise it is older
                        await self._try(state.tenant, [state])
            async with self._applying:
                await self._finish()
            wait_s = min(LONGEST_AGAIN_S, 2 * wait_s)

    async def _take_over(self, tenant: str, states: Iterable[NameState]) -> None:
        if not self._admits(tenant):
            if tenant not in self._refused:
                _log.error("tenant not followed: see --max-tenants", tenant=tenant)
            self._refused.add(tenant)
            return
        if self._mixed and not self._voided:
            # Before anything of a snapshot is written: the old place must not count any more.
            await self._write(DEFAULT_TENANT, {}, {})
            self._voided = True
        names = {each.name: NewName(each.entry, each.rows) for each in states}
        copy, found = await self._write(tenant, names, self._place(tenant))
        for state in states:
            before, dropped = found[state.name].before, found[state.name].dropped
            self._bring_hot(copy, before, state)
            if self._applied is None:
                continue
            try:
                await self._applied(NameChange(copy, state, before, dropped))
            except Exception as error:  # it is applied, and the next names go on
                _log.error("change not announced", error, tenant=tenant, name=state.name)

    async def _write(
        self, tenant: str, names: Mapping[str, NewName], place: Mapping[str, Any]
    ) -> tuple[RegistryCopy, Mapping[str, Changed]]:
        """Change a tenant's copy, in the thread of which there is one."""

        def write() -> tuple[RegistryCopy, Mapping[str, Changed]]:
            copy = self._copy(tenant)
            return copy, copy.apply(names, place)

        return await asyncio.get_running_loop().run_in_executor(self._writer, write)

    def _bring_hot(
        self, copy: RegistryCopy, before: AdapterRef | None, state: NameState
    ) -> None:
        """Prefetch a name's new revision if the weights of the old one are cached here."""
        now = None if state.entry is None else state.entry.current
        if before is None or now is None or before.weights_digest == now.weights_digest:
            return
        if before.weights_digest in self.cache and now.weights_digest not in self.cache:
            self._start(self._bring(copy, now))

    async def _bring(self, copy: RegistryCopy, ref: AdapterRef) -> None:
        try:
            with copy.acquire(f"{ref.name}@{ref.revision}"):
                await copy.present(ref)
        except VeneerError as error:
            _log.info("adapter not fetched ahead", adapter=ref.short, reason=error.reason)
