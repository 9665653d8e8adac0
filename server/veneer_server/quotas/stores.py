"""How much tenants store, as limits and usage need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from veneer_registry.records import UploadRequest


class TenantStorage(NamedTuple):
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

    def stored(self, tenant: str) -> TenantStorage:
        """What a tenant stores."""

    def adds(self, tenant: str, request: UploadRequest) -> TenantStorage:
        """What it would store beyond that, were an upload published."""

    def there(self, tenant: str, request: UploadRequest) -> int:
        """Bytes that a resumed upload need not send. Raises as `Registry.committed`."""
