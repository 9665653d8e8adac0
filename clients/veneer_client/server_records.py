"""What the clients tell of the server: frozen records, no protobuf.

Times are seconds, sizes are bytes, digests are 64 hex digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from veneer_registry.adapter import BaseFingerprint

from veneer_client.types import RequestDefaults

__all__ = [
    "AdapterCapacity",
    "BaseModel",
    "BaseShape",
    "BudgetUse",
    "Budgets",
    "Capacity",
    "Limit",
    "Memory",
    "MemoryPool",
    "SelfTest",
    "SelfTestResult",
    "SequenceCapacity",
    "ServerInfo",
    "ServingStatus",
    "Shortfall",
]


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What an adapter for a base must fit.

    Attributes:
        vocabulary: token ids are below it.
        projections: ``q_proj`` and so on -> (out_features, in_features), as in every layer.
    """

    layers: int
    vocabulary: int
    projections: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The resident base model; ``size`` in bytes. ``shape`` is None where the server is too
    old to tell it."""

    name: str
    architecture: str
    quantization: str
    dtype: str
    parameters: int
    size: int
    fingerprint: BaseFingerprint
    shape: BaseShape | None = None


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits that the server runs with; bytes and counts.

    Attributes:
        max_batch_tokens: of one step; fewer than configured on a slow machine.
        max_prefill_tokens: prompt tokens of a step that also decodes.
    """

    host_adapter_bytes: int
    device_adapter_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_batch_tokens: int
    max_running: int
    max_queue: int
    max_prefill_tokens: int = 0


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
        backend: what executes a step: ``native (avx512-bf16)``, ``native (avx2)``, either with
            ``, prebuilt`` inside where the kernels came with the wheel, or ``torch``.
        why_not_native: in words; empty where the native one does.
        context_length: longest prompt plus completion, in tokens.
        engine_starts: 1 unless the engine process failed.
        longest_step_s: how long the longest step may take, by what was measured before
            serving.
        defaults: None from a server that does not say.
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
    why_not_native: str = ""
    longest_step_s: float = 0.0
    defaults: RequestDefaults | None = None


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


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """The memory budgets of adapters, and what is taken of them now; bytes.

    Attributes:
        host_cache_bytes, device_adapter_bytes: the budgets.
        host_bytes, device_bytes: taken. More than the budget while running requests
            hold what must go.
    """

    host_cache_bytes: int
    device_adapter_bytes: int
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """One member of the batch of a self-test.

    Attributes:
        adapter: ``name@revision``; "" for the base model.
        max_difference: largest difference of a log-probability (natural logarithm)
            between the serving path and the reference.
        bound: what it may be.
        nearest_other: largest difference to the nearest of the other references: had
            two adapters been exchanged, this would be the small one.
        detail: why it failed; "" where there is nothing to say.
    """

    adapter: str
    passed: bool
    max_difference: float
    bound: float
    nearest_other: float
    detail: str


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Whether base and adapters answer as their files say they must.

    Attributes:
        passed: every result did, and an adapter was tested if any is registered.
        adapters_mixed: adapters that were in one batch together with the base.
        note: why no adapter was tested; "" if one was.
    """

    passed: bool
    results: tuple[SelfTestResult, ...]
    adapters_mixed: int
    note: str = ""

    @property
    def adapters_tested(self) -> int:
        """Adapters that were compared with their references."""
        return sum(bool(result.adapter) for result in self.results)
