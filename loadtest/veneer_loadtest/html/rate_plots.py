"""Plots against the number of adapters, and against the rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer_loadtest.html.columns import MOST_DRAWN, ReportColumn, name_of
from veneer_loadtest.html.drawing import (
    BAD,
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    Plot,
    canvas,
    from_zero,
    legend,
    log_axis,
    named_legend,
    result_lines,
    svg_of,
)
from veneer_loadtest.html.words import amount, limits_words, ms, share, shortened
from veneer_loadtest.results import FindMaxResult, Level, LoadResult, Probe


def against_adapters(results: Sequence[LoadResult], columns: Sequence[ReportColumn]) -> Plot:
    """Throughput and first tokens against the number of adapters."""
    title = "Against the number of adapters"
    counts = sorted({column.level.adapters for column in columns})
    if len(counts) < 2:
        told = f" ({counts[0]:,})" if counts else ""
        return Plot(title, f"All loads used the same number of adapters{told}.")
    with canvas(1, 2, 3.3) as (figure, axes):
        for number in range(min(len(results), MOST_DRAWN)):
            own = [column for column in columns if column.result == number]
            _adapter_lines(axes[0], own, number)
        for axis in axes[0]:
            _counts_axis(axis, counts)
        axes[0][0].set_title("Throughput")
        from_zero(axes[0][0], "new tokens/s")
        axes[0][1].set_title("First token")
        from_zero(axes[0][1], "p99, ms")
        names = [name_of(results, number) for number in range(len(results))]
        named_legend(figure, [shortened(name, 28) for name in names], dashed=True)
        svg = svg_of(figure, "adapters", title)
    return Plot(title, _adapters_caption(results, columns), svg)


def _adapter_lines(axes: Sequence[Any], columns: Sequence[ReportColumn], number: int) -> None:
    told = sorted(columns, key=lambda column: column.level.adapters)
    style = {
        "color": COLOURS[number],
        "linestyle": DASHES[number],
        "marker": MARKERS[number],
        "clip_on": False,
    }
    at = [column.level.adapters for column in told]
    axes[0].plot(at, [column.level.tokens_per_s for column in told], **style)
    first = [(c.level.adapters, v.p99) for c in told if (v := c.level.first_token_ms)]
    axes[1].plot([x for x, _ in first], [y for _, y in first], **style)


def _counts_axis(axis: Any, counts: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator

    if counts[0] > 0 and counts[-1] >= 5 * counts[0]:
        log_axis(axis.xaxis, counts[0], counts[-1])
        axis.set_xlabel("adapters, logarithmic")
    else:
        axis.set_xlabel("adapters")
    if len(counts) <= 10:
        axis.xaxis.set_major_locator(FixedLocator(counts))


def _adapters_caption(results: Sequence[LoadResult], columns: Sequence[ReportColumn]) -> str:
    parts = []
    for number in range(len(results)):
        own = sorted(
            (column for column in columns if column.result == number),
            key=lambda column: column.level.adapters,
        )
        if not own:
            continue
        ends = [own[0].level, own[-1].level] if len(own) > 1 else [own[0].level]
        told = ", ".join(
            f"with {level.adapters:,}: {amount(level.tokens_per_s)} tokens/s"
            + _first_words(level)
            for level in ends
        )
        named = f"{name_of(results, number)}: " if len(results) > 1 else ""
        parts.append(f"{named}{told}." if named else f"{told[0].upper()}{told[1:]}.")
    return "\n".join(parts)


def _first_words(level: Level) -> str:
    first = level.first_token_ms
    return f" and a first token's p99 of {ms(first.p99)}" if first else ""


def against_rate(results: Sequence[LoadResult]) -> list[Plot]:
    """Plot the share that kept the limits at each rate of a find-max; skip other results."""
    found = [(n, r) for n, r in enumerate(results) if isinstance(r, FindMaxResult)]
    if not found:
        return []
    title = "Against the rate: the search for the highest that keeps the limits"
    told = [(n, r) for n, r in found if r.probes]
    if not told:
        return [Plot(title, "No rate was tried to the end.")]
    with canvas(1, 2, 3.5) as (figure, axes):
        for number, (_, result) in enumerate(told[:MOST_DRAWN]):
            _rate_lines(axes[0], result, number, alone=len(told) == 1)
        good, first = axes[0]
        good.set_ylim(0, 104)
        good.set_ylabel("good requests, %")
        good.set_title("Share that kept the limits")
        from_zero(first, "p99, ms")
        first.set_title("First token")
        for axis in axes[0]:
            axis.set_xlabel("requests/s sent")
            axis.set_xlim(left=0)
        _rate_legend(figure, [name_of(results, n) for n, _ in told])
        svg = svg_of(figure, "rate", title)
    several = len(results) > 1
    caption = "\n".join(
        (f"{name_of(results, n)}: " if several else "") + _rate_caption(r) for n, r in told
    )
    return [Plot(title, caption, svg)]


def _rate_lines(axes: Sequence[Any], result: FindMaxResult, number: int, alone: bool) -> None:
    probes = sorted(result.probes, key=lambda probe: probe.rate)
    colour, dashes = COLOURS[number], DASHES[number]
    good = [(p, 100 * p.level.slo.share) for p in probes if p.level.slo is not None]
    first = [(p, v.p99) for p in probes if (v := p.level.first_token_ms)]
    for axis, points in zip(axes, (good, first), strict=True):
        axis.plot(
            [p.rate for p, _ in points],
            [value for _, value in points],
            color=colour,
            linestyle=dashes,
        )
        for kept in (True, False):
            own = [(p.rate, value) for p, value in points if p.kept is kept]
            axis.plot(
                [x for x, _ in own],
                [y for _, y in own],
                MARKERS[number] if kept else "x",
                color=colour,
                markersize=5.5,
                markeredgewidth=1.8 if not kept else 0.5,
                clip_on=False,
                zorder=3,
            )
        if result.max_rate:
            axis.axvline(result.max_rate, color=colour, linewidth=1, linestyle=(0, (1, 1.5)))
    limits = [(axes[0], 100 * result.share, f"{share(result.share)} must be good")]
    if result.limits.ttft_ms is not None:
        limits.append((axes[1], result.limits.ttft_ms, f"limit {ms(result.limits.ttft_ms)}"))
    for axis, value, text in limits:
        axis.axhline(value, color=BAD, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        if alone:
            _note(axis, (1.0, value), text, BAD, ("axes fraction", "data"))
    if alone and result.max_rate:
        text = f" highest: {amount(result.max_rate)}/s"
        _note(axes[0], (result.max_rate, 0.02), text, colour, ("data", "axes fraction"))


def _note(axis: Any, at: tuple[float, float], text: str, colour: str, xy: Any) -> None:
    right = xy[0] == "axes fraction"
    axis.annotate(
        text,
        at,
        (-2, -3) if right else (2, 2),
        xycoords=xy,
        textcoords="offset points",
        ha="right" if right else "left",
        va="top" if right else "bottom",
        fontsize=8,
        color=colour,
    )


def _rate_legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    own = [shortened(name, 28) if len(names) > 1 else "kept the limits" for name in names]
    handles = result_lines(own)
    handles += [
        Line2D([], [], color=GREY, marker="x", linestyle="", label="broke the limits"),
        Line2D([], [], color=BAD, linestyle=(0, (4, 2)), linewidth=1, label="limit"),
        Line2D([], [], color=GREY, linestyle=(0, (1, 1.5)), linewidth=1, label="highest rate"),
    ]
    legend(figure, handles, 5)


def _rate_caption(result: FindMaxResult) -> str:
    wanted = f"{share(result.share)} of the requests must keep: {limits_words(result.limits)}"
    if not result.max_rate:
        lowest = min(probe.rate for probe in result.probes)
        return f"No rate kept the limits, not even {amount(lowest)} requests/s ({wanted})."
    broke = sorted(
        (p for p in result.probes if not p.kept and p.rate > result.max_rate),
        key=lambda probe: probe.rate,
    )
    at = next((p for p in result.probes if p.rate == result.max_rate), None)
    told = f"{amount(result.max_rate)} requests/s is the highest rate that kept the limits"
    told += f" ({_good(at)} good)" if at is not None and at.level.slo else ""
    if broke:
        told += f"; {amount(broke[0].rate)} broke them ({_good(broke[0])} good)"
    elif not result.bounded:
        told += "; no rate was seen to break them, so the server may do more"
    return f"{told}. {wanted}."


def _good(probe: Probe) -> str:
    return share(probe.level.slo.share) if probe.level.slo else "unknown"
