"""A follower: puts together the view, all tenants' mirrors, the cache, and the connections."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.errors import VeneerError
from veneer_registry.lock import OwnerLock
from veneer_registry.records import AdapterRecord
from veneer_registry.recovery import base_identity

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.config import ServerConfig
from veneer_server.follower.cache import FollowerCache
from veneer_server.follower.fetching import Fetching, Remote
from veneer_server.follower.kept_view import Kept, append, load, save, saved_at
from veneer_server.follower.link import RegistryLink
from veneer_server.follower.mirror import Mirror
from veneer_server.follower.registry_channel import RegistryAddress, RegistryChannel
from veneer_server.follower.standing import Standing
from veneer_server.follower.store_first import ObjectsOf, StoreFirst
from veneer_server.follower.view import Received, View
from veneer_server.logs import get_logger
from veneer_server.replication.states import Key, NameState, Told

FOLDER: Final = "follower"
"""Subfolder of the data folder that may be deleted while the server is stopped."""

_MOST_CHANGES: Final = 1 << 20
"""Bytes of changes after which the whole view is saved again, or its own size if that is more:
then most saves are short."""

_AGE_S: Final = 1.0
"""Seconds between two notes on disk that the view is current."""

AGAIN_S: Final = 1.0
LONGEST_AGAIN_S: Final = 30.0
"""First and longest wait before a name that could not be applied is tried again."""

_BATCH: Final = 100
"""Names that are applied before other tasks get a turn."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NameChange:
    """A name has changed.

    Attributes:
        before: its revision before the change; None if the name did not exist.
        dropped: revisions that the name no longer has.
    """

    mirror: Mirror
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
        self.cache = FollowerCache(
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
            keep=self._keep,
        )
        self._config = config
        self._base = base
        self._base_id = base_identity(base)
        self._kept = config.data_dir / FOLDER / "view"
        self._durable: tuple[str, int] | None = None
        """Place up to which the view on disk has all changes."""
        self._unsaved: list[Told] | None = []
        """Changes since; None if the whole view must be saved."""
        self._view_bytes = self._changes_bytes = 0
        self._aged = -math.inf
        self._mirrors: dict[str, Mirror] = {}
        self._lock = threading.Lock()
        self._applied: Applied | None = None
        self._changed = asyncio.Event()
        """Set and replaced whenever a name changes."""
        self._resident: Callable[[str], bool] = lambda digest: False
        self._tasks: set[asyncio.Task[None]] = set()
        self._behind: set[Key] = set()
        """Names whose last state could not be applied."""
        self._catching_up: asyncio.Task[None] | None = None

    def open(self, folder: Path, lock: OwnerLock | None) -> Mirror:
        """Return the mirror of the tenant that this folder stands for; for the default tenant,
        also open the cache and restore the saved view. Called from worker threads."""
        if folder == self._config.data_dir:
            self.cache.open()
            self._restore()
            return self._mirror(DEFAULT_TENANT)
        return self._mirror(folder.name)

    def start(self, applied: Applied, resident: Callable[[str], bool]) -> None:
        """Begin to follow the registry.

        Args:
            applied: called with each applied change, for the tenant's other parts.
            resident: whether weights are in memory: see `FollowerCache`.
        """
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

    # ------------------------------------------------------------------ saved view

    def _restore(self) -> None:
        kept = load(self._kept, self._base_id)
        if kept is None:
            return
        age_s = time.time() - saved_at(self._kept)
        self.view.restore(
            kept.names,
            run=kept.run,
            sequence=kept.sequence,
            store=kept.store,
            catalog_change=kept.catalog_change,
        )
        if age_s >= 0:  # otherwise the clock was set back, and the view's age is unknown
            self.standing.restored(age_s)
        for state in kept.names:
            self._mirror(state.tenant).apply(state)
        _log.info("view restored", names=len(kept.names), age_s=round(age_s, 1))

    async def _keep(self) -> bool:
        """Make the view durable, whichever messages brought it here; return whether it is. What
        fails is tried again with the next message, which is a heartbeat at the latest."""
        place = self.view.run, self.view.sequence
        if not self.view.run:  # out of step: a snapshot comes
            return False
        if place == self._durable:
            self._note_age()
            return True
        changes, known = self._unsaved, self._durable is not None
        most = max(_MOST_CHANGES, self._view_bytes)
        try:
            if changes and known and self._changes_bytes < most:
                work = partial(append, self._kept, self.view.run, changes)
                self._changes_bytes = await asyncio.to_thread(work)
            else:
                kept = Kept.of(self.view)
                self._view_bytes = await asyncio.to_thread(
                    save, self._kept, kept, self._base_id
                )
                self._changes_bytes = 0
        except VeneerError as error:
            _log.warning("view not saved: changes are not acknowledged", why=str(error))
            self._durable = None  # what is in the files is not known
            return False
        self._durable, self._unsaved = place, []
        return True

    def _note_age(self) -> None:
        """Note on disk, once in a while, that the view is still current."""
        now = time.monotonic()
        if self.standing.connected and now >= self._aged + _AGE_S:
            self._aged = now
            with suppress(OSError):
                os.utime(self._kept)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ------------------------------------------------------------------------ names

    def _mirror(self, tenant: str) -> Mirror:
        with self._lock:
            mirror = self._mirrors.get(tenant)
            if mirror is None:
                mirror = self._mirrors[tenant] = Mirror(
                    tenant,
                    self._base,
                    self.standing,
                    self.fetching,
                    self._config.retain_superseded,
                )
            return mirror

    def _leased(self, digest: str) -> bool:
        return any(mirror.leases(digest) for mirror in list(self._mirrors.values()))

    async def _apply(self, received: Received) -> None:
        if received.told is None:
            self._unsaved = None
        elif self._unsaved is not None:
            self._unsaved.append(received.told)
        for number, state in enumerate(received.changes, 1):
            await self._try(state)
            if number % _BATCH == 0:
                await asyncio.sleep(0)

    async def _try(self, state: NameState) -> None:
        """Apply a state; after an error, retry it in the background until it succeeds. One name
        must not block the others."""
        try:
            await self._take_over(state)
        except Exception as error:
            _log.error("not followed yet", error, tenant=state.tenant, name=state.name)
            self._behind.add(state.key)
            if self._catching_up is None or self._catching_up.done():
                self._catching_up = self._start(self._catch_up())
        else:
            self._behind.discard(state.key)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _catch_up(self) -> None:
        """Retry failed names with their latest states."""
        wait_s = AGAIN_S
        while self._behind:
            await asyncio.sleep(wait_s)
            for key in tuple(self._behind):
                await self._try(self.view.names.get(key) or NameState(*key, None))
            wait_s = min(LONGEST_AGAIN_S, 2 * wait_s)

    async def _take_over(self, state: NameState) -> None:
        mirror = self._mirror(state.tenant)
        before = mirror.current(state.name)
        dropped = mirror.apply(state)
        self._bring_hot(mirror, before, state)
        if self._applied is not None:
            await self._applied(NameChange(mirror, state, before, dropped))

    def _bring_hot(self, mirror: Mirror, before: AdapterRef | None, state: NameState) -> None:
        """Prefetch a name's new revision if the weights of the old one are cached here."""
        now = None if state.entry is None else state.entry.current
        if before is None or now is None or before.weights_digest == now.weights_digest:
            return
        if before.weights_digest in self.cache and now.weights_digest not in self.cache:
            self._start(self._bring(mirror, now))

    async def _bring(self, mirror: Mirror, ref: AdapterRef) -> None:
        try:
            with mirror.acquire(f"{ref.name}@{ref.revision}"):
                await mirror.present(ref)
        except VeneerError as error:
            _log.info("adapter not fetched ahead", adapter=ref.short, reason=error.reason)
