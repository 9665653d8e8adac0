"""Opens a data folder; if its parts do not belong together, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from veneer_registry.adapter import BaseSpec
from veneer_registry.catalog import Catalog
from veneer_registry.core import Core, ReadAdapter
from veneer_registry.disk import make_private
from veneer_registry.index import Index
from veneer_registry.lock import OwnerLock
from veneer_registry.pairing import ChangeMark, check_catalog, check_pair, settle_id, survey
from veneer_registry.recovery import base_identity, recover
from veneer_registry.store import Store

__all__ = ["open_core"]


def open_core(
    data_dir: Path,
    base: BaseSpec,
    lock: OwnerLock,
    retain: int,
    clock: Callable[[], float],
    read: ReadAdapter,
) -> Core:
    """Open the parts of a data folder; the caller holds its lock. Raises as `Registry.open`."""
    root = data_dir / "store"
    make_private(data_dir, _owned(data_dir))
    found = survey(root)
    check_catalog(data_dir, found)
    mark = ChangeMark(root)
    catalog = Catalog(data_dir / "catalog.sqlite", after_change=mark.write)
    try:
        # Create and move nothing until we know that both sides belong together.
        check_pair(data_dir, found, catalog)
        store = Store(root)
        settle_id(root, found, catalog)
        index = Index(base.name)
        recover(store, catalog, index, base, data_dir, clock())
    except BaseException:
        catalog.close()
        mark.close()
        raise
    return Core(
        lock=lock,
        store=store,
        mark=mark,
        catalog=catalog,
        index=index,
        base=base,
        base_id=base_identity(base),
        retain=retain,
        clock=clock,
        read=read,
    )


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
