"""The interface through which limits and usage learn how much tenants store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from veneer_registry.records import UploadRequest


class TenantStorage(NamedTuple):
    """An amount of stored adapters.

    Attributes:
        adapters: number of names.
        bytes: bytes of all revisions that are kept; shared content counts once.
    """

    adapters: int
    bytes: int


class Stores(Protocol):
    """The adapters that tenants store. Called in worker threads."""

    def tenants(self) -> Sequence[str]:
        """The tenants that may store something."""

    def stored(self, tenant: str) -> TenantStorage:
        """The amount that a tenant stores."""

    def adds(self, tenant: str, request: UploadRequest) -> TenantStorage:
        """The amount that publishing an upload would add."""

    def there(self, tenant: str, request: UploadRequest) -> int:
        """Bytes that a resumed upload need not send again. Raises as `Registry.committed`."""
