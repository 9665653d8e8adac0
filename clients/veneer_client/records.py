"""What the clients tell of adapters and the server: frozen records, no protobuf.

Times are seconds, sizes are bytes, digests are 64 hex digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from veneer_registry.adapter import SHORT_REVISION, BaseFingerprint, Tier

__all__ = [
    "AdapterCapacity",
    "AdapterDetails",
    "AdapterEvent",
    "AdapterEventKind",
    "AdapterInfo",
    "BaseModel",
    "Budgets",
    "Capacity",
    "EvictMode",
    "Eviction",
    "Limit",
    "Memory",
    "MemoryPool",
    "Pushed",
    "SequenceCapacity",
    "ServerInfo",
    "ServingStatus",
    "Shortfall",
]

# ----------------------------------------------------------------------- adapters


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
        etag: `delete` takes it, so that nothing newer is deleted.
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

    @property
    def short(self) -> str:
        """``name@`` and 12 digits of the revision."""
        return f"{self.name}@{self.revision[:SHORT_REVISION]}"


@dataclass(frozen=True, slots=True)
class AdapterDetails:
    """One adapter and all stored revisions of its name, newest first."""

    adapter: AdapterInfo
    revisions: tuple[AdapterInfo, ...]


@dataclass(frozen=True, slots=True)
class Pushed:
    """Outcome of a push.

    Attributes:
        published: False when the name already held this content, and for a dry run.
        replaced: another revision of the name was current before.
        warnings: sentences from the local check and the server.
        skipped: files of the folder that were not sent.
        sent_bytes: bytes of the files that were.
    """

    adapter: AdapterInfo
    published: bool
    replaced: bool
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    sent_bytes: int


class EvictMode(Enum):
    """What becomes of the requests that use an evicted adapter."""

    DRAIN = "drain"
    """They finish; memory is freed when the last one has."""
    FAIL_IF_BUSY = "fail_if_busy"
    """The eviction is refused."""
    ABORT = "abort"
    """They end with `AdapterEvicted`."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Outcome of an eviction; ``evicted`` is False while a drain waits."""

    evicted: bool
    freed_bytes: int


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
    UNKNOWN = "unknown"
    """Of a newer server."""


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """One event of a watch.

    Attributes:
        sequence: `watch` resumes after it; 0 in events that are no place to resume
            from (see the contract of ``WatchAdapters``).
        adapter: as the event left it; None for RESET and SYNCED.
        detail: of EVICTED the cause, of FAILED why and what to do; else "".
    """

    kind: AdapterEventKind
    sequence: int
    time: datetime
    adapter: AdapterInfo | None
    detail: str


# ------------------------------------------------------------------------- server


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The resident base model; ``size`` in bytes."""

    name: str
    architecture: str
    quantization: str
    dtype: str
    parameters: int
    size: int
    fingerprint: BaseFingerprint


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits that the server runs with; bytes and counts."""

    host_adapter_bytes: int
    device_adapter_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_batch_tokens: int
    max_running: int
    max_queue: int


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """Memory that the server plans with; bytes.

    Attributes:
        name: ``host``, or ``device`` where that has memory of its own.
        uses: ``base``, ``kv_cache``, ``adapters`` ... ; adds up to ``total``.
        limit: what there is, of the machine or its container.
    """

    name: str
    uses: Mapping[str, int]
    total: int
    limit: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The plan, and the largest resident sets so far; bytes."""

    pools: tuple[MemoryPool, ...]
    front_peak: int
    engine_peak: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is.

    Attributes:
        backend: what executes a step, for example ``torch``.
        context_length: longest prompt plus completion, in tokens.
        engine_starts: 1 unless the engine process failed.
    """

    version: str
    base_model: BaseModel
    device: str
    backend: str
    budgets: Budgets
    context_length: int
    uptime_s: float
    adapters_registered: int
    adapters_on_device: int
    engine_starts: int
    memory: Memory


class ServingStatus(Enum):
    """Answer of the standard health service."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNKNOWN = "unknown"


class Limit(Enum):
    """What a server would run out of first."""

    NONE = "none"
    DEVICE_ADAPTERS = "device adapters"
    HOST_ADAPTERS = "host adapters"
    KV_CACHE = "kv cache"
    MAX_RUNNING = "max running"


@dataclass(frozen=True, slots=True)
class AdapterCapacity:
    """Adapters of one shape, were there no others.

    Attributes:
        parameters, size: of one adapter; ``size`` in bytes, in either tier.
        on_device, on_host: how many fit each tier.
    """

    parameters: int
    size: int
    on_device: int
    on_host: int


@dataclass(frozen=True, slots=True)
class SequenceCapacity:
    """Sequences of one length, were there no others.

    Attributes:
        size: bytes of the keys and values of one.
        running: how many run at once.
        limited_by: what keeps more from running.
    """

    context_length: int
    size: int
    running: int
    limited_by: Limit


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Something that was asked for and does not fit.

    Attributes:
        flag: of ``veneer-server``, to be raised from ``available`` to ``needed``.
        message: the same for a person.
    """

    limit: Limit
    flag: str
    needed: int
    available: int
    message: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """What would fit; ``shortfalls`` is empty where ``fits``."""

    adapters: AdapterCapacity
    sequences: SequenceCapacity
    fits: bool
    shortfalls: tuple[Shortfall, ...]
