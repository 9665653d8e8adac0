"""Opens a registry's catalog and store; if they do not belong together, nothing is changed.

Where they are kept is a `Locations`: a data folder (`FolderLocations`), or PostgreSQL and an
object store (`shared.locations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from veneer_registry.adapter import BaseSpec
from veneer_registry.catalog import Catalog
from veneer_registry.core import Core, ReadAdapter
from veneer_registry.disk import make_private
from veneer_registry.following import follow_changes
from veneer_registry.freshness import Freshness, Owned
from veneer_registry.index import Index
from veneer_registry.lock import OwnerLock
from veneer_registry.pairing import (
    ChangeMark,
    Sides,
    Survey,
    check_catalog,
    check_pair,
    settle_id,
    survey,
    write_id,
)
from veneer_registry.recovery import base_identity, recover
from veneer_registry.store import Store


class Locations(Protocol):
    """Where a registry keeps its catalog and its content. Used once."""

    @property
    def sides(self) -> Sides:
        """How errors name the catalog and the store."""

    def open_catalog(self) -> Catalog:
        """Open or make the catalog. Refuses to make one beside stored content."""

    def survey(self) -> Survey:
        """Survey the store without changing it."""

    def open_store(self) -> Store:
        """Open or make the store."""

    def write_id(self, data: bytes) -> None:
        """Replace the store's id."""

    @property
    def freshness(self) -> Freshness:
        """How current the catalog is. Called after `open_catalog`."""

    def close(self) -> None:
        """Close everything except the catalog and the store. Idempotent."""


class FolderLocations:
    """A data folder: ``catalog.sqlite`` and ``store/``. The caller holds its lock."""

    freshness: Final[Freshness] = Owned()

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._root = data_dir / "store"
        self._mark = ChangeMark(self._root)
        self.sides = Sides.of_folder(data_dir)

    def open_catalog(self) -> Catalog:
        """See `Locations`. Raises StoreMismatch, CatalogDamaged, InvalidField."""
        make_private(self._data_dir, _owned(self._data_dir))
        check_catalog(self._data_dir, self.survey())
        return Catalog(self._data_dir / "catalog.sqlite", after_change=self._mark.write)

    def survey(self) -> Survey:
        """See `Locations`."""
        return survey(self._root)

    def open_store(self) -> Store:
        """See `Locations`."""
        return Store(self._root)

    def write_id(self, data: bytes) -> None:
        """See `Locations`."""
        write_id(self._root, data)

    def close(self) -> None:
        """See `Locations`."""
        self._mark.close()


def open_core(
    places: Locations,
    base: BaseSpec,
    lock: OwnerLock,
    retain: int,
    clock: Callable[[], float],
    read: ReadAdapter,
) -> Core:
    """Open the parts of a registry; the caller holds the lock of its folder. Raises as
    `Registry.open`."""
    catalog = places.open_catalog()
    try:
        with catalog.exclusive:
            found = places.survey()
            # Create and move nothing until we know that both sides belong together.
            check_pair(places.sides, found, catalog)
            store = places.open_store()
            settle_id(places.write_id, found, catalog)
            index = Index(base.name)
            recover(store, catalog, index, base, places.sides, clock())
            core = Core(
                lock=lock,
                store=store,
                catalog=catalog,
                index=index,
                base=base,
                base_id=base_identity(base),
                retain=retain,
                clock=clock,
                read=read,
                close=places.close,
                freshness=places.freshness,
            )
            store.keep_while(index.leases, index.is_named)
            catalog.follow(partial(follow_changes, core))
    except BaseException:
        catalog.close()
        places.close()
        raise
    return core


def _owned(data_dir: Path) -> Iterator[Path]:
    """Paths in a data folder that must belong to the server's user, outermost first. Adapters'
    own folders need no check: other users cannot get past these."""
    yield data_dir
    yield data_dir / "LOCK"
    yield from sorted(data_dir.glob("catalog.sqlite*"))
    store = data_dir / "store"
    yield store
    for name in ("weights", "revisions", "staging", "uploads", "quarantine", "id", "changes"):
        yield store / name
