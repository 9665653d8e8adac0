"""The result of ``swap``; milliseconds."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from veneer_loadtest.results.facts import FORMAT

__all__ = ["Case", "CaseFigures", "ChurnBy", "ChurnFigures", "Spread", "SwapResult"]

Case = Literal["same", "device", "host", "disk", "disk_cold", "publish"]
"""What the adapter of a first token was: the one before (the yardstick), another one in
DEVICE, in HOST only, on DISK only (its file in the page cache, or not), or a new one from
its acknowledged upload on."""

ChurnBy = Literal["upload", "load"]
"""What goes on beside the streams: adapters uploaded and activated, or such as are on
DISK activated only."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Of several samples."""

    p50: float
    p99: float
    low: float
    high: float


class CaseFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One case.

    Attributes:
        first_token_ms: from the request.
        delta_ms: its first token less that of ``same`` in the same round: paired, so that
            what slows the machine for a while cancels out.
        load_ms: waiting for the adapter, as the server says.
    """

    first_token_ms: Spread
    delta_ms: Spread
    load_ms: Spread
    samples_ms: list[float]


class ChurnFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Streams that decode while adapters come to DEVICE beside them.

    Attributes:
        by: how they come.
        publishes: uploads, each acknowledged, loaded and activated; or activations.
        publish_ms: from the start of one to the adapter's being in DEVICE.
        quiet_ms: time between tokens in phases without uploads.
        inside_ms: between tokens of which the later came while an adapter was uploaded or
            loaded; ``outside_ms``: the rest of those phases, None where uploads followed
            one another without a break.
        longest_ms: the longest one inside; ``steps``: it in median quiet ones.
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
        partial: the run was ended before its time; ``why`` says by what.
        summary: medians, milliseconds: ``first_token_ms`` (the same adapter again),
            ``device_delta_ms``, ``host_delta_ms``, ``disk_delta_ms`` (without the page
            cache where that could be had), ``disk_cached_delta_ms``,
            ``publish_to_first_token_ms``, ``churn_itl_p99_ratio`` (inside / quiet),
            ``churn_added_p99_ms`` (inside less quiet), ``churn_max_stall_steps``.
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
