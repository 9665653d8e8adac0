"""Plots of what happened over time."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from veneer_loadtest.html.columns import ReportColumn
from veneer_loadtest.html.drawing import (
    BAD,
    COLOURS,
    GREY,
    PAPER,
    TIER_COLOURS,
    Plot,
    canvas,
    from_zero,
    legend,
    seconds_axis,
    svg_of,
    tiers_in_order,
    whole_numbers,
)
from veneer_loadtest.html.words import amount, count, ms
from veneer_loadtest.results import Timeline

ROW: Final = 4
"""Runs beside each other in plots over time; more begin a new plot."""

_BINS: Final = 60
_LEAST_BIN_S: Final = 1.0
"""Limits on the bins of a timeline: more or shorter bins look like noise."""


def timelines(columns: Sequence[ReportColumn]) -> list[Plot]:
    """Throughput, requests, first tokens and adapter loads over time; runs beside each
    other, on the same scales."""
    told = [column for column in columns if sum(column.level.timeline.due)]
    if not told:
        return [Plot("Over time", "No request was sent.")]
    parts = [told[begin : begin + ROW] for begin in range(0, len(told), ROW)]
    return [_timeline(part, number, len(parts)) for number, part in enumerate(parts)]


def _timeline(columns: Sequence[ReportColumn], number: int, parts: int) -> Plot:
    title = "Over time" + (f", part {number + 1} of {parts}" if parts > 1 else "")
    tiers = tiers_in_order(list({each.tier for c in columns for each in c.level.loads}))
    end = max(len(c.level.timeline.due) * c.level.timeline.bucket_s for c in columns)
    heights = [1.25, 1.25, 1.0, 1.25] + ([0.5] if tiers else [])
    with canvas(
        len(heights),
        len(columns),
        1.4 * sum(heights),
        sharey="row",
        sharex=True,
        height_ratios=heights,
    ) as (figure, axes):
        for place, column in enumerate(columns):
            own = [row[place] for row in axes]
            _draw_timeline(own, column)
            if tiers:
                _draw_waits(own[-1], column, tiers)
            for axis in own:
                shade_warmup(axis, column, end)
            seconds_axis(own[-1], 0.0, end)
            if len(columns) > 1:
                own[0].set_title(column.short)
        whole_numbers(axes[2][0])
        names = ("new tokens/s", "requests/s", "requests\nrunning", "first token, ms")
        for row, name in zip(axes, names, strict=False):
            from_zero(row[0], name)
        if tiers:
            axes[-1][0].set_ylabel("waits for\nadapters")
        figure.align_ylabels()
        _timeline_legend(figure, columns)
        svg = svg_of(figure, f"timeline{number}", title)
    lines = [_timeline_caption(column, named=len(columns) > 1) for column in columns]
    lines += _key(columns, end, waits=bool(tiers))
    return Plot(title, "\n".join(lines), svg)


def _key(columns: Sequence[ReportColumn], end: float, *, waits: bool) -> list[str]:
    """Explain the marks that were drawn."""
    told = []
    if any(column.load.warmup_s for column in columns):
        told.append("Shaded: warm-up.")
    if any(0 < column.load.duration_s < end for column in columns):
        told.append("Dotted: no request was begun after it.")
    if waits:
        told.append("A tick: a request waited for its adapter, which was found in that tier.")
    return [" ".join(told)] if told else []


def _draw_timeline(axes: Sequence[Any], column: ReportColumn) -> None:
    tokens, requests, running, first = axes[:4]
    line = column.level.timeline
    starts = _starts(line)
    edges = [start * line.bucket_s for start in [*starts, len(line.due)]]

    def rates(values: Sequence[int]) -> list[float]:
        sums = _merged(values, starts, sum)
        widths = [end - begin for begin, end in itertools.pairwise(edges)]
        return [total / width for total, width in zip(sums, widths, strict=True)]

    tokens.stairs(rates(line.tokens), edges, color=COLOURS[0], fill=True, alpha=0.25)
    tokens.stairs(rates(line.tokens), edges, color=COLOURS[0], linewidth=1.2)
    requests.stairs(rates(line.due), edges, color=GREY, fill=True, alpha=0.35)
    requests.stairs(rates(line.ended), edges, color=COLOURS[2], linewidth=1.4)
    if any(line.failed):
        requests.stairs(rates(line.failed), edges, color=BAD, fill=True, alpha=0.45)
    running.stairs(_merged(line.running, starts, max), edges, color=COLOURS[3], fill=True)
    middle = [(n + 0.5) * line.bucket_s for n in range(len(line.due))]
    _points(first, middle, line.first_token_max_ms, "^", COLOURS[1])
    _points(first, middle, line.first_token_p50_ms, "o", COLOURS[0])


def _draw_waits(axis: Any, column: ReportColumn, tiers: Sequence[str]) -> None:
    """Draw a row of ticks for each tier."""
    for row, tier in enumerate(tiers):
        at = [each.at_s for each in column.level.loads if each.tier == tier]
        colour = TIER_COLOURS.get(tier, GREY)
        axis.plot(at, [row] * len(at), "|", color=colour, markersize=9, markeredgewidth=1.4)
    axis.set_yticks(range(len(tiers)), [tier.upper() or "not reported" for tier in tiers])
    axis.set_ylim(len(tiers) - 0.4, -0.6)
    axis.grid(visible=False)


def shade_warmup(axis: Any, column: ReportColumn, end: float) -> None:
    """Shade the warm-up, and draw a line where the load ended but requests still ran."""
    if column.load.warmup_s:
        axis.axvspan(0, column.load.warmup_s, color="#9ca3af", alpha=0.22, linewidth=0)
    if 0 < column.load.duration_s < end:
        axis.axvline(column.load.duration_s, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))


def _starts(line: Timeline) -> list[int]:
    """Return the first bucket of each bin; buckets left at the end belong to the last bin."""
    buckets = len(line.due)
    step = max(1, math.ceil(buckets / _BINS), round(_LEAST_BIN_S / line.bucket_s))
    return [number * step for number in range(max(1, buckets // step))]


def _merged(
    values: Sequence[int], starts: Sequence[int], by: Callable[[Sequence[int]], int]
) -> list[int]:
    ends = [*starts[1:], len(values)]
    return [by(values[begin:end]) for begin, end in zip(starts, ends, strict=True)]


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
        markeredgecolor=PAPER,
        markeredgewidth=0.4,
    )


def _timeline_legend(figure: Any, columns: Sequence[ReportColumn]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=GREY, alpha=0.35, label="requests due"),
        Line2D([], [], color=COLOURS[2], label="requests ended"),
        Line2D([], [], color=COLOURS[0], marker="o", linestyle="", label="first token, p50"),
        Line2D(
            [], [], color=COLOURS[1], marker="^", linestyle="", label="first token, longest"
        ),
    ]
    if any(any(column.level.timeline.failed) for column in columns):
        handles.insert(2, Patch(color=BAD, alpha=0.45, label="requests failed"))
    legend(figure, handles, 5)


def _timeline_caption(column: ReportColumn, *, named: bool) -> str:
    level, line = column.level, column.level.timeline
    waits = Counter(each.tier for each in level.loads)
    whence = ", ".join(
        f"{waits[tier]:,} from {tier.upper()}" for tier in tiers_in_order([*waits])
    )
    waited = count(len(level.loads) + level.loads_left_out, "request")
    slowest = _longest(line)
    told = (
        f"{amount(level.tokens_per_s)} new tokens/s in the measured time. Of the whole load"
        f"{', warm-up included' if column.load.warmup_s else ''}: at most "
        f"{count(max(line.running), 'request')} at once, "
        f"{count(sum(line.failed), 'failure') if any(line.failed) else 'no failure'}; "
        + (f"the slowest first token took {ms(slowest)}; " if slowest is not None else "")
        + (
            f"{waited} waited for an adapter ({whence})."
            if waits
            else "none waited for an adapter."
        )
    )
    return f"{column.short}: {told}" if named else told


def _longest(line: Timeline) -> float | None:
    return max((value for value in line.first_token_max_ms if value is not None), default=None)
