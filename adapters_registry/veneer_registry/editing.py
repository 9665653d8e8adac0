"""Changes to registered names and revisions, except aliases: labels, retention, sharing, the
current revision, deletion, quarantine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from veneer_registry.adapter import AdapterRef
from veneer_registry.core import Part, check_etag
from veneer_registry.entry import Entry, split_spec
from veneer_registry.errors import (
    AdapterInUse,
    AdapterNotFound,
    FailedPrecondition,
    InvalidField,
)
from veneer_registry.records import AdapterRecord
from veneer_registry.rows import SERVER, AliasRow, Who
from veneer_registry.upload import check_labels

_log = logging.getLogger(__name__)

_MOST_RETAIN: Final = 1000


class Editing(Part):
    """Changes to revisions and names. Each is one transaction, then one swap in the index."""

    def update(
        self,
        spec: str,
        *,
        labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        retain: int | None = None,
        current: bool = False,
        shared: bool | None = None,
        etag: str = "",
        who: Who = SERVER,
    ) -> tuple[AdapterRecord, tuple[AdapterRef, ...]]:
        """Change a revision's labels, or settings of its name; all or nothing.

        Args:
            labels, remove_labels: labels to set, and labels to remove.
            retain: how many superseded revisions the name keeps; others are dropped at once.
            current: make this revision the current one.
            shared: whether other tenants of the server may use the name.
            etag: if not empty, the name's etag must equal it.

        Returns:
            The updated revision, and the revisions that the name no longer keeps.
        """
        if retain is not None and not 0 <= retain <= _MOST_RETAIN:
            raise InvalidField(
                f"retain is {retain}; 0 to {_MOST_RETAIN} superseded revisions can be kept",
                metadata={"field": "retain"},
            )
        core = self._core
        with core.changes:
            found = core.index.find(spec)
            ref, entry = found.ref, found.entry
            check_etag(ref.name, entry, etag)
            row = core.catalog.revision(ref.name, ref.revision)
            if row is None:
                raise AdapterNotFound(
                    f"adapter {ref.short} has just been deleted",
                    metadata={"adapter": ref.name, "cause": "deleted"},
                )
            wanted = {**row.labels, **(labels or {})}
            for key in remove_labels:
                wanted.pop(key, None)
            check_labels(wanted)
            relabelled = wanted != dict(row.labels)
            retained = retain is not None and retain != entry.retain
            moved = current and ref != entry.current
            opened = shared is not None and shared != entry.shared
            if moved:
                self._check_base(entry, ref)
            if not (relabelled or retained or moved or opened):
                return core.record(row), ()
            with core.change(who) as change:
                if relabelled:
                    change.set_labels(ref.name, ref.revision, wanted)
                    change.note("labels", ref.name, ref.revision, _label_words(wanted))
                if retained and retain is not None:
                    change.set_retain(ref.name, retain)
                    change.note("retention", ref.name, detail=str(retain))
                if opened:
                    change.set_shared(ref.name, bool(shared))
                    change.note("shared" if shared else "unshared", ref.name)
                if moved:
                    change.make_current(ref.name, ref.revision)
                    was = "" if entry.current is None else f"before: {entry.current.revision}"
                    change.note("made_current", ref.name, ref.revision, was)
            entry = dataclasses.replace(
                entry,
                current=ref if moved else entry.current,
                generation=change.number,
                retain=retain if retained else entry.retain,
                shared=bool(shared) if opened else entry.shared,
            )
            dropped = entry.beyond(core.retain) if retained else ()
            gone = tuple(other.revision for other in dropped)
            entry = dataclasses.replace(
                entry, revisions=entry.without(gone), foreign=entry.foreign - set(gone)
            )
            core.index.put(ref.name, entry)
            if dropped:
                core.drop_superseded(ref.name, entry, dropped)
            after = core.catalog.revision(ref.name, ref.revision)
            if relabelled and after is not None:
                core.register(after)
            record = core.record(row if after is None else after)
        core.sweep_quietly()
        return record, dropped

    def _check_base(self, entry: Entry, ref: AdapterRef) -> None:
        if ref.revision in entry.foreign:
            raise FailedPrecondition(
                f"{ref.short} was registered for another base: push it again first",
                metadata={"adapter": ref.short},
            )

    def delete(
        self,
        spec: str,
        etag: str | None = None,
        who: Who = SERVER,
        *,
        unless_leased: bool = False,
    ) -> tuple[str, ...]:
        """Forget a name with all its revisions and aliases, or one ``name@revision``.

        Running requests keep what they lease. Returns the revisions, newest first.

        Raises:
            AdapterNotFound: the name or revision does not exist.
            EtagMismatch: ``etag`` is given and is not the name's.
            FailedPrecondition: ``name@revision`` is current and others are kept (the name
                would silently refer to an older one), or is a target of an alias.
            AdapterInUse: ``unless_leased`` is set, and requests use it.
        """
        plain, mark, _ = split_spec(spec)
        if mark == "/":
            raise InvalidField(
                f"{spec[:80]!r} is an alias: remove it with `SetAlias`, or delete a revision",
                metadata={"field": "name"},
            )
        core = self._core
        targets: tuple[AdapterRef, ...]
        with core.changes:
            if mark:
                found = core.index.find(spec)
                entry, targets = found.entry, (found.ref,)
            else:
                entry = core.index.find_entry(plain)
                targets = entry.revisions
            check_etag(plain, entry, etag or "")
            gone = tuple(ref.revision for ref in targets)
            left = entry.without(gone)
            if left:
                self._check_unneeded(plain, entry, targets[0])
            leases = sum(core.index.leases(revision) for revision in gone)
            if unless_leased and leases:
                raise AdapterInUse(
                    f"adapter {spec} is used by {leases} request(s); wait, or delete with "
                    "`mode` drain or abort",
                    metadata={"leases": str(leases)},
                )
            aliases = tuple(_forgetting(alias, gone) for alias in entry.aliases)
            if not left:  # revisions in damaged rows go too, and must not come back
                gone += tuple(sorted(core.catalog.revisions_of(plain) - set(gone)))
            with core.change(who) as change:
                for revision in gone:
                    change.note("deleted", plain, revision)
                if left:
                    change.delete_revisions(plain, gone)
                    for alias, changed in zip(entry.aliases, aliases, strict=True):
                        if changed is not alias:
                            change.set_alias(changed)
                else:
                    change.delete_name(plain)
            if left:
                kept = dataclasses.replace(
                    entry,
                    revisions=left,
                    generation=change.number,
                    foreign=entry.foreign - set(gone),
                    aliases=aliases,
                )
                core.index.put(plain, kept)
            else:
                core.index.remove(plain)
                core.index.set_damaged(plain, 0)
            core.unregister(plain, gone)
        core.sweep_quietly()
        return gone

    def _check_unneeded(self, name: str, entry: Entry, ref: AdapterRef) -> None:
        if entry.current == ref:
            raise FailedPrecondition(
                f"{ref.short} is the current revision of {name!r}; push another revision "
                f"first, or delete {name!r} with all its revisions",
                metadata={"adapter": name, "cause": "current"},
            )
        if aliases := entry.aliases_of(ref.revision):
            raise FailedPrecondition(
                f"{ref.short} is a target of alias {name}/{aliases[0]}; move the alias first",
                metadata={"adapter": name, "alias": f"{name}/{aliases[0]}"},
            )

    def quarantine(
        self, weights_digest: str, why: str, who: Who = SERVER
    ) -> tuple[AdapterRef, ...]:
        """Stop serving damaged weights until they are pushed again.

        Returns the revisions that have them; empty if there are none, if the weights were in
        quarantine already, or if an intact copy replaced them.
        """
        core = self._core
        # Not under the lock: the store may be slow. If others have changed the catalog
        # meanwhile, one of them may have repaired the weights, so it is tried again.
        known = core.catalog.number
        if self._to_quarantine(weights_digest) and core.store.heal(weights_digest):
            _log.warning("weights %s were damaged here; fetched again", weights_digest[:12])
            return ()
        with core.changes:
            holding = self._to_quarantine(weights_digest)
            if not holding or (
                core.catalog.number != known and core.store.heal(weights_digest)
            ):
                return ()
            with core.change(who) as change:
                change.quarantine(weights_digest, why)
                for ref in holding:
                    change.note("quarantined", ref.name, ref.revision, why)
            core.index.set_quarantined(core.catalog.quarantined())
            try:
                core.store.quarantine.add(weights_digest)
            except OSError as error:  # not served, even if it cannot be moved
                _log.warning(
                    "damaged weights %s stay where they are: %s", weights_digest[:12], error
                )
        return holding

    def _to_quarantine(self, weights_digest: str) -> tuple[AdapterRef, ...]:
        """The revisions that have these weights; none if they are in quarantine already."""
        if self._core.index.quarantined(weights_digest) is not None:
            return ()
        return self._core.index.holding(weights_digest)


def _forgetting(alias: AliasRow, gone: Sequence[str]) -> AliasRow:
    """Return the alias. If a previous target is among ``gone``, it can no longer roll back."""
    if any(revision in gone for revision, _ in alias.previous):
        return dataclasses.replace(alias, previous=())
    return alias


def _label_words(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
