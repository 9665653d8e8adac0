"""Makes catalog, store and index agree, between opening the folder and serving from it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from typing import Final

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.catalog import Catalog
from veneer_registry.entry import Entry
from veneer_registry.errors import VeneerError
from veneer_registry.format import check_fit
from veneer_registry.index import Index
from veneer_registry.manifest_json import manifest_from_json
from veneer_registry.pairing import Sides, check_vanished
from veneer_registry.rows import NameRow, Who
from veneer_registry.store import Store
from veneer_registry.strict_json import canonical_json
from veneer_registry.training_manifest import check_base

_log = logging.getLogger(__name__)

_NONE: Final[frozenset[str]] = frozenset()
"""Shared by all names, since an empty set takes 200 bytes."""
_SHOWN: Final = 20
"""Most adapters that a log line names."""


def base_identity(base: BaseSpec) -> str:
    """Return a digest of what decides whether an adapter checked earlier still fits a base."""
    facts: dict[str, object] = {
        "weights": base.fingerprint.weights,
        "tokenizer": base.fingerprint.tokenizer,
        "layers": base.num_layers,
        "shapes": {name: list(shape) for name, shape in base.shapes.items()},
    }
    if base.origin and base.require_same_weights:
        facts["same_weights"] = True
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def recover(
    store: Store,
    catalog: Catalog,
    index: Index,
    base: BaseSpec,
    sides: Sides,
    time: float,
) -> None:
    """Fill the index, and make disk and catalog agree without losing anything.

    A revision whose content is gone keeps its row, name, labels and aliases, and is refused
    with DATA_LOSS until a start finds the content again. A revision with a damaged row is
    refused too. Intact content that no row names moves to quarantine, unless rows are damaged.

    Raises:
        StoreMismatch: the catalog has lost rows that it must have had.
    """
    base_id = base_identity(base)
    catalog.restore_labels()
    weights, revisions = store.present()
    quarantined = catalog.quarantined()
    index.set_quarantined(quarantined)
    entries: dict[str, Entry] = {}
    damaged: dict[str, int] = {}
    foreign = unchecked = 0
    for row in catalog.names():
        if row.damaged:
            damaged[row.name] = row.damaged
        if not row.name:
            continue
        entry = entry_of(row, base_id)
        entries[row.name] = entry
        if entry.foreign:
            unchecked += any(base == "" for _, _, base in row.revisions)
            foreign += entry.current is not None and entry.current.revision in entry.foreign
    if unchecked:
        _check_recovered(store, catalog, entries, base, base_id, time)
    if foreign:
        _log.warning(
            "%d adapters were registered for another base and are refused here; push them "
            "again, or start the server with their base",
            foreign,
        )
    index.load(entries, damaged)
    named = (index.weights(), index.revisions())
    unnamed = (weights - named[0], revisions - named[1])
    _find_lost(store, index, named[0] - weights - quarantined.keys(), named[1] - revisions)
    if damaged:
        _log.error(
            "%d rows of the catalog, about %s, are damaged: these adapters are refused, all "
            "others are served; stop the server and run `veneer-server store recover`",
            sum(damaged.values()),
            ", ".join(sorted(damaged.keys() - {""})[:_SHOWN]) or "unknown adapters",
        )
    elif any(unnamed):
        check_vanished(sides, catalog, unnamed[1])
        store.quarantine.set_aside(*unnamed)
        _log.warning(
            "moved %d unreferenced weights and %d revisions (from an interrupted publish or "
            "delete) to %s; push them again to use them, or let the quarantine limits remove "
            "them",
            len(unnamed[0]),
            len(unnamed[1]),
            store.quarantine.place,
        )


def entry_of(row: NameRow, base_id: str) -> Entry:
    """Build a name's entry for the index."""
    refs = tuple(
        [AdapterRef(row.name, revision, digest) for revision, digest, _ in row.revisions]
    )
    current = None
    foreign = _NONE
    for ref, (_, _, base) in zip(refs, row.revisions, strict=True):
        if ref.revision == row.current:
            current = ref
        if base != base_id:
            foreign |= {ref.revision}
    return Entry(current, refs, row.generation, foreign, row.retain, row.aliases, row.shared)


def _find_lost(
    store: Store, index: Index, gone_weights: set[str], gone_revisions: set[str]
) -> None:
    """Bring content that a row names back from quarantine (it is there if an earlier start had
    another catalog), and mark named content that cannot be found as lost in the index."""
    if not gone_weights and not gone_revisions:
        return
    back = store.quarantine.bring_back(gone_weights, gone_revisions)
    if back:
        _log.warning("moved %d folders back from quarantine because adapters use them", back)
        weights, revisions = store.present()
        gone_weights, gone_revisions = gone_weights - weights, gone_revisions - revisions
    index.set_lost(gone_weights | gone_revisions)
    lost = index.lost_adapters()
    for ref in lost[:_SHOWN]:
        _log.warning(
            "adapter %s: its content is missing from the disk; it is refused until the "
            "content is back at a restart, or it is pushed again",
            ref.short,
        )
    if len(lost) > _SHOWN:
        _log.warning("... and %d more with missing content", len(lost) - _SHOWN)


def _check_recovered(
    store: Store,
    catalog: Catalog,
    entries: dict[str, Entry],
    base: BaseSpec,
    base_id: str,
    time: float,
) -> None:
    """Check against this base the revisions that `store recover` found without a registration,
    since they have not been checked yet."""
    for name, entry in entries.items():
        for ref in entry.revisions:
            if ref.revision not in entry.foreign:
                continue
            try:
                row = catalog.revision(name, ref.revision)
                if row is None or row.base:
                    continue
                check_fit(store.weights_folder(ref.weights_digest), base)
                manifest = manifest_from_json(row.manifest)
                check_base(manifest.base_fingerprint, base, manifest.base_name)
            except (VeneerError, OSError, ValueError) as error:
                _log.warning(
                    "recovered adapter %s does not fit this base: %s", ref.short, error
                )
                continue
            with catalog.change(Who(), time) as change:
                change.set_base(row, base_id)
            entry = dataclasses.replace(entry, foreign=entry.foreign - {ref.revision})
            entries[name] = entry
