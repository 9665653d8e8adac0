"""The clients' records of adapters: frozen, no protobuf.

Times are seconds, sizes are bytes, digests are 64 hex digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from veneer_registry.adapter import SHORT_REVISION, Tier
from veneer_registry.errors import VeneerError

from veneer_client.replicas import ReplicasReached

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
    "Pulled",
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
    """From an older server, which does not say, or a newer one."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One revision, as the server describes it.

    Attributes:
        rank: largest rank of any module.
        size: bytes of one resident copy.
        tier: nearest tier that holds it now.
        leases: requests that are admitted and not finished.
        last_used: None until first used since the server started.
        training: facts from the training manifest.
        current: whether the plain name resolves to this revision.
        etag: changes whenever the name's registration changes. Calls that change it accept
            the etag, so that they fail if it has changed since.
        aliases: aliases, as ``name/alias``, that have this revision as a target.
        disk_bytes: size of its files on disk.
        retain: superseded revisions that the name keeps.
        shared: other tenants may use the name.
        tenant: its owner, if another tenant shares it with the caller; else "". The name is
            then ``TENANT/name``, unless the caller's tenant accepts it by its plain name.
        base_word: how we know that it was trained on the served base: ``fingerprint``,
            ``name``, ``rule``, ``publisher`` or ``none``; "" if an older server registered it.
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
    shared: bool = False
    tenant: str = ""
    base_word: str = ""

    @property
    def short(self) -> str:
        """``name@`` and 12 digits of the revision."""
        return f"{self.name}@{self.revision[:SHORT_REVISION]}"


@dataclass(frozen=True, slots=True)
class AdapterDetails:
    """One adapter and the stored revisions of its name, newest first.

    Attributes:
        revisions_left_out: number of older ones that did not fit the answer;
            `Client.history` lists them.
    """

    adapter: AdapterInfo
    revisions: tuple[AdapterInfo, ...]
    revisions_left_out: int = 0


@dataclass(frozen=True, slots=True)
class Pushed:
    """Outcome of a push.

    Attributes:
        published: False when the name already held this content, and for a dry run.
        replaced: whether another revision of the name was current before.
        warnings: sentences from the local check and the server.
        skipped: files of the folder that are not part of a bundle.
        sent_bytes: bytes handed to the connection, including those that it lost.
        skipped_bytes: bytes that the server had before this push began.
        resumes: how often the push resumed after an interruption.
        replicas: how many followers have it; None if the push did not wait for them.
    """

    adapter: AdapterInfo
    published: bool
    replaced: bool
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    sent_bytes: int
    skipped_bytes: int
    resumes: int
    replicas: ReplicasReached | None = None


@dataclass(frozen=True, slots=True)
class Pulled:
    """Outcome of a pull.

    Attributes:
        adapter: the revision that was pulled.
        files: the bytes of each file, by name.
    """

    adapter: AdapterInfo
    files: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Resumed:
    """A push resumes from what the server has.

    Attributes:
        at: bytes that the server has, over all files; 0 if the push must start over.
        total: bytes of all files.
        after: what interrupted the push; None at its start.
    """

    at: int
    total: int
    after: VeneerError | None


class EvictMode(Enum):
    """What happens to requests that use an adapter which is evicted or deleted."""

    DRAIN = "drain"
    """They finish; the memory is freed after the last one."""
    FAIL_IF_BUSY = "fail_if_busy"
    """The call is refused."""
    ABORT = "abort"
    """They end with `AdapterEvicted`."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Outcome of an eviction; ``evicted`` is False if a drain is still waiting."""

    evicted: bool
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """A revision that an alias points to; ``weight`` is relative to the other targets'."""

    revision: str
    weight: int


@dataclass(frozen=True, slots=True)
class Alias:
    """``name/alias`` and its targets, which are empty once it is removed.

    Attributes:
        targets: several of them are a canary, each with its share of the requests.
        etag: changes whenever the alias moves; `set_alias` accepts it.
    """

    alias: str
    targets: tuple[AliasTarget, ...]
    etag: str
    updated: datetime


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias as it is now, and its previous targets (empty if it is new).

    Attributes:
        replicas: how many followers have it; None if the move did not wait for them.
    """

    alias: Alias
    previous: tuple[AliasTarget, ...]
    replicas: ReplicasReached | None = None


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One change.

    Attributes:
        event: ``published``, ``replaced``, ``made_current``, ``deleted``, ``alias_set``,
            ``labels`` ... ; the contract of ``GetHistory`` has them all.
        revision: "" if the change is not about one revision.
        actor: who the caller claims to be; not verified.
        peer: where the call came from; ``server`` for the server's own changes.
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
    """Discard your state: all present adapters follow as PRESENT."""
    PRESENT = "present"
    SYNCED = "synced"
    """All earlier events have been sent."""
    PUBLISHED = "published"
    REPLACED = "replaced"
    """The name now means this revision."""
    DELETED = "deleted"
    LOADED = "loaded"
    """Loaded from disk into memory."""
    ACTIVATED = "activated"
    """Loaded into the DEVICE tier."""
    EVICTED = "evicted"
    """Removed from a tier; ``adapter.tier`` is where it still is."""
    FAILED = "failed"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    QUARANTINED = "quarantined"
    """Its stored content is damaged."""
    ALIAS_CHANGED = "alias_changed"
    """An alias was moved or removed; one event per new target."""
    UPDATED = "updated"
    """Labels, retention or sharing changed."""
    UNKNOWN = "unknown"
    """From a newer server."""


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """One event of a watch.

    Attributes:
        sequence: `watch` can resume after it; 0 in events that it cannot resume after (see
            the contract of ``WatchAdapters``).
        adapter: its state after the event; None for RESET and SYNCED.
        detail: for EVICTED the cause, for FAILED the reason and fix, for QUARANTINED the
            damage, for ALIAS_CHANGED the alias; else "".
    """

    kind: AdapterEventKind
    sequence: int
    time: datetime
    adapter: AdapterInfo | None
    detail: str
