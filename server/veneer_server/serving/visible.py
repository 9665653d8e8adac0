"""Looks up the adapters that a tenant sees: its own, and those that other tenants share.

Another tenant's adapter is called ``TENANT/name``, ``TENANT/name@revision`` or
``TENANT/name/alias``, so that nobody can plant a name that others call by mistake. Only tenants
that accept it, as set in the keys file, can also call it by its plain name. A spec that begins
with one of the tenant's own adapter names always means that adapter, so ``x/y`` never switches
between an own adapter's alias and another tenant's adapter. For a name that is neither the
tenant's own nor shared, the error and the work are the same whether another tenant has it or
not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from veneer_registry.errors import AdapterCorrupt, AdapterNotFound, PermissionDenied
from veneer_registry.index import not_found
from veneer_registry.lease import RevisionLease
from veneer_registry.records import AdapterRecord
from veneer_registry.registry import Registry
from veneer_registry.rows import AliasRow
from veneer_registry.suggest import NearNames

from veneer_server.serving.tenants import Tenant, Tenants

T = TypeVar("T")

_MOST_NEAR: Final = 1000
"""With more shared names than this, no similar name is looked for among them."""

_FIRST: Final = re.compile(r"[^@/]*")


@dataclass(frozen=True, slots=True)
class Meant:
    """A resolved adapter spec.

    Attributes:
        owner: the tenant that owns the adapter.
        spec: the owner's spec for it: ``name``, ``name@revision`` or ``name/alias``.
        name: the owner's name for the adapter.
    """

    owner: Tenant
    spec: str
    name: str


@dataclass(frozen=True, slots=True)
class VisibleAdapter:
    """An adapter that a tenant sees.

    Attributes:
        name: the name by which that tenant calls it.
    """

    owner: Tenant
    record: AdapterRecord
    name: str


class Visible:
    """Looks names up for a tenant. Thread-safe."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def meant(self, home: Tenant, spec: str) -> Meant:
        """Resolve a spec used by ``home``: another tenant's shared adapter, or else one of
        ``home``'s own, which need not exist."""
        first = _first(spec)
        own = Meant(home, spec, first)
        if home.registry.knows(first):
            return own
        name, slash, rest = spec.partition("/")
        if slash and name == first:
            other = self._tenants.named(name)
            if other is not None and other is not home:
                theirs = _first(rest)
                if other.registry.is_shared(theirs):
                    return Meant(other, rest, theirs)
        owner = self._accepted(home, first)
        return own if owner is None else Meant(owner, spec, first)

    def _accepted(self, home: Tenant, name: str) -> Tenant | None:
        """The first tenant in ``home``'s list of accepted tenants that shares an adapter of
        this name; None if ``home`` cannot call one by its plain name."""
        accepts = self._tenants.accepts(home.name)
        if not accepts or self._tenants.named(name) is not None:
            return None  # a tenant's name is reserved as the prefix of that tenant's adapters
        for accepted in accepts:
            tenant, _, only = accepted.partition("/")
            owner = self._tenants.named(tenant)
            if owner is None or owner is home or (only and only != name):
                continue
            if owner.registry.is_shared(name):
                return owner
        return None

    def shown(self, home: Tenant, owner: Tenant, name: str) -> str:
        """Return ``home``'s name for the adapter that ``owner`` calls ``name``."""
        if owner is home:
            return name
        if not home.registry.knows(name) and self._accepted(home, name) is owner:
            return name
        return f"{owner.name}/{name}"

    def knows(self, home: Tenant, spec: str) -> bool:
        """Whether ``spec`` names an adapter that ``home`` sees."""
        meant = self.meant(home, spec)
        return meant.owner.registry.knows(meant.name)

    def find(
        self, home: Tenant, spec: str, look: Callable[[Registry, str], T]
    ) -> tuple[Tenant, T]:
        """Look ``spec`` up in its owner's registry.

        Args:
            look: called with the owner's registry and the owner's spec.

        Raises:
            AdapterNotFound: with metadata ``did_you_mean`` if there is a similar name that
                ``home`` sees.
            VeneerError: as ``look`` does.
        """
        meant = self.meant(home, spec)
        owner = meant.owner
        unknown = owner is home and not home.registry.knows(meant.name)
        try:
            if unknown and meant.name != meant.spec:
                # Look up the name alone first: it is not found even if the rest of the spec
                # would be invalid.
                home.registry.get(meant.name)
            return owner, look(owner.registry, meant.spec)
        except AdapterNotFound as error:
            if owner is not home:
                raise _renamed(error, meant.name, self.shown(home, owner, meant.name)) from None
            if unknown:
                raise self._missing(home, spec, error) from None
            raise

    def _missing(self, home: Tenant, spec: str, error: AdapterNotFound) -> AdapterNotFound:
        """The error for a name that ``home`` does not know; it suggests a similar name that
        ``home`` sees, if there is one."""
        first, plain = _first(spec), spec.partition("@")[0]
        others = [other for other in self._tenants.all if other is not home]
        called = [
            self.shown(home, other, first)
            for other in others
            if other.registry.is_shared(first) and not home.registry.knows(other.name)
        ]
        if called:
            return not_found(first, min(called) + spec[len(first) :])
        if "did_you_mean" in error.metadata:
            return error
        # The search takes 1 ms per thousand names, on the event loop, and anybody may share
        # many names and ask for unknown ones.
        few = sum(len(other.registry.shared()) for other in others) <= _MOST_NEAR
        shared = self._shared(home) if few else {}
        near = NearNames(shared).nearest(plain, shared) if shared else None
        return error if near is None and plain == first else not_found(plain, near)

    def get(self, home: Tenant, spec: str) -> VisibleAdapter:
        """Return what `Registry.get` returns, with the owner and ``home``'s name."""
        owner, record = self.find(home, spec, lambda registry, named: registry.get(named))
        return VisibleAdapter(owner, record, self.shown(home, owner, record.ref.name))

    def acquire(self, home: Tenant, spec: str, key: str) -> tuple[Tenant, RevisionLease]:
        """Return the owner and the lease from `Registry.acquire`."""
        return self.find(home, spec, lambda registry, named: registry.acquire(named, key))

    def page(
        self,
        home: Tenant,
        *,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: str = "",
        limit: int = 100,
    ) -> list[VisibleAdapter]:
        """As `Registry.list`, for all adapters that ``home`` sees, sorted by its names for
        them."""
        own = home.registry.list(prefix=prefix, labels=labels, after=after, limit=limit)
        found = [VisibleAdapter(home, record, record.ref.name) for record in own]
        names = {record.ref.name for record in own}
        theirs: list[VisibleAdapter] = []
        wanted = (labels or {}).items()
        for name, (owner, called) in sorted(self._shared(home).items()):
            if name <= after or not name.startswith(prefix):
                continue
            if name in names:  # listed above, and deleted since then
                continue
            if len(theirs) == limit:
                break
            with suppress(AdapterNotFound, AdapterCorrupt):  # deleted just now, or damaged
                record = owner.registry.get(called)
                if wanted <= record.labels.items():
                    theirs.append(VisibleAdapter(owner, record, name))
        if not theirs:
            return found
        return sorted(found + theirs, key=lambda seen: seen.name)[:limit]

    def aliases(self, home: Tenant, name: str) -> tuple[AliasRow, ...]:
        """As `Registry.aliases`, for one adapter or for all that ``home`` sees, with its names
        for them."""
        if name:
            owner, rows = self.find(home, name, lambda registry, named: registry.aliases(named))
            return tuple(self._called(home, owner, rows))
        found = list(home.registry.aliases())
        own = {row.name for row in found}
        for shared, (owner, called) in self._shared(home).items():
            if shared in own:  # listed above, and deleted since then
                continue
            with suppress(AdapterNotFound):  # deleted just now
                found += [replace(row, name=shared) for row in owner.registry.aliases(called)]
        return tuple(sorted(found, key=lambda row: (row.name, row.alias)))

    def _called(
        self, home: Tenant, owner: Tenant, rows: tuple[AliasRow, ...]
    ) -> Iterator[AliasRow]:
        for row in rows:
            yield replace(row, name=self.shown(home, owner, row.name))

    def check_own(self, home: Tenant, spec: str) -> None:
        """Raise PermissionDenied if ``spec``, used by ``home``, means another tenant's
        adapter."""
        meant = self.meant(home, spec)
        if meant.owner is not home:
            raise PermissionDenied(
                f"adapter {meant.name!r} belongs to tenant {meant.owner.name!r}, which shares "
                "it: you can use it, but only that tenant can change it",
                metadata={
                    "adapter": meant.name,
                    "tenant": meant.owner.name,
                    "cause": "tenant",
                },
            )

    def _shared(self, home: Tenant) -> dict[str, tuple[Tenant, str]]:
        """The adapters that other tenants share: ``home``'s name -> owner, and the owner's
        name. Left out are adapters whose name would begin with one of ``home``'s own adapter
        names: they cannot be called."""
        found: dict[str, tuple[Tenant, str]] = {}
        for other in self._tenants.all:
            if other is home:
                continue
            hidden = home.registry.knows(other.name)
            for name in other.registry.shared():
                shown = self.shown(home, other, name)
                if not hidden or shown == name:
                    found[shown] = other, name
        return found


def _first(spec: str) -> str:
    """The part of a spec before the first ``@`` or ``/``."""
    found = _FIRST.match(spec)
    return "" if found is None else found[0]


def _renamed(error: AdapterNotFound, name: str, shown: str) -> AdapterNotFound:
    """An error of the owner's registry, with the calling tenant's name for the adapter."""
    metadata = {
        key: shown + value[len(name) :] if _first(value) == name else value
        for key, value in error.metadata.items()
    }
    message = error.message.replace(repr(name), repr(shown))
    return AdapterNotFound(message, metadata=metadata)
