"""Publishing and deleting by name, for callers of vLLM's endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from veneer_proto.v1 import adapters_pb2
from veneer_registry.records import AdapterRecord

from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.who import who_is_here

__all__ = ["Loading", "LoadingHere"]

Messages = AsyncIterator[adapters_pb2.UploadAdapterRequest]


class Loading(Protocol):
    """How a server publishes what it finds in a folder of its machine: in its own registry, or
    in the one that it follows."""

    async def load(self, home: Tenant, messages: Messages) -> AdapterRecord:
        """Publish an upload, and load it into this server's memory. Raises as an upload."""
        ...

    async def unload(self, home: Tenant, record: AdapterRecord) -> None:
        """Delete a name, if it is still as in the record. Running requests keep the weights."""
        ...


class LoadingHere:
    """In the server's own registry."""

    async def load(self, home: Tenant, messages: Messages) -> AdapterRecord:
        async with home.uploads.receive(messages) as (_, upload):
            published = await home.changes.publish(upload, activate=True, who=who_is_here())
        return published.record

    async def unload(self, home: Tenant, record: AdapterRecord) -> None:
        await home.changes.delete(record.ref.name, "drain", etag=record.etag, who=who_is_here())
