"""What a tenant sees: its own adapters, and those of others that share theirs.

A name of one's own comes first. A name that neither is one's own nor shared does not exist: the
error is the same, and so is the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from veneer_registry.entry import split_spec
from veneer_registry.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    PermissionDenied,
)
from veneer_registry.index import not_found
from veneer_registry.lease import RevisionLease
from veneer_registry.records import AdapterRecord
from veneer_registry.rows import AliasRow
from veneer_registry.suggest import NearNames

from veneer_server.serving.tenants.registry import AdapterRegistry
from veneer_server.serving.tenants.tenant import Tenant
from veneer_server.serving.tenants.tenants import Tenants

__all__ = ["Visible"]

T = TypeVar("T")


class Visible:
    """Looks names up for a tenant. Thread-safe."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def owner(self, home: Tenant, spec: str) -> Tenant:
        """Whose adapter ``home`` means by ``name``, ``name@revision`` or ``name/alias``; its
        own if there is none."""
        name = split_spec(spec)[0]
        if not home.registry.knows(name):
            for other in self._tenants.all:
                if other is not home and other.registry.is_shared(name):
                    return other
        return home

    def knows(self, home: Tenant, spec: str) -> bool:
        """Whether ``spec`` has a name that ``home`` sees."""
        return self.owner(home, spec).registry.knows(split_spec(spec)[0])

    def find(
        self, home: Tenant, spec: str, look: Callable[[AdapterRegistry], T]
    ) -> tuple[Tenant, T]:
        """Look ``spec`` up in its owner's registry.

        Raises:
            AdapterNotFound: with metadata ``did_you_mean`` if there is a similar name that
                ``home`` sees.
            VeneerError: as ``look`` does.
        """
        owner = self.owner(home, spec)
        try:
            return owner, look(owner.registry)
        except AdapterNotFound as error:
            name, suggested = split_spec(spec)[0], "did_you_mean" in error.metadata
            if owner is not home or home.registry.knows(name) or suggested:
                raise
            shared = self._shared(home)
            near = NearNames(shared).nearest(name, shared) if shared else None
            if near is None:
                raise
            raise not_found(name, near) from None

    def get(self, home: Tenant, spec: str) -> tuple[Tenant, AdapterRecord]:
        """`Registry.get`, with the owner."""
        return self.find(home, spec, lambda registry: registry.get(spec))

    def acquire(self, home: Tenant, spec: str, key: str) -> tuple[Tenant, RevisionLease]:
        """`Registry.acquire`, with the owner."""
        return self.find(home, spec, lambda registry: registry.acquire(spec, key))

    def page(
        self,
        home: Tenant,
        *,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: str = "",
        limit: int = 100,
    ) -> list[tuple[Tenant, AdapterRecord]]:
        """`Registry.list` of what ``home`` sees, with the owners."""
        own = home.registry.list(prefix=prefix, labels=labels, after=after, limit=limit)
        found = [(home, record) for record in own]
        names = {record.ref.name for record in own}
        theirs: list[tuple[Tenant, AdapterRecord]] = []
        wanted = (labels or {}).items()
        for name, owner in sorted(self._shared(home).items()):
            if name <= after or not name.startswith(prefix):
                continue
            if name in names:  # listed above, and deleted since then
                continue
            if len(theirs) == limit:
                break
            with suppress(AdapterNotFound, AdapterCorrupt):  # deleted just now, or damaged
                record = owner.registry.get(name)
                if wanted <= record.labels.items():
                    theirs.append((owner, record))
        if not theirs:
            return found
        return sorted(found + theirs, key=lambda each: each[1].ref.name)[:limit]

    def aliases(self, home: Tenant, name: str) -> tuple[AliasRow, ...]:
        """`Registry.aliases` of a name, or of all names that ``home`` sees."""
        if name:
            return self.find(home, name, lambda registry: registry.aliases(name))[1]
        rows = list(home.registry.aliases())
        own = {row.name for row in rows}
        for shared, owner in self._shared(home).items():
            if shared in own:  # listed above, and deleted since then
                continue
            with suppress(AdapterNotFound):  # deleted just now
                rows += owner.registry.aliases(shared)
        return tuple(sorted(rows, key=lambda row: (row.name, row.alias)))

    def check_own(self, home: Tenant, spec: str) -> None:
        """Raises PermissionDenied if ``home`` means another tenant's adapter by ``spec``."""
        owner = self.owner(home, spec)
        if owner is not home:
            name = split_spec(spec)[0]
            raise PermissionDenied(
                f"adapter {name!r} belongs to tenant {owner.name!r}, which shares it: you may "
                "use it, and its own tenant may change it",
                metadata={"adapter": name, "tenant": owner.name, "cause": "tenant"},
            )

    def check_free(self, home: Tenant, spec: str) -> None:
        """Raises AdapterExists if another tenant shares this name already: requests of others
        must not silently move to ``home``'s."""
        name = split_spec(spec)[0]
        for other in self._tenants.all:
            if other is not home and other.registry.is_shared(name):
                raise AdapterExists(
                    f"tenant {other.name!r} shares an adapter {name!r} already: publish yours "
                    "under another name to share it",
                    metadata={"adapter": name, "tenant": other.name},
                )

    def _shared(self, home: Tenant) -> dict[str, Tenant]:
        found: dict[str, Tenant] = {}
        for other in self._tenants.all:
            if other is home:
                continue
            for name in other.registry.shared():
                if not home.registry.knows(name):
                    found.setdefault(name, other)
        return found
