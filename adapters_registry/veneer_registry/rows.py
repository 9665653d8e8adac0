"""Rows of the catalog as frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import AdapterCorrupt

BEGINNINGS: Final = ("published", "replaced", "lost")
"""Events of the history after which a revision should have a row. An older Veneer recorded
``lost``, and dropped the row, if one start did not find the content; that must not count as
an end."""

ENDS: Final = ("deleted", "superseded")
"""Events after which a revision has no row."""


def damaged_row(adapter: str) -> AdapterCorrupt:
    """The error for a damaged row of the catalog."""
    return AdapterCorrupt(
        f"the catalog entry of adapter {adapter} is damaged; push the adapter again, "
        "or stop the server and run `veneer-server store recover`",
        metadata={
            "adapter": adapter,
            "why": "damaged catalog row",
            "fix": "veneer-server store recover",
        },
    )


@dataclass(frozen=True, slots=True)
class Who:
    """Who made a change.

    Attributes:
        actor: who the caller claims to be; not verified.
        peer: where the call came from; ``server`` for the server's own changes.
    """

    actor: str = ""
    peer: str = "server"


SERVER = Who()


@dataclass(frozen=True, slots=True)
class RevisionRow:
    """One stored revision; ``manifest`` is the text of `manifest_to_json`."""

    name: str
    revision: str
    weights: str
    base: str
    manifest: str
    created: float
    labels: Mapping[str, str]
    bytes: int
    current: bool = True
    generation: int = 0


@dataclass(frozen=True, slots=True)
class AliasRow:
    """An alias of a name.

    Attributes:
        targets, previous: (revision, weight) pairs: its targets now, and before its last
            move.
        generation: its etag, as a number.
        updated: Unix seconds.
    """

    name: str
    alias: str
    targets: tuple[tuple[str, int], ...]
    previous: tuple[tuple[str, int], ...]
    generation: int
    updated: float


@dataclass(frozen=True, slots=True)
class NameRow:
    """What the index needs to know about a name.

    Attributes:
        revisions: (revision, weights, base), newest first.
        retain: how many superseded revisions to keep; None means the server's default.
        damaged: number of damaged rows about the name, which are left out here. If its own
            row is one of them, only the name itself is known.
        shared: whether other tenants of the server may use it.
    """

    name: str
    current: str | None
    generation: int
    revisions: tuple[tuple[str, str, str], ...]
    retain: int | None = None
    aliases: tuple[AliasRow, ...] = ()
    damaged: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One line of the history: who changed what and when.

    Attributes:
        sequence: increases with every line.
        time: Unix seconds.
        event: see `HistoryEntry` in adapters.proto.
        revision: "" if it is not about a revision.
    """

    sequence: int
    time: float
    name: str
    event: str
    revision: str
    who: Who
    detail: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """Changes that other processes made to the catalog. Its rows already show them.

    Attributes:
        names: names whose rows changed.
        lines: new lines of the history, oldest first.
    """

    names: frozenset[str]
    lines: tuple[HistoryRow, ...]


@dataclass(frozen=True, slots=True)
class ResidentRow:
    """An adapter that was in memory, to be loaded again after a restart.

    Attributes:
        tier: the nearest memory tier that held it: ``host`` or ``device``.
        pin: the tier that an operator pinned it to, or None.
    """

    weights: str
    tier: str
    pin: str | None
