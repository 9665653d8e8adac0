"""Publishes adapters from URIs: fetches them into a folder, then uploads them from there.

So a fetched adapter passes the same checks, limits and events as an uploaded one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from veneer_registry.adapter import check_name
from veneer_registry.errors import (
    InvalidField,
    QueueFull,
    QuotaExceeded,
    Unavailable,
    VeneerError,
)
from veneer_registry.records import AdapterRecord, Published, UploadRequest
from veneer_registry.rows import Who

from veneer_server.access.caller import Caller
from veneer_server.adapters.fetching.fetchers import Fetchers, FetchSettings
from veneer_server.adapters.fetching.uris import Uri, parse_uri
from veneer_server.config import ServerConfig
from veneer_server.logs import get_logger
from veneer_server.queues.upload_flow import UploadFlow
from veneer_server.quotas.quota import Account
from veneer_server.serving.downloads import Downloads
from veneer_server.serving.generation import Calls, Phase
from veneer_server.serving.local_folders import LocalFile, LocalFolders
from veneer_server.serving.tenants import Tenant, Tenants
from veneer_server.serving.uploads import UploadMessage, UploadOptions
from veneer_server.serving.watched import WatchedFolder
from veneer_server.telemetry.watched_series import WatchedSeries


class Registering:
    """Publishes adapters from URIs. Belongs to one event loop."""

    def __init__(
        self, fetchers: Fetchers, *, roots: LocalFolders, staging: LocalFolders
    ) -> None:
        """Args:
        roots: folders that ``file`` URIs may name.
        staging: the fetchers' folder.
        """
        self._fetchers = fetchers
        self._roots = roots
        self._staging = staging

    def check(self, uri: Uri) -> None:
        """Raise InvalidField if a URI may not be fetched, as far as that can be known before
        fetching it."""
        if uri.scheme != "file":
            self._fetchers.check(uri)

    async def register(
        self,
        home: Tenant,
        uri: Uri,
        wanted: UploadOptions,
        who: Who,
        accounts: Sequence[Account],
    ) -> Published:
        """Fetch and publish an adapter. If the caller leaves before the name moves, nothing is
        published.

        Args:
            wanted: the upload's options; the request's files are filled in.
            who: the author, for the history.
            accounts: the accounts whose limits the upload counts towards.

        Raises:
            InvalidField: the URI may not be fetched (metadata ``field``: ``uri``, ``cause``).
            AdapterExists: the name is taken, and ``allow_replace`` is not set.
            VeneerError: it cannot be fetched, or the upload fails.
        """
        async with (
            self._opened(uri, home.name) as (local, files),
            aclosing(local.messages(files, wanted)) as messages,
            home.uploads.receive(messages, accounts) as (options, upload),
        ):
            if options.validate_only:
                return await home.uploads.validate(upload)
            return await home.changes.publish(upload, activate=options.activate, who=who)

    @asynccontextmanager
    async def _opened(
        self, uri: Uri, tenant: str
    ) -> AsyncIterator[tuple[LocalFolders, tuple[LocalFile, ...]]]:
        if uri.scheme == "file":
            async with self._roots.opened("/" + "/".join(uri.parts)) as files:
                yield self._roots, files
            return
        async with (
            self._fetchers.fetched(uri, tenant) as folder,
            self._staging.opened(str(folder)) as files,
        ):
            yield self._staging, files


# -------------------- resolving
# ``--resolve``: an adapter that nobody has published is fetched when it is first requested.

PLACE: Final = "{name}"
FORGET_S: Final = 30.0
"""Seconds before a name that could not be fetched is tried again."""
MOST_A_MINUTE: Final = 30
"""Most names that a tenant's calls may try per minute: each try costs a process."""
MOST_WAITING: Final = 256
"""Most requests that wait for fetches: they have no place in the queue yet."""
_MOST_FAILED: Final = 1000

_FINAL: Final = frozenset({"INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNIMPLEMENTED"})
"""Error codes that mean that there is no such adapter."""

_log = get_logger(__name__)


class Resolving:
    """Fetches unknown names; concurrent requests share one fetch. Belongs to one event loop."""

    def __init__(self, template: str, registering: Registering) -> None:
        """Args:
        template: a URI with ``{name}``; empty to fetch nothing.

        Raises:
            InvalidField: it is malformed, or --fetch-allow does not allow it.
        """
        self._template = template
        self._registering = registering
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failed: OrderedDict[tuple[str, str], tuple[float, VeneerError]] = OrderedDict()
        self._waiting = 0
        self._tried: dict[str, deque[float]] = {}
        if template:
            try:
                if PLACE not in template:
                    raise InvalidField(f"it has no {PLACE}")
                registering.check(parse_uri(self._uri("name")))
            except InvalidField as error:
                raise InvalidField(
                    f"--resolve {template[:200]!r} is not allowed: {error.message}",
                    metadata={"key": "resolve"},
                ) from error

    def _uri(self, name: str) -> str:
        return self._template.replace(PLACE, name)

    async def fetch(self, home: Tenant, name: str, caller: Caller) -> None:
        """Fetch and publish ``name``, if it is a plain name. The caller then looks it up, and
        may still not find it. The upload counts towards the limits of the first caller.

        Raises:
            Unavailable: it could not be fetched now.
            QuotaExceeded, QueueFull: too many names are fetched, or too many requests wait.
        """
        if not self._template:
            return
        try:
            check_name(name)
        except InvalidField:
            return
        key, now = (home.name, name), asyncio.get_running_loop().time()
        task = self._running.get(key)
        if task is None:
            if (failed := self._failed.get(key)) is not None and now < failed[0]:
                self._answer(failed[1])
                return
            self._count(home.name, now)
            task = asyncio.get_running_loop().create_task(
                self._fetch(home, name, caller.principal.accounts)
            )
            self._running[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        if self._waiting >= MOST_WAITING:
            raise QueueFull(
                f"{MOST_WAITING} requests are waiting for adapters to be fetched: retry",
                metadata={"limit": str(MOST_WAITING)},
                retry_after_s=1.0,
            )
        self._waiting += 1
        try:
            # A caller that leaves must not cancel it for the others.
            await asyncio.shield(task)
        except VeneerError as error:
            self._answer(error)
        finally:
            self._waiting -= 1

    async def _fetch(self, home: Tenant, name: str, accounts: Sequence[Account]) -> None:
        uri, wanted = parse_uri(self._uri(name)), UploadOptions(UploadRequest(name, ()))
        who = Who("resolve", "server")
        published = await self._registering.register(home, uri, wanted, who, accounts)
        _log.info("name resolved", name=published.record.ref.short)

    def _ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._running[key]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, VeneerError):
            _log.info("name not resolved", name=key[1], why=str(error))
            until = asyncio.get_running_loop().time() + FORGET_S
            self._failed[key] = (until, error)
            self._failed.move_to_end(key)
            while len(self._failed) > _MOST_FAILED:
                self._failed.popitem(last=False)

    def _answer(self, error: VeneerError) -> None:
        """Raise the caller's error for a failed fetch; nothing if there is no such adapter."""
        if isinstance(error, QuotaExceeded):
            raise error
        if error.code not in _FINAL:
            raise Unavailable(
                "the adapter is not registered and could not be fetched: try again",
                metadata={"cause": "resolve"},
                retry_after_s=5.0,
            ) from None

    def _count(self, tenant: str, now: float) -> None:
        tried = self._tried.setdefault(tenant, deque())
        while tried and tried[0] < now - 60.0:
            tried.popleft()
        if len(tried) >= MOST_A_MINUTE:
            raise QuotaExceeded(
                f"{MOST_A_MINUTE} unknown adapters were looked up within a minute: retry "
                "later, or publish them",
                metadata={"limit": str(MOST_A_MINUTE), "cause": "resolve"},
                retry_after_s=tried[0] + 60.0 - now,
            )
        tried.append(now)


# -------------------- loading
# Publishing and deleting by name, for callers of vLLM's endpoints.


class FolderPublishing(Protocol):
    """Publishes and deletes adapters from folders of this machine, either in the server's own
    registry or in the one that it follows."""

    async def load(
        self, home: Tenant, messages: AsyncIterator[UploadMessage], caller: Caller
    ) -> AdapterRecord:
        """Publish an upload, and load it into this server's memory. Raises as an upload."""
        ...

    async def unload(self, home: Tenant, record: AdapterRecord, caller: Caller) -> None:
        """Delete a name, if it has not changed since the record. Running requests keep the
        weights."""
        ...


class PublishingHere:
    """Publishes in the server's own registry."""

    async def load(
        self, home: Tenant, messages: AsyncIterator[UploadMessage], caller: Caller
    ) -> AdapterRecord:
        async with home.uploads.receive(messages, caller.principal.accounts) as (_, upload):
            published = await home.changes.publish(upload, activate=True, who=caller.who)
        return published.record

    async def unload(self, home: Tenant, record: AdapterRecord, caller: Caller) -> None:
        await home.changes.delete(record.ref.name, "drain", etag=record.etag, who=caller.who)


# -------------------- transfers
# The parts that transfer adapters other than by a client's upload, made from the settings.


@dataclass(frozen=True, slots=True)
class Transfers:
    """The parts that answer calls for fetching and downloading adapters."""

    registering: Registering
    downloads: Downloads
    resolving: Resolving

    @classmethod
    async def start(
        cls,
        config: ServerConfig,
        tenants: Tenants,
        calls: Calls,
        series: WatchedSeries,
        flow: UploadFlow,
        resources: AsyncExitStack,
    ) -> Transfers:
        """Start the parts that the settings ask for; ``resources`` stops them.

        Args:
            flow: the limit on the speed of uploads, which downloads share.

        Raises:
            InvalidField: a setting is malformed.
        """
        staging = (config.data_dir / "fetching").absolute()
        fetchers = Fetchers(
            FetchSettings(
                staging=staging,
                allowed=config.fetch_allow,
                tokens=config.fetch_token,
                hub=config.hf_endpoint,
                most_bytes=config.max_adapter_bytes,
                deadline_s=config.fetch_deadline,
                least_rate=config.min_upload_rate,
            )
        )
        await asyncio.to_thread(fetchers.clear)
        for folder in config.lora_root:
            # Only a warning: a disk may be mounted later.
            if not await asyncio.to_thread(folder.is_dir):
                _log.warning("there is no such folder: check --lora-root", folder=folder)
        most = config.max_adapter_bytes
        if config.watch_dir is not None:
            watched = WatchedFolder(
                config.watch_dir,
                lambda: tenants.default,
                state=config.data_dir / "watched.json",
                most_bytes=most,
                series=series,
                ready=lambda: calls.phase is Phase.SERVING,
            )
            resources.push_async_callback(watched.stop)
            await watched.start()
        downloads = Downloads(flow, reader_limit_s=config.reader_limit)
        resources.push_async_callback(downloads.stop)
        registering = Registering(
            fetchers,
            roots=LocalFolders(config.lora_root, most, "uri"),
            staging=LocalFolders((staging,), most, "uri"),
        )
        return cls(registering, downloads, Resolving(config.resolve, registering))
