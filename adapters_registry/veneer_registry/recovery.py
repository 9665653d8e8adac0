"""What happens between opening the folder and serving from it."""

from __future__ import annotations

import hashlib
import logging
from typing import Final

from veneer_registry.adapter import AdapterRef, BaseSpec
from veneer_registry.catalog import Catalog
from veneer_registry.entry import Entry
from veneer_registry.index import Index
from veneer_registry.rows import NameRow, Who
from veneer_registry.store import Store
from veneer_registry.strict_json import canonical_json

__all__ = ["base_identity", "recover"]

_log = logging.getLogger(__name__)

_NONE: Final[frozenset[str]] = frozenset()
"""One for all names: an empty set takes 200 bytes."""


def base_identity(base: BaseSpec) -> str:
    """What of a base decides whether an adapter that was checked once still fits."""
    facts = {
        "weights": base.fingerprint.weights,
        "tokenizer": base.fingerprint.tokenizer,
        "layers": base.num_layers,
        "shapes": {name: list(shape) for name, shape in base.shapes.items()},
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def recover(store: Store, catalog: Catalog, index: Index, base_id: str, time: float) -> None:
    """Make disk, catalog and index agree.

    Catalogued revisions whose content is gone are dropped with a warning; a name
    that loses its current one stays without, since an older revision in its place
    would be a silent change. Content that no row refers to (a publish was cut
    short) is removed.
    """
    weights, revisions = store.present()
    quarantined = catalog.quarantined()
    index.set_quarantined(quarantined)
    entries: dict[str, Entry] = {}
    foreign = 0
    # What is in quarantine lies elsewhere, and waits to be pushed again.
    known = weights | quarantined.keys()
    for row in catalog.names():
        entry = _check(row, known, revisions, catalog, base_id, time)
        if entry is None:
            continue
        entries[row.name] = entry
        foreign += entry.current is not None and entry.current.revision in entry.foreign
    if foreign:
        _log.warning(
            "%d adapters were registered for another base and are refused here; push them "
            "again, or start the server with their own base",
            foreign,
        )
    index.load(entries)
    digests = {digest for digest in weights if not index.referenced(digest)}
    bundles = {revision for revision in revisions if not index.referenced(revision)}
    if digests or bundles:
        _log.warning(
            "removing %d weights and %d revisions that no name refers to",
            len(digests),
            len(bundles),
        )
        store.drop_staging(store.discard(digests, bundles))


def _check(
    row: NameRow,
    weights: set[str],
    revisions: set[str],
    catalog: Catalog,
    base_id: str,
    time: float,
) -> Entry | None:
    kept = tuple(
        [
            AdapterRef(row.name, revision, digest)
            for revision, digest, _ in row.revisions
            if revision in revisions and digest in weights
        ]
    )
    lost = []
    if len(kept) < len(row.revisions):
        held = {ref.revision for ref in kept}
        lost = [revision for revision, _, _ in row.revisions if revision not in held]
    for revision in lost:
        _log.warning(
            "adapter %s@%s: its content is gone from the disk; push it again",
            row.name,
            revision[:12],
        )
    generation = row.generation
    if lost:
        with catalog.change(Who(), time) as change:
            for revision in lost:
                change.note("lost", row.name, revision, "its content was gone at start")
            if kept:
                change.delete_revisions(row.name, lost)
            else:
                change.delete_name(row.name)
        generation = change.number
    if not kept:
        return None
    current = None
    for ref in kept:
        if ref.revision == row.current:
            current = ref
    strange = [r for r, _, base in row.revisions if base != base_id and r not in lost]
    foreign = frozenset(strange) if strange else _NONE
    return Entry(current, kept, generation, foreign, row.retain, row.aliases)
