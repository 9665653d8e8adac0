"""The plot of latencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from veneer_loadtest.html.columns import ReportColumn
from veneer_loadtest.html.drawing import (
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    PAPER,
    Plot,
    canvas,
    legend,
    log_axis,
    result_lines,
    svg_of,
)
from veneer_loadtest.html.words import spread
from veneer_loadtest.results import Distribution, Level

_LEAST_MS: Final = 0.01
"""A logarithmic axis has no zero."""

_KINDS: Final[tuple[tuple[str, str], ...]] = (
    ("First token", "first_token_ms"),
    ("From one token to the next", "inter_token_ms"),
    ("Whole request", "end_to_end_ms"),
)


def latencies(columns: Sequence[ReportColumn]) -> Plot:
    """Plot the cumulative distributions of the three latencies."""
    title = "Latency: what share came within which time"
    kinds = [
        (name, rows)
        for name, field in _KINDS
        if (rows := [(n, c, v) for n, c in enumerate(columns) if (v := _of(c.level, field))])
    ]
    if not kinds:
        return Plot(title, "No request got a token in the measured time.")
    with canvas(1, len(kinds), 3.5, sharey=True) as (figure, axes):
        for axis, (name, rows) in zip(axes[0], kinds, strict=True):
            _cdf(axis, name, rows)
        axes[0][0].set_ylabel("share of all, %")
        marks = " (marks: p50 and p99)" if len(columns) == 1 else ""
        names = [column.short + marks for column in columns]
        legend(figure, result_lines(names, markeredgecolor=PAPER, markersize=7))
        svg = svg_of(figure, "latency", title)
    return Plot(title, _latency_caption(kinds), svg)


Rows = list[tuple[int, ReportColumn, Distribution]]


def _of(level: Level, field: str) -> Distribution | None:
    found: Distribution | None = getattr(level, field)
    return found


def _cdf(axis: Any, name: str, rows: Rows) -> None:
    longest = max(values.max for _, _, values in rows)
    unit, scale = ("s", 1e3) if longest >= 10_000 else ("ms", 1.0)
    least = math.inf
    for number, _, values in rows:
        points = [(max(at, _LEAST_MS) / scale, 100 * part) for at, part in values.cdf]
        least = min(least, points[0][0])
        axis.plot(
            [at for at, _ in points],
            [part for _, part in points],
            color=COLOURS[number],
            linestyle=DASHES[number],
        )
        for at, part in ((values.p50, 50), (values.p99, 99)):
            axis.plot(
                [max(at, _LEAST_MS) / scale],
                [part],
                MARKERS[number],
                color=COLOURS[number],
                markeredgecolor=PAPER,
                markersize=7,
                clip_on=False,
                zorder=3,
            )
    for part in (50, 99):
        axis.axhline(part, color=GREY, linewidth=0.6, linestyle=(0, (1, 2)), zorder=1)
    log_axis(axis.xaxis, least, max(longest, _LEAST_MS) / scale)
    axis.set_ylim(0, 102)
    axis.set_yticks([0, 25, 50, 75, 99], ["0", "25", "50", "75", "99"])
    axis.set_xlabel(f"{unit}, logarithmic")
    axis.set_title(name)


def _latency_caption(kinds: Sequence[tuple[str, Rows]]) -> str:
    """Describe all three latencies of one run, or only the first tokens of several runs."""
    things = {
        "First token": "the first tokens",
        "From one token to the next": "the tokens after them",
        "Whole request": "the requests",
    }
    name, rows = kinds[0]
    if len(rows) == 1:
        told = "; ".join(spread(things[kind], own[0][2]) for kind, own in kinds)
        return f"{told[0].upper()}{told[1:]}."
    lines = [f"{column.short}: {spread(things[name], values)}." for _, column, values in rows]
    return "\n".join([*lines, "Marks: p50 and p99."])
