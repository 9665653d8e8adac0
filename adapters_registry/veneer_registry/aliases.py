"""Aliases of an adapter's name: create, move, roll back, remove."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from veneer_registry.core import Part
from veneer_registry.entry import Entry, by_prefix, check_prefix, short_name, split_spec
from veneer_registry.errors import (
    AdapterNotFound,
    EtagMismatch,
    FailedPrecondition,
    InvalidField,
)
from veneer_registry.records import AliasChange
from veneer_registry.rows import SERVER, AliasRow, Who

_MOST_WEIGHT: Final = 10_000
_MOST_TARGETS: Final = 16
_MOST_ALIASES: Final = 64

Targets = tuple[tuple[str, int], ...]


class Aliases(Part):
    """Changes to aliases. Each is one transaction, then one swap in the index."""

    def set_alias(
        self,
        spec: str,
        targets: Sequence[tuple[str, int]],
        *,
        etag: str = "",
        who: Who = SERVER,
    ) -> AliasChange:
        """Create or move ``name/alias``, atomically for all callers.

        Args:
            targets: (4 to 64 hex digits of a kept revision, weight of 1 to 10,000).
            etag: if not empty, the alias's etag must equal it.

        Raises:
            InvalidField: ``spec`` or ``targets`` is malformed.
            AdapterNotFound: the name or a revision does not exist.
            EtagMismatch: the alias has been moved meanwhile.
        """
        name, alias = _parse_alias(spec)
        core = self._core
        with core.changes:
            entry, old = self._alias(name, alias, etag)
            if old is None and len(entry.aliases) >= _MOST_ALIASES:
                raise FailedPrecondition(
                    f"adapter {name!r} has {_MOST_ALIASES} aliases already, the maximum; "
                    "remove one",
                    metadata={"adapter": name},
                )
            new = _resolve(name, entry, targets)
            if old is not None and old.targets == new:
                return AliasChange(old, old.targets)  # `previous` stays, for rollback
            return self._move(entry, name, alias, old, new, who)

    def rollback_alias(self, spec: str, *, etag: str = "", who: Who = SERVER) -> AliasChange:
        """Move ``name/alias`` back to its targets before the last move.

        Raises:
            FailedPrecondition: it was never moved, or its earlier targets were deleted.
        """
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
                    f"alias {spec} has no earlier target to roll back to: give it a revision",
                    metadata={"alias": spec, "cause": "no_previous"},
                )
            return self._move(entry, name, alias, old, old.previous, who)

    def remove_alias(self, spec: str, *, etag: str = "", who: Who = SERVER) -> AliasChange:
        """Remove ``name/alias``; the revisions stay."""
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
            self._core.index.put(name, dataclasses.replace(entry, aliases=rest))
            gone = dataclasses.replace(old, targets=(), previous=old.targets)
        core.sweep_quietly()
        return AliasChange(gone, old.targets)

    def _alias(self, name: str, alias: str, etag: str) -> tuple[Entry, AliasRow | None]:
        entry = self._core.index.find_entry(name)
        old = entry.alias(alias)
        now = "" if old is None else str(old.generation)
        if etag and etag != now:
            raise EtagMismatch(
                f"alias {name}/{alias} has etag {now or 'none'}, not {etag[:40]}: it has been "
                "moved; list the aliases again",
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
        self._core.index.put(name, dataclasses.replace(entry, aliases=aliases))
        return AliasChange(row, before)


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


def _words(targets: Targets) -> str:
    if len(targets) == 1:
        return targets[0][0]
    return ", ".join(f"{revision}={weight}" for revision, weight in targets)
