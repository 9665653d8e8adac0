"""Publishes adapters from URIs: fetched into a folder, then uploaded from it.

So what is fetched passes the same checks, limits and events as an upload.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import check_name
from veneer_registry.errors import InvalidField
from veneer_registry.records import Published
from veneer_registry.rows import Who
from veneer_registry.upload import check_labels

from veneer_server.adapters.fetching.fetchers import Fetchers
from veneer_server.adapters.fetching.uris import Uri, parse_uri
from veneer_server.serving.local_folders import LocalFile, LocalFolders
from veneer_server.serving.tenants.tenant import Tenant

__all__ = ["Registering", "Registration", "registration"]


@dataclass(frozen=True, slots=True)
class Registration:
    """A checked `RegisterAdapterRequest`."""

    name: str
    uri: Uri
    labels: Mapping[str, str] = field(default_factory=dict)
    validate_only: bool = False
    activate: bool = False
    allow_replace: bool = False
    etag: str = ""


def registration(request: adapters_pb2.RegisterAdapterRequest) -> Registration:
    """What a request asks for. Raises InvalidField."""
    check_name(request.name)
    check_labels(request.labels)
    if request.validate_only and request.activate:
        raise InvalidField(
            "activate has no effect with validate_only, which publishes nothing: set one of "
            "them",
            metadata={"field": "activate"},
        )
    return Registration(
        name=request.name,
        uri=parse_uri(request.uri),
        labels=dict(request.labels),
        validate_only=request.validate_only,
        activate=request.activate,
        allow_replace=request.allow_replace,
        etag=request.etag,
    )


class Registering:
    """Publishes from URIs. Belongs to one event loop."""

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
        """Raise InvalidField if a URI may not be fetched, as far as that shows before."""
        if uri.scheme != "file":
            self._fetchers.check(uri)

    async def register(self, home: Tenant, wanted: Registration, who: Who) -> Published:
        """Fetch and publish. If the caller leaves before the name moves, nothing is published.

        Raises:
            InvalidField: the URI may not be fetched (metadata ``field``: ``uri``, ``cause``).
            AdapterExists: the name is taken, and ``allow_replace`` is not set.
            VeneerError: it cannot be fetched, or as an upload.
        """
        spec = adapters_pb2.UploadSpec(
            name=wanted.name,
            labels=wanted.labels,
            validate_only=wanted.validate_only,
            activate=wanted.activate,
            allow_replace=wanted.allow_replace,
            etag=wanted.etag,
        )
        async with (
            self._opened(wanted.uri, home.name) as (local, files),
            aclosing(local.messages(files, spec)) as messages,
            home.uploads.receive(messages) as (options, upload),
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
