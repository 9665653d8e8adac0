"""The result of ``swap``; times are in milliseconds."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from veneer_loadtest.results.facts import FORMAT

Case = Literal["same", "device", "host", "disk", "disk_cold", "publish"]
"""Which adapter a first token comes from: the same as before (the reference), another one in
DEVICE, in HOST only, on DISK only (its file in the page cache, or not), or a new one, timed
from its acknowledged upload."""

ChurnBy = Literal["upload", "load"]
"""What happens while streams decode: adapters are uploaded and activated, or adapters on DISK
are only activated."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles and range of several samples, in milliseconds."""

    p50: float
    p99: float
    low: float
    high: float


class CaseFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one case.

    Attributes:
        first_token_ms: time from the request to the first token.
        delta_ms: ``first_token_ms`` minus that of ``same`` in the same round, so that a
            temporary slowdown of the machine cancels out.
        load_ms: time that the request waited for its adapter, as the server reports.
    """

    first_token_ms: Spread
    delta_ms: Spread
    load_ms: Spread
    samples_ms: list[float]


class ChurnFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of streams that decode while adapters are brought to DEVICE.

    Attributes:
        by: how adapters are brought there.
        publishes: number of uploads (each acknowledged, loaded and activated), or of
            activations.
        publish_ms: time from the start of an upload or activation until the adapter is in
            DEVICE.
        quiet_ms: time between tokens in phases without uploads.
        inside_ms: time between tokens during an upload or load; ``outside_ms``: in the rest of
            those phases, None if uploads followed one another without a break.
        longest_ms: the longest of ``inside_ms``; ``steps``: this divided by the median of
            ``quiet_ms``.
    """

    by: ChurnBy = "upload"
    streams: int
    publishes: int
    publish_ms: Spread
    quiet_ms: Spread
    inside_ms: Spread
    outside_ms: Spread | None
    quiet_gaps: int
    inside_gaps: int
    longest_ms: float
    steps: float


class SwapResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="swap"):
    """The file that ``veneer-loadtest swap --json`` writes.

    Attributes:
        partial: whether the run was ended early; ``why`` gives the reason.
        summary: medians in milliseconds: ``first_token_ms`` (the same adapter again),
            ``device_delta_ms``, ``host_delta_ms``, ``disk_delta_ms`` (without the page
            cache if files could be dropped from it), ``disk_cached_delta_ms``,
            ``publish_to_first_token_ms``, ``churn_itl_p99_ratio`` (inside / quiet),
            ``churn_added_p99_ms`` (inside minus quiet), ``churn_max_stall_steps``.
    """

    format: int = FORMAT
    label: str = ""
    conditions: dict[str, Any]
    versions: dict[str, str]
    target: dict[str, str]
    workload: dict[str, int]
    cases: dict[str, CaseFigures]
    churn: ChurnFigures | None
    partial: bool
    why: str
    summary: dict[str, float]
