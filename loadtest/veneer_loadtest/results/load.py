"""The results of ``run`` and ``find-max``.

Names of times end in the unit: ``*_ms`` are milliseconds, ``at_s`` is seconds after the
load's start.
"""

from __future__ import annotations

from typing import Any

import msgspec

from veneer_loadtest.load.spec import LoadSpec
from veneer_loadtest.results.facts import FORMAT


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Distribution of a time in milliseconds. ``cdf``: pairs of a time and the share of values
    up to it."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    cdf: list[tuple[float, float]]


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """Requests due in the measured window, by how they ended.

    Attributes:
        left: requests whose caller cancelled, as planned.
        stopped: requests that the end of the run stopped; they are in no figure.
    """

    ok: int
    left: int
    failed: int
    stopped: int


class RequestSplit(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a part of the requests. Times are in milliseconds, None if there are none."""

    requests: int
    failed: int
    tokens: int
    first_token_p50_ms: float | None
    first_token_p99_ms: float | None
    inter_token_p50_ms: float | None
    inter_token_p99_ms: float | None
    load_p50_ms: float | None


class SloLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that a good request keeps; None means no limit. ``tpot_ms``: mean time
    between tokens."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


class SloFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Goodput: requests that kept the limits. A failed request is not good; a request whose
    caller cancelled is not counted."""

    limits: SloLimits
    good: int
    share: float
    goodput_per_s: float


class GeneratorFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How well the load generator itself kept up.

    Attributes:
        cpu_share: its CPU time / wall time; 1 is one core.
        late_*: how long after their due times requests were sent.
        lost: requests that were sent but have no record.
    """

    workers: int
    cpu_share: float
    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    lost: int


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Figures over time: one value for each ``bucket_s`` seconds from the load's start, warm-up
    included.

    Attributes:
        due, ended, failed: numbers of requests; tokens: new tokens that arrived.
        running: requests due but not ended at the bucket's end.
        first_token_*: time to first token of requests whose first token arrived in the bucket.
    """

    bucket_s: float
    due: list[int]
    ended: list[int]
    failed: list[int]
    tokens: list[int]
    running: list[int]
    first_token_p50_ms: list[float | None]
    first_token_max_ms: list[float | None]


class AdapterLoad(msgspec.Struct, frozen=True, array_like=True):
    """A request that waited for its adapter; ``tier`` is where the server found the adapter."""

    at_s: float
    adapter: str
    tier: str
    load_ms: float


class TierShares(msgspec.Struct, frozen=True, kw_only=True):
    """Adapters by tier while the load ran, from the server's metrics."""

    at_s: list[float]
    adapters: dict[str, list[int]]
    bytes: dict[str, list[int]]


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of all requests sent, warm-up included."""

    requests: int
    prompt_tokens: int
    tokens: int


class ServerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The server's own counters, after the load minus before it.

    Attributes:
        agrees: whether they equal the client's `Totals`. None if some requests failed or were
            cancelled, since only the server counts all of their tokens.
        evictions: counts by ``tier cause``; lookups: counts by ``tier result``.
    """

    requests: int
    prompt_tokens: int
    tokens: int
    agrees: bool | None
    lookups: dict[str, int]
    evictions: dict[str, int]


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one load on one number of adapters.

    Attributes:
        window_s: seconds that were measured: the load without its warm-up.
        requests_per_s: requests that succeeded / ``window_s``.
        tokens_per_s: new tokens that arrived in the window / ``window_s``.
        errors: failed requests by reason.
        by_tier: requests by the tier in which the server found the adapter.
        by_adapter: requests by adapter: the 200 most requested, and ``_other``.
        loads: at most 2,000 waits for adapters; ``loads_left_out``: how many more there were.
    """

    adapters: int
    window_s: float
    requests: Requests
    requests_per_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    errors: dict[str, int]
    first_token_ms: Distribution | None
    inter_token_ms: Distribution | None
    end_to_end_ms: Distribution | None
    queue_ms: Distribution | None
    adapter_load_ms: Distribution | None
    by_tier: dict[str, RequestSplit]
    by_adapter: dict[str, RequestSplit]
    slo: SloFigures | None
    generator: GeneratorFigures
    timeline: Timeline
    loads: list[AdapterLoad]
    loads_left_out: int
    residency: TierShares | None
    server: ServerCounts | None
    totals: Totals


class RunResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="run"):
    """The file that ``veneer-loadtest run --json`` writes.

    Attributes:
        conditions: time, command, machine, load average before the run.
        target: the server under load: ``api`` (``veneer`` or ``openai``), how it was started,
            its device and base model if it reports them.
        partial: whether the run was ended early; ``why`` gives the reason.
        summary: figures for scripts, of the last level; see `run`.
    """

    format: int = FORMAT
    label: str = ""
    conditions: dict[str, Any]
    versions: dict[str, str]
    target: dict[str, str]
    load: LoadSpec
    partial: bool
    why: str
    levels: list[Level]
    summary: dict[str, float]


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One rate that was tried."""

    rate: float
    kept: bool
    level: Level


class FindMaxResult(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="find-max"
):
    """The file that ``veneer-loadtest find-max --json`` writes.

    Attributes:
        share: share of the requests that must keep the limits.
        max_rate: the highest rate that kept the limits; 0: none did.
        bounded: whether a higher rate broke them.
    """

    format: int = FORMAT
    label: str = ""
    conditions: dict[str, Any]
    versions: dict[str, str]
    target: dict[str, str]
    load: LoadSpec
    limits: SloLimits
    share: float
    partial: bool
    why: str
    probes: list[Probe]
    max_rate: float
    bounded: bool
    summary: dict[str, float]
