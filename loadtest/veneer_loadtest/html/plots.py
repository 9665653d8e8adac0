"""Plots of latencies, and of what happened over time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from veneer_loadtest.html.columns import Column
from veneer_loadtest.html.drawing import (
    BAD,
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    TIER_COLOURS,
    Plot,
    canvas,
    log_axis,
    svg_of,
    tiers_in_order,
)
from veneer_loadtest.html.words import amount, count, ms, spread
from veneer_loadtest.results import Distribution, Level, Timeline

__all__ = ["ROW", "latencies", "shade_warmup", "timelines"]

ROW: Final = 4
"""Runs beside each other in plots over time; more begin a new plot."""

_LEAST_MS: Final = 0.01
"""A logarithmic axis has no zero."""
_BINS: Final = 60
"""Of a timeline: more are noise to the eye."""

_KINDS: Final[tuple[tuple[str, str], ...]] = (
    ("First token", "first_token_ms"),
    ("From one token to the next", "inter_token_ms"),
    ("Whole request", "end_to_end_ms"),
)


def latencies(columns: Sequence[Column]) -> Plot:
    """Cumulative distributions of the three latencies."""
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
        _legend(figure, columns, marks=True)
        svg = svg_of(figure, "latency")
    return Plot(title, _latency_caption(kinds), svg)


Rows = list[tuple[int, Column, Distribution]]


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
                markeredgecolor="white",
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
    if len(kinds[0][1]) == 1:
        words = {
            "First token": "First tokens: ",
            "From one token to the next": "times from one token to the next: ",
            "Whole request": "whole requests: ",
        }
        return "; ".join(words[name] + spread(rows[0][2]) for name, rows in kinds) + "."
    name, rows = kinds[0]
    told = [f"{column.short}: {spread(values)}" for _, column, values in rows[:4]]
    more = f"; and {len(rows) - 4} more" if len(rows) > 4 else ""
    return f"{name}: {'; '.join(told)}{more}."


def _legend(figure: Any, columns: Sequence[Column], *, marks: bool) -> None:
    """Above the plots, one entry a run, with the p50 and p99 marks where they are drawn."""
    from matplotlib.lines import Line2D

    if len(columns) == 1 and not marks:
        return
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[number],
            linestyle=DASHES[number],
            marker=MARKERS[number] if marks else "",
            markeredgecolor="white",
            markersize=7,
            label=column.short + (" (marks: p50 and p99)" if len(columns) == 1 else ""),
        )
        for number, column in enumerate(columns)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(columns)))


def timelines(columns: Sequence[Column]) -> list[Plot]:
    """Throughput, requests, first tokens and adapter loads over time; runs beside each
    other, on the same scales."""
    told = [column for column in columns if sum(column.level.timeline.due)]
    if not told:
        return [Plot("Over time", "No request was sent.")]
    parts = [told[begin : begin + ROW] for begin in range(0, len(told), ROW)]
    return [_timeline(part, number, len(parts)) for number, part in enumerate(parts)]


def _timeline(columns: Sequence[Column], number: int, parts: int) -> Plot:
    title = "Over time" + (f", part {number + 1} of {parts}" if parts > 1 else "")
    heights = [1.25, 1.25, 1.0, 1.25, 0.5]
    with canvas(
        5,
        len(columns),
        7.4,
        sharey="row",
        sharex="col",
        height_ratios=heights,
    ) as (figure, axes):
        tiers = tiers_in_order(list({each.tier for c in columns for each in c.level.loads}))
        for place, column in enumerate(columns):
            _draw_timeline([row[place] for row in axes], column, tiers, len(columns) > 1)
        names = ("new tokens/s", "requests/s", "running\nrequests", "first token,\nms", "waits")
        for row, name in zip(axes, names, strict=True):
            row[0].set_ylabel(name)
        figure.align_ylabels()
        _timeline_legend(figure, columns)
        svg = svg_of(figure, f"timeline{number}")
    caption = (
        " ".join(_timeline_caption(column, named=len(columns) > 1) for column in columns)
        + " Shaded: warm-up; dotted: from here on no request was begun. Under the first tokens a"
        " tick for each request that waited for its adapter, in the row of the tier where that"
        " was."
    )
    return Plot(title, caption, svg)


def _draw_timeline(
    axes: Sequence[Any], column: Column, tiers: Sequence[str], named: bool
) -> None:
    tokens, requests, running, first, loads = axes
    line = column.level.timeline
    step = max(1, math.ceil(len(line.due) / _BINS))
    edges = [min(n, len(line.due)) * line.bucket_s for n in range(0, len(line.due) + step, step)]

    def rates(values: Sequence[int]) -> list[float]:
        return [
            value / (len(values[at : at + step]) * line.bucket_s)
            for at, value in zip(range(0, len(values), step), _merged(values, step, sum))
        ]

    tokens.stairs(rates(line.tokens), edges, color=COLOURS[0], fill=True, alpha=0.25)
    tokens.stairs(rates(line.tokens), edges, color=COLOURS[0], linewidth=1.2)
    requests.stairs(rates(line.due), edges, color=GREY, linewidth=1.2)
    requests.stairs(rates(line.ended), edges, color=COLOURS[2], linestyle=DASHES[1])
    if any(line.failed):
        requests.stairs(
            rates(line.failed), edges, color=BAD, fill=True, alpha=0.6, hatch="////"
        )
    running.stairs(_merged(line.running, step, max), edges, color=COLOURS[3], fill=True)
    middle = [(n + 0.5) * line.bucket_s for n in range(len(line.due))]
    _points(first, middle, line.first_token_max_ms, "^", COLOURS[1])
    _points(first, middle, line.first_token_p50_ms, "o", COLOURS[0])
    for row, tier in enumerate(tiers):
        at = [each.at_s for each in column.level.loads if each.tier == tier]
        colour = TIER_COLOURS.get(tier, GREY)
        loads.plot(at, [row] * len(at), "|", color=colour, markersize=9, markeredgewidth=1.4)
    loads.set_yticks(range(len(tiers)), [tier.upper() for tier in tiers])
    loads.set_ylim(max(len(tiers), 1) - 0.4, -0.6)
    loads.grid(visible=False)
    end = len(line.due) * line.bucket_s
    for axis in axes:
        axis.set_xlim(0, end)
        shade_warmup(axis, column, end)
    for axis in (tokens, requests, running, first):
        axis.set_ylim(bottom=0)
    loads.set_xlabel("seconds since the load began")
    if named:
        tokens.set_title(column.short)


def shade_warmup(axis: Any, column: Column, end: float) -> None:
    """The warm-up grey, and a line where the load ended and its requests ran on."""
    if column.load.warmup_s:
        axis.axvspan(0, column.load.warmup_s, color="#9ca3af", alpha=0.22, linewidth=0)
    if 0 < column.load.duration_s < end:
        axis.axvline(column.load.duration_s, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))


def _merged(
    values: Sequence[int], step: int, by: Callable[[Sequence[int]], int]
) -> list[int]:
    return [by(values[at : at + step]) for at in range(0, len(values), step)]


def _points(
    axis: Any, at: Sequence[float], values: Sequence[float | None], mark: str, colour: str
) -> None:
    told = [(x, y) for x, y in zip(at, values, strict=False) if y is not None]
    axis.plot(
        [x for x, _ in told],
        [y for _, y in told],
        mark,
        color=colour,
        markersize=4,
        markeredgecolor="white",
        markeredgewidth=0.4,
    )


def _timeline_legend(figure: Any, columns: Sequence[Column]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=GREY, label="requests due"),
        Line2D([], [], color=COLOURS[2], linestyle=DASHES[1], label="requests ended"),
        Line2D([], [], color=COLOURS[0], marker="o", linestyle="", label="first token, p50"),
        Line2D([], [], color=COLOURS[1], marker="^", linestyle="", label="first token, longest"),
    ]
    if any(any(column.level.timeline.failed) for column in columns):
        handles.insert(2, Patch(color=BAD, alpha=0.6, hatch="////", label="requests failed"))
    figure.legend(handles=handles, loc="outside upper left", ncols=5)


def _timeline_caption(column: Column, *, named: bool) -> str:
    level, line = column.level, column.level.timeline
    waits = Counter(each.tier for each in level.loads)
    whence = ", ".join(f"{waits[tier]:,} from {tier.upper()}" for tier in tiers_in_order([*waits]))
    waited = count(len(level.loads) + level.loads_left_out, "request")
    slowest = _longest(line)
    told = (
        f"{amount(level.tokens_per_s)} new tokens/s in the measured time, at most "
        f"{count(max(line.running), 'request')} at once, "
        f"{count(sum(line.failed), 'failure') if any(line.failed) else 'no failure'}; "
        + (f"the slowest first token took {ms(slowest)}; " if slowest is not None else "")
        + (f"{waited} waited for an adapter ({whence})." if waits else "none waited for an adapter.")
    )
    return f"{column.short}: {told}" if named else told


def _longest(line: Timeline) -> float | None:
    return max((value for value in line.first_token_max_ms if value is not None), default=None)
