"""A name's revisions and aliases, and how a spec chooses one revision."""

from __future__ import annotations

import difflib
import hashlib
import random
import re
from dataclasses import dataclass
from typing import Final

from veneer_registry.adapter import SHORT_REVISION, AdapterRef, check_name
from veneer_registry.errors import AdapterNotFound, InvalidField
from veneer_registry.rows import AliasRow
from veneer_registry.strict_json import show

_LEAST_DIGITS: Final = 4
"""Fewest digits of a revision that a person may type; no other revision may begin with them."""
_PREFIX: Final = re.compile(rf"[0-9a-f]{{{_LEAST_DIGITS},64}}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One name.

    Attributes:
        current: the revision that the plain name resolves to; None if its content was lost.
        revisions: all kept revisions, newest first.
        generation: the etag, as a number.
        foreign: revisions that were checked against another base.
        retain: how many superseded revisions to keep; None means the server's default.
        aliases: sorted by name; each target is among `revisions`.
        shared: whether other tenants of the server may use the name.
    """

    current: AdapterRef | None
    revisions: tuple[AdapterRef, ...]
    generation: int
    foreign: frozenset[str] = frozenset()
    retain: int | None = None
    aliases: tuple[AliasRow, ...] = ()
    shared: bool = False

    def alias(self, name: str) -> AliasRow | None:
        """The alias of that name (without the adapter's name), or None."""
        return next((alias for alias in self.aliases if alias.alias == name), None)

    def aliases_of(self, revision: str) -> tuple[str, ...]:
        """Names of the aliases that have this revision as a target."""
        return tuple(a.alias for a in self.aliases if revision in dict(a.targets))

    def beyond(self, retain: int) -> tuple[AdapterRef, ...]:
        """Return the superseded revisions beyond ``retain``, which are to be dropped. Targets
        of an alias stay, and so do its previous ones, since its last move can be rolled
        back."""
        kept = {revision for a in self.aliases for revision, _ in (*a.targets, *a.previous)}
        superseded = [ref for ref in self.revisions if ref != self.current]
        if self.retain is not None:
            retain = self.retain
        return tuple(ref for ref in superseded[retain:] if ref.revision not in kept)

    def without(self, revisions: tuple[str, ...]) -> tuple[AdapterRef, ...]:
        """Return the name's revisions except these."""
        return tuple(ref for ref in self.revisions if ref.revision not in revisions)


@dataclass(frozen=True, slots=True)
class Found:
    """A resolved name: its entry, and the chosen revision."""

    entry: Entry
    ref: AdapterRef


def short_name(name: str) -> str:
    """Like `check_name`, but the error quotes at most 80 characters of an untrusted name."""
    return check_name(name if len(name) <= 80 else name[:80])


def split_spec(spec: str) -> tuple[str, str, str]:
    """Split a spec into (name, separator, rest). The separator is ``@``, ``/`` or ""."""
    for mark in "@/":
        name, found, rest = spec.partition(mark)
        if found:
            return name, mark, rest
    return spec, "", ""


def check_prefix(prefix: str) -> None:
    """Raise InvalidField unless this is a valid prefix of a revision."""
    if not _PREFIX.fullmatch(prefix):
        raise InvalidField(
            f"revision {show(prefix)} is not allowed: use {_LEAST_DIGITS} to 64 "
            "lower-case hex digits",
            metadata={"field": "adapter"},
        )


def by_prefix(name: str, entry: Entry, prefix: str) -> AdapterRef:
    """Return the only revision with this prefix. Raises AdapterNotFound if there is none,
    InvalidField if there are several."""
    matches = [ref for ref in entry.revisions if ref.revision.startswith(prefix)]
    if not matches:
        kept = ", ".join(ref.revision[:SHORT_REVISION] for ref in entry.revisions[:8])
        raise AdapterNotFound(
            f"adapter {name!r} has no revision {prefix[:SHORT_REVISION]}; it has {kept}",
            metadata={"adapter": name, "revision": prefix, "kept": kept},
        )
    if len(matches) > 1:
        found = ", ".join(ref.revision[:SHORT_REVISION] for ref in matches[:8])
        raise InvalidField(
            f"revision {prefix} of {name!r} is ambiguous: give more digits, of {found}",
            metadata={"field": "adapter", "cause": "ambiguous"},
        )
    return matches[0]


def by_alias(name: str, entry: Entry, alias: str, key: str | None) -> AdapterRef:
    """Return the target of an alias for this key. If the key is None, there must be only one.

    Raises AdapterNotFound, or InvalidField for an alias with several targets.
    """
    found = entry.alias(alias)
    if found is None:
        names = [a.alias for a in entry.aliases]
        metadata = {"adapter": name}
        if near := difflib.get_close_matches(alias, names, n=1):
            metadata["did_you_mean"] = f"{name}/{near[0]}"
        has = "it has none" if not names else f"it has {', '.join(names[:8])}"
        raise AdapterNotFound(
            f"adapter {name!r} has no alias {show(alias)}; {has}", metadata=metadata
        )
    if key is None and len(found.targets) > 1:
        kept = ", ".join(f"{name}@{revision[:SHORT_REVISION]}" for revision, _ in found.targets)
        raise InvalidField(
            f"alias {name}/{alias} has several targets; choose one of them: {kept}",
            metadata={"field": "name", "alias": f"{name}/{alias}"},
        )
    revision = _share(found, key or "")
    for ref in entry.revisions:
        if ref.revision == revision:
            return ref
    raise AdapterNotFound(
        f"the content of alias {name}/{alias} was lost; push it again, or move the alias",
        metadata={"adapter": name, "revision": revision},
    )


def _share(alias: AliasRow, key: str) -> str:
    """Choose a target by weight. A key always gets the same one, as long as the targets do not
    change; an empty key gets a random one."""
    if len(alias.targets) == 1:
        return alias.targets[0][0]
    total = sum(weight for _, weight in alias.targets)
    if key:
        text = f"{alias.name}/{alias.alias}\0{key}".encode()
        at = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % total
    else:
        at = random.randrange(total)  # nosec B311 # not for secrets
    for revision, weight in alias.targets:
        at -= weight
        if at < 0:
            return revision
    raise AssertionError("weights add up")
