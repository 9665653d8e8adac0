"""How much tenants store, as limits and usage need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from veneer_registry.records import UploadRequest
from veneer_registry.registry import Registry

__all__ = ["RegistryStores", "Stored", "Stores"]


class Stored(NamedTuple):
    """Attributes:
    adapters: names.
    bytes: of all revisions that are kept; content that several share counts once.
    """

    adapters: int
    bytes: int


class Stores(Protocol):
    """What tenants store. Called in threads."""

    def tenants(self) -> Sequence[str]:
        """Those that may store something."""

    def stored(self, tenant: str) -> Stored:
        """What a tenant stores."""

    def adds(self, tenant: str, request: UploadRequest) -> Stored:
        """What it would store beyond that, were an upload published."""

    def there(self, tenant: str, request: UploadRequest) -> int:
        """Bytes that a resumed upload need not send. Raises as `Registry.committed`."""


class RegistryStores:
    """One registry, which all tenants share: it is the first tenant's in usage, and counts
    as each one's own in limits."""

    def __init__(self, registry: Registry, tenant: str) -> None:
        self._registry = registry
        self._tenant = tenant

    def tenants(self) -> Sequence[str]:
        return (self._tenant,)

    def stored(self, tenant: str) -> Stored:
        return Stored(len(self._registry), self._registry.stored_bytes())

    def adds(self, tenant: str, request: UploadRequest) -> Stored:
        new = request.name not in self._registry
        size = sum(file.size for file in request.files)
        return Stored(int(new), 0 if self._registry.stores(request) else size)

    def there(self, tenant: str, request: UploadRequest) -> int:
        return sum(self._registry.committed(request).values())
