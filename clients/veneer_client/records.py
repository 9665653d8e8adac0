"""What the clients tell of adapters: frozen records, no protobuf.

Times are seconds, sizes are bytes, digests are 64 hex digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from veneer_registry.adapter import SHORT_REVISION, Tier
from veneer_registry.errors import VeneerError

__all__ = [
    "AdapterDetails",
    "AdapterEvent",
    "AdapterEventKind",
    "AdapterInfo",
    "AdapterState",
    "Alias",
    "AliasMove",
    "AliasTarget",
    "EvictMode",
    "Eviction",
    "HistoryEntry",
    "Pushed",
    "Resumed",
]


class AdapterState(Enum):
    """Whether a revision can be used."""

    READY = "ready"
    QUARANTINED = "quarantined"
    """Its content on disk is damaged: push the same content again."""
    OTHER_BASE = "other_base"
    """It was registered for another base model."""
    UNKNOWN = "unknown"
    """Of an older server, which does not say, or a newer one."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What the server knows of one revision.

    Attributes:
        rank: largest of any module.
        size: bytes that one resident copy takes.
        tier: nearest tier that holds it now.
        leases: requests admitted and not finished.
        last_used: None until first used since the server started.
        training: facts from the training manifest.
        current: the plain name resolves to this revision.
        etag: changes whenever the name's registration changes. Calls that change it take
            the etag, so that nothing newer is changed.
        aliases: ``name/alias`` that may mean this revision.
        disk_bytes: size of its files on disk.
        retain: superseded revisions that the name keeps.
    """

    name: str
    revision: str
    weights_digest: str
    base_model: str
    rank: int
    targets: tuple[str, ...]
    parameters: int
    size: int
    tier: Tier
    pinned: bool
    leases: int
    created: datetime
    last_used: datetime | None
    labels: Mapping[str, str]
    training: Mapping[str, str]
    current: bool
    etag: str
    has_chat_template: bool
    state: AdapterState
    aliases: tuple[str, ...]
    disk_bytes: int
    retain: int

    @property
    def short(self) -> str:
        """``name@`` and 12 digits of the revision."""
        return f"{self.name}@{self.revision[:SHORT_REVISION]}"


@dataclass(frozen=True, slots=True)
class AdapterDetails:
    """One adapter and the stored revisions of its name, newest first.

    Attributes:
        revisions_left_out: older ones that did not fit the answer; `Client.history` names
            them.
    """

    adapter: AdapterInfo
    revisions: tuple[AdapterInfo, ...]
    revisions_left_out: int = 0


@dataclass(frozen=True, slots=True)
class Pushed:
    """Outcome of a push.

    Attributes:
        published: False when the name already held this content, and for a dry run.
        replaced: another revision of the name was current before.
        warnings: sentences from the local check and the server.
        skipped: files of the folder that are not part of a bundle.
        sent_bytes: handed to the connection, also what a broken one lost.
        skipped_bytes: that the server had before this push began.
        resumes: how often the push went on after it was interrupted.
    """

    adapter: AdapterInfo
    published: bool
    replaced: bool
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    sent_bytes: int
    skipped_bytes: int
    resumes: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """A push goes on from what the server has.

    Attributes:
        at: bytes that it has, of all files; 0 where it must begin anew.
        total: bytes of all files.
        after: what interrupted the push; None at its beginning.
    """

    at: int
    total: int
    after: VeneerError | None


class EvictMode(Enum):
    """What becomes of the requests that use an adapter which is evicted or deleted."""

    DRAIN = "drain"
    """They finish; memory is freed when the last one has."""
    FAIL_IF_BUSY = "fail_if_busy"
    """The call is refused."""
    ABORT = "abort"
    """They end with `AdapterEvicted`."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Outcome of an eviction; ``evicted`` is False while a drain waits."""

    evicted: bool
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """A revision that an alias means; ``weight`` is relative to the other targets'."""

    revision: str
    weight: int


@dataclass(frozen=True, slots=True)
class Alias:
    """``name/alias`` and what it means; without targets once it is removed.

    Attributes:
        targets: several are a canary, each with its share of the requests.
        etag: changes whenever it moves; `set_alias` takes it.
    """

    alias: str
    targets: tuple[AliasTarget, ...]
    etag: str
    updated: datetime


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias as it is now, and what it meant before (nothing, where it is new)."""

    alias: Alias
    previous: tuple[AliasTarget, ...]


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """Something that was changed.

    Attributes:
        event: ``published``, ``replaced``, ``made_current``, ``deleted``, ``alias_set``,
            ``labels`` ... ; the contract of ``GetHistory`` has them all.
        revision: "" where it is not about one revision.
        actor: who the caller said it was; a claim, not a proof.
        peer: where the call came from; ``server`` where the server did it by itself.
    """

    time: datetime
    event: str
    name: str
    revision: str
    actor: str
    peer: str
    detail: str

    @property
    def short(self) -> str:
        """``name@`` and 12 digits of the revision, or the name alone."""
        return f"{self.name}@{self.revision[:SHORT_REVISION]}" if self.revision else self.name


class AdapterEventKind(Enum):
    """What happened to an adapter; see `AdapterEvent`."""

    RESET = "reset"
    """Forget what you know: all that is there follows as PRESENT."""
    PRESENT = "present"
    SYNCED = "synced"
    """All that was before the watch has been told."""
    PUBLISHED = "published"
    REPLACED = "replaced"
    """The name means the told revision from now on."""
    DELETED = "deleted"
    LOADED = "loaded"
    """From disk into memory."""
    ACTIVATED = "activated"
    """Into the DEVICE tier."""
    EVICTED = "evicted"
    """Out of a tier; ``adapter.tier`` is where it still is."""
    FAILED = "failed"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    QUARANTINED = "quarantined"
    """Its stored content is damaged."""
    ALIAS_CHANGED = "alias_changed"
    """An alias was moved or removed; one event for each revision that it means now."""
    UPDATED = "updated"
    """Labels or retention changed."""
    UNKNOWN = "unknown"
    """Of a newer server."""


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """One event of a watch.

    Attributes:
        sequence: `watch` resumes after it; 0 in events that are no place to resume
            from (see the contract of ``WatchAdapters``).
        adapter: as the event left it; None for RESET and SYNCED.
        detail: of EVICTED the cause, of FAILED why and what to do, of QUARANTINED the
            damage, of ALIAS_CHANGED the alias; else "".
    """

    kind: AdapterEventKind
    sequence: int
    time: datetime
    adapter: AdapterInfo | None
    detail: str
