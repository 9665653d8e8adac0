"""``veneer-server store recover``: rebuilds the catalog from what can still be read of the old
one, and from the stored adapters.

The old catalog is only read. The new one is built beside it under another name, and renamed to
`pairing.REBUILT` once it is whole and durable. Only then are the old files moved aside and the
new one put in their place. If interrupted before that rename, a second run starts over; after
it, a second run finishes the swap. In between a server refuses to start.

A name's current revision is the one in the old catalog, if its row can be read. It is the one
created last if the row cannot be read, or if the catalog has lost changes and that revision is
only in the store.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from veneer_registry import registration
from veneer_registry.catalog import Catalog
from veneer_registry.changes import Change
from veneer_registry.disk import make_private, sync
from veneer_registry.errors import InvalidField, StoreMismatch, VeneerError
from veneer_registry.format import read_adapter
from veneer_registry.lock import OwnerLock
from veneer_registry.manifest_json import manifest_to_json
from veneer_registry.pairing import REBUILT, STORE_FACT, check_own, settle_id, survey, write_id
from veneer_registry.rows import RevisionRow
from veneer_registry.salvage import Salvaged, salvage
from veneer_registry.store import Store
from veneer_registry.store_folders import size_of
from veneer_registry.upkeep import COMMAND, check_revision, check_weights

_log = logging.getLogger(__name__)

_CATALOG: Final = "catalog.sqlite"
_BUILDING: Final = "catalog.sqlite.rebuilding"
_FILES: Final = ("", "-wal", "-shm", "-journal")
_NAMELESS: Final = "recovered-"


@dataclass(slots=True)
class Recovered:
    """What `recover` did.

    Attributes:
        changed: a new catalog is in place; otherwise the old one is intact and stays.
        names, revisions: how many the new catalog has.
        current: name -> its current revision; only for names whose revisions differ from the
            old catalog's.
        from_store: ``name@revision`` that was missing or damaged in the old catalog.
        nameless: new names (``recovered-...``) of those in `from_store` whose name is unknown.
        missing: ``name@revision`` whose content is not in the store; refused until it is back.
        damaged: weights digest or revision -> why; weights are quarantined.
        lost_rows: number of rows of the old catalog that could not be read.
        aliases, history: how many aliases and history lines were kept.
        aside: where the old catalog was moved, if there was one.
    """

    changed: bool = False
    names: int = 0
    revisions: int = 0
    current: dict[str, str] = field(default_factory=dict)
    from_store: list[str] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    lost_rows: int = 0
    aliases: int = 0
    history: int = 0
    aside: str = ""


def recover(
    data_dir: Path, progress: Callable[[int, int], None] = lambda at, of: None
) -> Recovered:
    """Rebuild the catalog of a folder that no server owns; see the module docstring.

    Args:
        progress: called after each stored revision with the number done and the total.

    Raises:
        StoreLocked: a server owns the folder.
        InvalidField: ``data_dir`` is not a data folder.
        StoreMismatch: the store is missing or empty, so there is nothing to recover from.
    """
    check_own(data_dir)
    if not data_dir.is_dir() or not (
        (data_dir / "store").exists() or (data_dir / _CATALOG).exists()
    ):
        raise InvalidField(
            f"{data_dir} is not a data folder; give the one of a server with --data-dir",
            metadata={"field": "data_dir"},
        )
    with OwnerLock(data_dir):
        make_private(data_dir, [data_dir])
        return _Recovery(data_dir, progress).run()


class _Recovery:
    def __init__(self, data_dir: Path, progress: Callable[[int, int], None]) -> None:
        self._data_dir = data_dir
        self._progress = progress
        self._found = Recovered()
        self._survey = survey(data_dir / "store")
        self._ended: set[str] = set()

    def run(self) -> Recovered:
        if (self._data_dir / REBUILT).exists():
            return self._finish()
        if not self._survey.content:
            raise StoreMismatch(
                f"{self._data_dir / 'store'} contains no adapters, so there is nothing to "
                "recover from; nothing was changed. Mount or restore it and start the "
                "server. To start afresh instead, move catalog.sqlite* out of "
                f"{self._data_dir}",
                metadata={"found": "store empty", "fix": "mount the store"},
            )
        old = salvage(self._data_dir / _CATALOG, self._survey)
        self._ended = {revision for _, revision in old.ended}
        store = Store(self._data_dir / "store")
        rows = self._rows(store, old)
        if not self._differs(old, rows):
            self._count(old.rows)
            return self._found
        self._build(old, rows)
        recovered = self._finish()
        for digest in self._found.damaged:
            if any(row.weights == digest for row in rows.values()):
                store.quarantine.add(digest)
        return recovered

    def _count(self, rows: dict[tuple[str, str], RevisionRow]) -> None:
        self._found.names = len({name for name, _ in rows})
        self._found.revisions = len(rows)

    # ---------------------------------------------------------------- finding the rows

    def _rows(self, store: Store, old: Salvaged) -> dict[tuple[str, str], RevisionRow]:
        """(name, revision) -> row, from the old catalog and then from the store."""
        rows = dict(old.rows)
        weights, revisions = store.present()
        sound: dict[str, str | None] = {}
        for at, revision in enumerate(sorted(revisions), 1):
            for row in self._registered(store, old, revision):
                rows.setdefault((row.name, revision), row)
            self._progress(at, len(revisions))
        for row in rows.values():
            spec = f"{row.name}@{row.revision[:12]}"
            if row.weights in old.quarantined:
                continue
            if row.revision not in revisions or row.weights not in weights:
                self._found.missing.append(spec)
                continue
            if row.weights not in sound:
                sound[row.weights] = check_weights(
                    store.weights_folder(row.weights), row.weights
                )
            for digest, why in (
                (row.weights, sound[row.weights]),
                (
                    row.revision,
                    check_revision(store.revision_folder(row.revision), row.revision),
                ),
            ):
                if why is not None:
                    self._found.damaged[digest] = why
        return rows

    def _registered(self, store: Store, old: Salvaged, revision: str) -> Iterator[RevisionRow]:
        known = {name for name, other in old.rows if other == revision}
        read = 0
        for path in store.registrations(revision):
            try:
                row = registration.read(path.read_bytes())
                if row.revision != revision or path.name != registration.file_name(row.name):
                    raise ValueError("it belongs to another revision")
            except (OSError, ValueError) as error:
                _log.warning("skipped %s: %s", path, error)
                continue
            read += 1
            if row.name not in known and old.misses(row.name, revision):
                self._found.from_store.append(f"{row.name}@{revision[:12]}")
                yield row
        if not known and not read and not old.healthy and revision not in self._ended:
            nameless = self._nameless(store, revision)
            if nameless is not None:
                yield nameless

    def _nameless(self, store: Store, revision: str) -> RevisionRow | None:
        """Make a row for a revision without a readable registration: that is damaged, or an
        older Veneer stored the revision. None if the content is damaged too."""
        folder = store.revision_folder(revision)
        why = check_revision(folder, revision)
        if why is not None:
            self._found.damaged[revision] = why
            return None
        bundle = store.bundle(revision)
        staged = store.new_staging()
        try:
            store.link_all(bundle, staged)
            manifest = read_adapter(staged, None)
            if manifest.weights_digest != bundle.weights:
                raise ValueError(f"its weights have digest {manifest.weights_digest[:12]}")
        except (VeneerError, OSError, ValueError) as error:
            self._found.damaged[revision] = str(error)
            return None
        finally:
            store.drop_staging(staged)
        name = f"{_NAMELESS}{revision[:12]}"
        self._found.from_store.append(f"{name}@{revision[:12]}")
        self._found.nameless.append(name)
        weights = store.weights_folder(bundle.weights)
        return RevisionRow(
            name=name,
            revision=revision,
            weights=bundle.weights,
            base="",
            manifest=manifest_to_json(manifest),
            created=folder.stat().st_mtime,
            labels={},
            bytes=size_of(weights),
        )

    def _differs(self, old: Salvaged, rows: dict[tuple[str, str], RevisionRow]) -> bool:
        return not old.healthy or rows.keys() != old.rows.keys()

    # ----------------------------------------------------------------- the new catalog

    def _build(self, old: Salvaged, rows: dict[tuple[str, str], RevisionRow]) -> None:
        building = self._data_dir / _BUILDING
        for suffix in _FILES:
            Path(f"{building}{suffix}").unlink(missing_ok=True)
        catalog = Catalog(building)
        try:
            with catalog.change(COMMAND, time.time()) as change:
                self._fill(change, old, rows)
            catalog.set_residents(old.residents)
            if self._survey.id is not None:
                with catalog.change() as change:
                    change.set_fact(STORE_FACT, self._survey.id)
            least = max(old.number, self._survey.changes or 0)
            with catalog.change() as change:
                change.raise_counter(least)
        finally:
            catalog.close()  # merges the write-ahead log into the file
        sync(building)
        building.rename(self._data_dir / REBUILT)
        sync(self._data_dir)

    def _fill(
        self, change: Change, old: Salvaged, rows: dict[tuple[str, str], RevisionRow]
    ) -> None:
        for line in old.history:
            change.add_line(line)
        by_name: dict[str, list[RevisionRow]] = {}
        for row in sorted(rows.values(), key=lambda row: (old.sequence(row), row.created)):
            by_name.setdefault(row.name, []).append(row)
        top = max([old.number, self._survey.changes or 0, *old.sequences.values()])
        for name, kept in sorted(by_name.items()):
            current = self._current(old, name, kept)
            state = old.names.get(name)
            kept_as_is = (
                state is not None
                and state.current == current
                and all((name, row.revision) in old.rows for row in kept)
            )
            if not kept_as_is:
                change.note("recovered", name, current, f"{len(kept)} revisions")
                self._found.current[name] = current
            generation = state.generation if state is not None and kept_as_is else top + 1
            change.put_name(name, current, generation, None if state is None else state.retain)
            if state is not None and state.shared:
                change.share(name)
            for place, row in enumerate(kept):
                change.put_revision(row, place + 1)
        known = {name: {row.revision for row in kept} for name, kept in by_name.items()}
        for alias in old.aliases:
            meant = {revision for revision, _ in alias.targets}
            if meant and meant <= known.get(alias.name, set()):
                before = {revision for revision, _ in alias.previous}
                previous = alias.previous if before <= known[alias.name] else ()
                change.set_alias(dataclasses.replace(alias, previous=previous))
                self._found.aliases += 1
        for digest, why in {**old.quarantined, **self._bad_weights(rows)}.items():
            change.quarantine(digest, why)
        change.raise_counter(top + 1)
        self._found.history = len(old.history)
        self._found.lost_rows = old.damaged

    def _bad_weights(self, rows: dict[tuple[str, str], RevisionRow]) -> dict[str, str]:
        used = {row.weights for row in rows.values()}
        return {d: why for d, why in self._found.damaged.items() if d in used}

    @staticmethod
    def _current(old: Salvaged, name: str, kept: list[RevisionRow]) -> str:
        newest = max(kept, key=lambda row: (row.created, row.revision))
        state = old.names.get(name)
        said = None if state is None else state.current
        if said is None or said not in {row.revision for row in kept}:
            return newest.revision
        if old.behind and (name, newest.revision) not in old.rows:
            return newest.revision
        return said

    # ------------------------------------------------------------------------ the swap

    def _finish(self) -> Recovered:
        """Move the old catalog aside and put the new one in its place. Idempotent."""
        rebuilt, path = self._data_dir / REBUILT, self._data_dir / _CATALOG
        # Named after the new catalog's time, so that a second run uses the same name.
        seconds, rest = divmod(rebuilt.stat().st_mtime_ns, 10**9)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
        aside = path.with_name(f"{_CATALOG}.before-recovery-{stamp}.{rest // 10**6:03}Z")
        for suffix in _FILES:
            old = Path(f"{path}{suffix}")
            if old.exists():
                old.rename(f"{aside}{suffix}")
        sync(self._data_dir)
        rebuilt.rename(path)
        sync(self._data_dir)
        catalog = Catalog(path)
        try:
            settle_id(partial(write_id, self._data_dir / "store"), self._survey, catalog)
            names = [row for row in catalog.names() if row.name]
        finally:
            catalog.close()
        self._found.changed = True
        self._found.names = len(names)
        self._found.revisions = sum(len(row.revisions) for row in names)
        self._found.aside = str(aside) if aside.exists() else ""
        return self._found
