"""Messages from a registry to its followers, as frozen values.

A registry numbers its changes from the start of each of its runs. A change carries the whole
state of one name, so applying one twice does no harm. The checksum of all names at a sequence
number tells a follower whether it has missed anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from veneer_registry.entry import Entry
from veneer_registry.freshness import HEARTBEAT_S
from veneer_registry.rows import RevisionRow
from veneer_registry.strict_json import canonical_json

LEASE_S: Final = 5.0
"""A follower that has reported nothing for this long counts as gone."""

_BYTES: Final = 16
_MASK: Final = (1 << 8 * _BYTES) - 1

Key = tuple[str, str]
"""Tenant and name."""


@dataclass(frozen=True, slots=True)
class NameState:
    """The whole state of one name.

    Attributes:
        entry: the name's entry; None if the name is gone.
        rows: rows of the entry's revisions, newest first. Rows that are damaged, or were
            deleted meanwhile, are left out.
    """

    tenant: str
    name: str
    entry: Entry | None
    rows: tuple[RevisionRow, ...] = ()

    @property
    def key(self) -> Key:
        return self.tenant, self.name


@dataclass(frozen=True, slots=True)
class BeginFeed:
    """First message of a connection.

    Attributes:
        run: id of the registry's run, to which all sequence numbers belong.
        store: identity of the registry's data folder.
        catalogs: by tenant, the number of its catalog's last change.
        snapshot: whether all names follow, as they were at ``sequence``; otherwise the changes
            after ``sequence`` follow, which is the follower's own position.
        base: identity of the base that its adapters were checked against.
        heartbeat_s, lease_s: see `HEARTBEAT_S` and `LEASE_S`.
        asks_callers: whether the registry authenticates callers; None if it does not say.
        echoes: whether its heartbeats have an echo.
        lag_s: as in `Heartbeat`.
    """

    run: str
    store: str
    catalogs: Mapping[str, int]
    snapshot: bool
    sequence: int
    base: str = ""
    heartbeat_s: float = HEARTBEAT_S
    lease_s: float = LEASE_S
    asks_callers: bool | None = None
    echoes: bool = True
    lag_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Told:
    """One name of a snapshot (all numbers are 0), or a change with its number, the number of
    the change before it, and the number of the tenant's catalog that has it."""

    state: NameState
    sequence: int = 0
    previous: int = 0
    catalog: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotEnd:
    """All names of the snapshot have been sent."""

    sequence: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last sequence number, and the checksum of all names there.

    Attributes:
        echo: the follower's last stamp that the registry had; 0: none.
        lag_s: how old the registry's own view of its catalog was.
    """

    sequence: int
    checksum: int
    echo: int = 0
    lag_s: float = 0.0


Message = BeginFeed | Told | SnapshotEnd | Heartbeat


def mark_of(key: Key, entry: Entry | None) -> int:
    """A name's part of the checksum; 0 if the name is gone. Two marks are equal only if the
    name means the same to every request."""
    if entry is None:
        return 0
    facts = [
        *key,
        entry.current.revision if entry.current is not None else "",
        entry.generation,
        -1 if entry.retain is None else entry.retain,
        entry.shared,
        [[ref.revision, ref.weights_digest] for ref in entry.revisions],
        [[a.alias, a.generation, _pairs(a.targets), _pairs(a.previous)] for a in entry.aliases],
    ]
    return int.from_bytes(hashlib.sha256(canonical_json(facts)).digest()[:_BYTES], "big")


def add_mark(checksum: int, before: int, after: int) -> int:
    """The checksum after one name's mark has changed. It is a sum, so the order of names does
    not matter."""
    return (checksum - before + after) & _MASK


def _pairs(shares: tuple[tuple[str, int], ...]) -> list[list[str | int]]:
    return [[revision, weight] for revision, weight in shares]
