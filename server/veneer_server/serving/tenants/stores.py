"""How much the open tenants store, for limits and usage."""

from __future__ import annotations

from collections.abc import Sequence

from veneer_registry.records import UploadRequest

from veneer_server.quotas.stores import Stored
from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.serving.tenants.tenants import Tenants

__all__ = ["TenantStores"]


class TenantStores:
    """Each tenant's own registry; one that is not open counts as empty."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def tenants(self) -> Sequence[str]:
        """The open ones."""
        return [tenant.name for tenant in self._tenants.all]

    def stored(self, tenant: str) -> Stored:
        """As `quotas.stores.Stores`."""
        registry = self._registry(tenant)
        if registry is None:
            return Stored(0, 0)
        return Stored(len(registry), registry.stored_bytes())

    def adds(self, tenant: str, request: UploadRequest) -> Stored:
        """As `quotas.stores.Stores`."""
        registry = self._registry(tenant)
        size = sum(file.size for file in request.files)
        if registry is None:
            return Stored(1, size)
        new = request.name not in registry
        return Stored(int(new), 0 if registry.stores(request) else size)

    def there(self, tenant: str, request: UploadRequest) -> int:
        """As `quotas.stores.Stores`."""
        registry = self._registry(tenant)
        return 0 if registry is None else sum(registry.committed(request).values())

    def _registry(self, tenant: str) -> AdapterRegistry | None:
        found = self._tenants.named(tenant)
        return None if found is None else found.registry
