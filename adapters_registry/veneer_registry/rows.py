"""Rows of the catalog, as frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import AdapterCorrupt

__all__ = [
    "BEGINNINGS",
    "ENDS",
    "SERVER",
    "AliasRow",
    "HistoryRow",
    "NameRow",
    "ResidentRow",
    "RevisionRow",
    "Who",
    "damaged_row",
]


BEGINNINGS: Final = ("published", "replaced", "lost")
"""Events of the history after which a revision has a row. An older Veneer noted as lost, and
forgot, what it did not find at one start."""

ENDS: Final = ("deleted", "superseded")
"""Events after which it has none."""


def damaged_row(adapter: str) -> AdapterCorrupt:
    """The error for a row of the catalog that is not what was written."""
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
    """Whose doing a change is.

    Attributes:
        actor: who the caller said it was; a claim, not a proof.
        peer: where the call came from; ``server`` for the server's own doing.
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
        targets, previous: (revision, weight) pairs: what it means, and what it meant
            before its last move.
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
    """What the index needs of a name: revisions are (revision, weights, base), newest first.

    Attributes:
        retain: superseded revisions to keep; None is the server's default.
        damaged: rows about it that are not what was written; they are left out here.
            Of what is left out with the name's own row, nothing is known but the name.
    """

    name: str
    current: str | None
    generation: int
    revisions: tuple[tuple[str, str, str], ...]
    retain: int | None = None
    aliases: tuple[AliasRow, ...] = ()
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One line of the history: who changed what when.

    Attributes:
        sequence: grows with every line.
        time: Unix seconds.
        event: see `HistoryEntry` in adapters.proto.
        revision: "" where it is not about one.
    """

    sequence: int
    time: float
    name: str
    event: str
    revision: str
    who: Who
    detail: str


@dataclass(frozen=True, slots=True)
class ResidentRow:
    """An adapter that was in memory, to be brought back after a restart.

    Attributes:
        tier: nearest memory tier that held it: ``host`` or ``device``.
        pin: the tier that an operator pinned it to, or None.
    """

    weights: str
    tier: str
    pin: str | None
