"""Changes of what is registered: aliases, labels, retention, current revision, deletion,
quarantine. Each is one transaction, then one swap in the index."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from veneer_registry.adapter import AdapterRef
from veneer_registry.core import Core, check_etag
from veneer_registry.entry import Entry, by_prefix, check_prefix, short_name, split_spec
from veneer_registry.errors import (
    AdapterInUse,
    AdapterNotFound,
    EtagMismatch,
    FailedPrecondition,
    InvalidField,
)
from veneer_registry.records import AdapterRecord, AliasChange
from veneer_registry.rows import AliasRow, Who
from veneer_registry.upload import check_labels

__all__ = ["Editor"]

_log = logging.getLogger(__name__)

_MOST_WEIGHT: Final = 10_000
_MOST_TARGETS: Final = 16
_MOST_ALIASES: Final = 64
_MOST_RETAIN: Final = 1000

Targets = tuple[tuple[str, int], ...]


class Editor:
    """The registry's changes but for publishing."""

    def __init__(self, core: Core) -> None:
        self._core = core

    # --------------------------------------------------------------------- aliases

    def set_alias(
        self, spec: str, targets: Sequence[tuple[str, int]], etag: str, who: Who
    ) -> AliasChange:
        """See `Registry.set_alias`."""
        name, alias = _parse_alias(spec)
        core = self._core
        with core.changes:
            entry, old = self._alias(name, alias, etag)
            if old is None and len(entry.aliases) >= _MOST_ALIASES:
                raise FailedPrecondition(
                    f"adapter {name!r} has {_MOST_ALIASES} aliases, which is the most; remove "
                    "one",
                    metadata={"adapter": name},
                )
            new = _resolve(name, entry, targets)
            if old is not None and old.targets == new:
                return AliasChange(old, old.targets)  # so that a rollback goes further back
            return self._move(entry, name, alias, old, new, who)

    def rollback_alias(self, spec: str, etag: str, who: Who) -> AliasChange:
        """See `Registry.rollback_alias`."""
        name, alias = _parse_alias(spec)
        with self._core.changes:
            entry, old = self._alias(name, alias, etag)
            if old is None:
                raise AdapterNotFound(
                    f"adapter {name!r} has no alias {alias!r}; set it first",
                    metadata={"adapter": name},
                )
            if not old.previous:
                raise FailedPrecondition(
                    f"alias {spec} never meant anything else: give it a revision",
                    metadata={"alias": spec},
                )
            return self._move(entry, name, alias, old, old.previous, who)

    def remove_alias(self, spec: str, etag: str, who: Who) -> AliasChange:
        """See `Registry.remove_alias`."""
        name, alias = _parse_alias(spec)
        core = self._core
        with core.changes:
            entry, old = self._alias(name, alias, etag)
            if old is None:
                raise AdapterNotFound(
                    f"adapter {name!r} has no alias {alias!r}", metadata={"adapter": name}
                )
            with core.change(who) as change:
                change.remove_alias(name, alias)
                change.note("alias_removed", name, detail=f"{alias}: {_words(old.targets)}")
            rest = tuple(a for a in entry.aliases if a is not old)
            self._put(name, dataclasses.replace(entry, aliases=rest))
            gone = dataclasses.replace(old, targets=(), previous=old.targets)
        core.sweep_quietly()
        return AliasChange(gone, old.targets)

    def _alias(self, name: str, alias: str, etag: str) -> tuple[Entry, AliasRow | None]:
        entry = self._core.index.find_entry(name)
        old = entry.alias(alias)
        now = "" if old is None else str(old.generation)
        if etag and etag != now:
            raise EtagMismatch(
                f"alias {name}/{alias} has etag {now or 'none'}, not {etag[:40]}: it was moved "
                "meanwhile; list the aliases again",
                metadata={"alias": f"{name}/{alias}", "etag": now},
            )
        return entry, old

    def _move(
        self,
        entry: Entry,
        name: str,
        alias: str,
        old: AliasRow | None,
        targets: Targets,
        who: Who,
    ) -> AliasChange:
        core = self._core
        before = () if old is None else old.targets
        with core.change(who) as change:
            row = AliasRow(name, alias, targets, before, change.number, core.clock())
            change.set_alias(row)
            was = f", before: {_words(before)}" if before else ""
            change.note(
                "alias_set", name, targets[0][0], detail=f"{alias}: {_words(targets)}{was}"
            )
        rest = [a for a in entry.aliases if a is not old]
        aliases = tuple(sorted([*rest, row], key=lambda a: a.alias))
        self._put(name, dataclasses.replace(entry, aliases=aliases))
        return AliasChange(row, before)

    # ------------------------------------------------- labels, retention, rollback

    def update(
        self,
        spec: str,
        *,
        labels: Mapping[str, str],
        remove_labels: Sequence[str],
        retain: int | None,
        current: bool,
        etag: str,
        who: Who,
    ) -> tuple[AdapterRecord, tuple[AdapterRef, ...]]:
        """See `Registry.update`."""
        if retain is not None and not 0 <= retain <= _MOST_RETAIN:
            raise InvalidField(
                f"retain is {retain}: 0 to {_MOST_RETAIN} superseded revisions can be kept",
                metadata={"field": "retain"},
            )
        core = self._core
        with core.changes:
            found = core.index.find(spec)
            ref, entry = found.ref, found.entry
            check_etag(ref.name, entry, etag)
            row = core.catalog.revision(ref.name, ref.revision)
            if row is None:
                raise AdapterNotFound(f"adapter {ref.short} was deleted just now")
            wanted = {**row.labels, **labels}
            for key in remove_labels:
                wanted.pop(key, None)
            check_labels(wanted)
            relabelled = wanted != dict(row.labels)
            retained = retain is not None and retain != entry.retain
            moved = current and ref != entry.current
            if moved:
                self._check_base(entry, ref)
            if not (relabelled or retained or moved):
                return core.record(row), ()
            with core.change(who) as change:
                if relabelled:
                    change.set_labels(ref.name, ref.revision, wanted)
                    change.note("labels", ref.name, ref.revision, _label_words(wanted))
                if retained and retain is not None:
                    change.set_retain(ref.name, retain)
                    change.note("retention", ref.name, detail=str(retain))
                if moved:
                    change.make_current(ref.name, ref.revision)
                    was = "" if entry.current is None else f"before: {entry.current.revision}"
                    change.note("made_current", ref.name, ref.revision, was)
            entry = dataclasses.replace(
                entry,
                current=ref if moved else entry.current,
                generation=change.number,
                retain=retain if retained else entry.retain,
            )
            dropped = entry.beyond(core.retain) if retained else ()
            gone = tuple(other.revision for other in dropped)
            entry = dataclasses.replace(
                entry, revisions=entry.without(gone), foreign=entry.foreign - set(gone)
            )
            self._put(ref.name, entry)
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

    # -------------------------------------------------------------------- deletion

    def delete(self, spec: str, etag: str, who: Who, *, unless_leased: bool) -> tuple[str, ...]:
        """See `Registry.delete`."""
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
            check_etag(plain, entry, etag)
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
            if not left:  # those in damaged rows go, too, and must not come back
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
                self._put(plain, kept)
            else:
                core.index.remove(plain)
                core.index.set_damaged(plain, 0)
            core.unregister(plain, gone)
        core.sweep_quietly()
        return gone

    def _check_unneeded(self, name: str, entry: Entry, ref: AdapterRef) -> None:
        if entry.current == ref:
            raise FailedPrecondition(
                f"{ref.short} is what {name!r} means now; push another revision "
                f"first, or delete {name!r} with all of them",
                metadata={"adapter": name},
            )
        if aliases := entry.aliases_of(ref.revision):
            raise FailedPrecondition(
                f"{ref.short} is what alias {name}/{aliases[0]} means; move the alias first",
                metadata={"adapter": name, "alias": f"{name}/{aliases[0]}"},
            )

    # ------------------------------------------------------------------ quarantine

    def quarantine(self, weights: str, why: str, who: Who) -> tuple[AdapterRef, ...]:
        """See `Registry.quarantine`."""
        core = self._core
        with core.changes:
            holding = core.index.holding(weights)
            if not holding or core.index.quarantined(weights) is not None:
                return ()
            with core.change(who) as change:
                change.quarantine(weights, why)
                for ref in holding:
                    change.note("quarantined", ref.name, ref.revision, why)
            core.index.set_quarantined(core.catalog.quarantined())
            try:
                core.store.quarantine.add(weights)
            except OSError as error:  # it is not served, wherever it lies
                _log.warning("damaged weights %s stay where they are: %s", weights[:12], error)
        return holding

    def _put(self, name: str, entry: Entry) -> None:
        self._core.index.put(name, entry)


def _parse_alias(spec: str) -> tuple[str, str]:
    name, mark, alias = split_spec(spec)
    if mark != "/":
        raise InvalidField(
            f"{spec[:80]!r} is not an alias: write it as NAME/ALIAS, for example chat/prod",
            metadata={"field": "alias"},
        )
    short_name(name)
    try:
        short_name(alias)
    except InvalidField as error:
        raise InvalidField(
            f"alias {alias[:80]!r} is not allowed: use 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "starting with a letter or digit",
            metadata={"field": "alias"},
        ) from error
    return name, alias


def _resolve(name: str, entry: Entry, targets: Sequence[tuple[str, int]]) -> Targets:
    if not 1 <= len(targets) <= _MOST_TARGETS:
        raise InvalidField(
            f"an alias has 1 to {_MOST_TARGETS} targets, not {len(targets)}",
            metadata={"field": "targets"},
        )
    found: dict[str, int] = {}
    for prefix, weight in targets:
        check_prefix(prefix)
        ref = by_prefix(name, entry, prefix)
        if not 1 <= weight <= _MOST_WEIGHT or ref.revision in found:
            raise InvalidField(
                f"target {ref.short} needs a weight of 1 to {_MOST_WEIGHT}, and must be "
                "given once",
                metadata={"field": "targets"},
            )
        found[ref.revision] = weight
    return tuple(found.items())


def _forgetting(alias: AliasRow, gone: Sequence[str]) -> AliasRow:
    """An alias that can no longer be rolled back to a deleted revision."""
    if any(revision in gone for revision, _ in alias.previous):
        return dataclasses.replace(alias, previous=())
    return alias


def _words(targets: Targets) -> str:
    if len(targets) == 1:
        return targets[0][0]
    return ", ".join(f"{revision}={weight}" for revision, weight in targets)


def _label_words(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
