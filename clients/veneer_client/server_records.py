"""The clients' records of the server: frozen, no protobuf.

Times are seconds, sizes are bytes, digests are 64 hex digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
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
    "TenantUsage",
    "UsageReport",
]


@dataclass(frozen=True, slots=True)
class BaseShape:
    """The shape of a base, which its adapters must fit.

    Attributes:
        vocabulary: token ids are below this.
        projections: ``q_proj`` etc. -> (out_features, in_features), the same in each layer.
    """

    layers: int
    vocabulary: int
    projections: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The resident base model; ``size`` in bytes. ``shape`` is None if the server is too old
    to report it."""

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
    """The server's effective limits; bytes and counts.

    Attributes:
        max_batch_tokens: most tokens in one step; on a slow machine fewer than configured.
        max_prefill_tokens: prompt tokens in a step that also decodes.
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
    """A memory pool of the server's plan; bytes.

    Attributes:
        name: ``host``, or ``device`` if it has its own memory.
        uses: ``base``, ``kv_cache``, ``adapters`` ... ; they add up to ``total``.
        limit: memory of the machine or its container.
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
    """Description of a server.

    Attributes:
        backend: what executes a step: ``torch``, or for example ``native (avx512-bf16)`` or
            ``native (avx2)``. The parentheses also have ``, int8 activations`` if inputs are
            rounded to 8 bits, and ``, prebuilt`` if the kernels came with the wheel.
        why_not_native: why the backend is not native, in words; empty if it is.
        context_length: most tokens of prompt plus completion.
        engine_starts: 1 unless the engine process failed.
        longest_step_s: expected duration of the longest step, as measured before serving.
        threads: number of threads that compute a step on a CPU; 0 from a server that does not
            report it.
        why_threads: the reason for that number, in words.
        admin_port: whether changes are accepted only at another port, whose address the
            operator knows.
        defaults: defaults of unset options; None from a server that does not report them.
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
    threads: int = 0
    why_threads: str = ""
    admin_port: bool = False


class ServingStatus(Enum):
    """Answer of the standard health service."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNKNOWN = "unknown"


class Limit(Enum):
    """The resource that a server would exhaust first."""

    NONE = "none"
    DEVICE_ADAPTERS = "device adapters"
    HOST_ADAPTERS = "host adapters"
    KV_CACHE = "kv cache"
    MAX_RUNNING = "max running"


@dataclass(frozen=True, slots=True)
class AdapterCapacity:
    """How many adapters of one shape fit, if there are no others.

    Attributes:
        parameters, size: of one adapter; ``size`` in bytes, in either tier.
        on_device, on_host: how many fit in each tier.
    """

    parameters: int
    size: int
    on_device: int
    on_host: int


@dataclass(frozen=True, slots=True)
class SequenceCapacity:
    """How many sequences of one length fit, if there are no others.

    Attributes:
        size: bytes of one sequence's keys and values.
        running: how many can run at once.
        limited_by: the resource that allows no more.
    """

    context_length: int
    size: int
    running: int
    limited_by: Limit


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A requested number that does not fit.

    Attributes:
        flag: the flag of ``veneer-server`` to raise from ``available`` to ``needed``.
        message: the same in a sentence.
    """

    limit: Limit
    flag: str
    needed: int
    available: int
    message: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much would fit; ``shortfalls`` is empty if ``fits``."""

    adapters: AdapterCapacity
    sequences: SequenceCapacity
    fits: bool
    shortfalls: tuple[Shortfall, ...]


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """The memory budgets of adapters and their current use; bytes.

    Attributes:
        host_cache_bytes, device_adapter_bytes: the budgets.
        host_bytes, device_bytes: bytes in use. They exceed the budget while running requests
            lease adapters that are to be evicted.
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
        bound: largest allowed difference.
        nearest_other: largest difference to the nearest of the other references. If two
            adapters had been swapped, this difference would be the small one.
        detail: why it failed, or "".
    """

    adapter: str
    passed: bool
    max_difference: float
    bound: float
    nearest_other: float
    detail: str


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Whether base and adapters answer as computed from their files.

    Attributes:
        passed: every result passed, and an adapter was tested if any is registered.
        adapters_mixed: number of adapters that were mixed with others, or the base, in a batch.
        note: why no adapter was tested; "" if one was.
    """

    passed: bool
    results: tuple[SelfTestResult, ...]
    adapters_mixed: int
    note: str = ""

    @property
    def adapters_tested(self) -> int:
        """Number of adapters that were compared with their references."""
        return sum(bool(result.adapter) for result in self.results)


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """What a tenant has used.

    Attributes:
        requests: generate requests that got an answer, or the beginning of one.
        cached_prompt_tokens: the part of ``prompt_tokens`` that was in the prefix cache.
        adapter_byte_hours: bytes of stored adapters times the hours they were stored.
    """

    tenant: str
    requests: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    adapter_byte_hours: float


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Usage by tenant, from ``start`` to ``end``."""

    start: datetime
    end: datetime
    tenants: tuple[TenantUsage, ...]
