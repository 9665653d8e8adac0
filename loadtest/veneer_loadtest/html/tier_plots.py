"""Plots of which tier adapters were in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from veneer_loadtest.html.columns import ReportColumn
from veneer_loadtest.html.drawing import (
    COLOURS,
    GREY,
    LABEL,
    TIER_COLOURS,
    TIER_DASHES,
    Plot,
    canvas,
    from_zero,
    legend,
    seconds_axis,
    svg_of,
    tiers_in_order,
    whole_numbers,
)
from veneer_loadtest.html.timeline import ROW, shade_warmup
from veneer_loadtest.html.words import bytes_words, count, ms
from veneer_loadtest.results import TierShares

_HATCHES: Final = ("", "///", "\\\\\\", "---", "|||", "xx", "++", "//")
_WIDTHS: Final = {"device": 2.6}
"""Points; wide, so that another line above it does not hide it."""
_WIDEST: Final = 0.1
"""Share of the plot's height that a bar may take."""
_LABELLED: Final = 12
"""Most bars with room for a time above each."""


def residencies(columns: Sequence[ReportColumn]) -> list[Plot]:
    """Adapters and bytes by tier over time; runs beside each other."""
    told = [(c, c.level.residency) for c in columns if c.level.residency is not None]
    if not told:
        why = "The tiers of adapters are unknown: the server's metrics were not read"
        return [Plot("Adapters by tier", f"{why} (--metrics).")]
    parts = [told[begin : begin + ROW] for begin in range(0, len(told), ROW)]
    return [_residency(part, number, len(parts)) for number, part in enumerate(parts)]


def _residency(
    told: Sequence[tuple[ReportColumn, TierShares]], number: int, parts: int
) -> Plot:
    title = "Adapters by tier" + (f", part {number + 1} of {parts}" if parts > 1 else "")
    tiers = tiers_in_order(list({tier for _, held in told for tier in held.adapters}))
    with canvas(2, len(told), 3.9, sharey="row", sharex=True) as (figure, axes):
        begin = min([0.0, *(at for _, held in told for at in held.at_s)])
        end = max([0.0, *(at for _, held in told for at in held.at_s)])
        for place, (column, held) in enumerate(told):
            for tier in tiers:
                style = {
                    "color": TIER_COLOURS.get(tier, GREY),
                    "linestyle": TIER_DASHES.get(tier, "-."),
                    "linewidth": _WIDTHS.get(tier, 1.4),
                    "where": "post",
                }
                if tier in held.adapters:
                    axes[0][place].step(held.at_s, held.adapters[tier], **style)
                if tier in held.bytes:
                    megabytes = [each / 1e6 for each in held.bytes[tier]]
                    axes[1][place].step(held.at_s, megabytes, **style)
            for row in axes:
                shade_warmup(row[place], column, end)
            seconds_axis(axes[1][place], begin, end)
            if len(told) > 1:
                axes[0][place].set_title(column.short)
        whole_numbers(axes[0][0])
        from_zero(axes[0][0], "adapters", 1.12)
        from_zero(axes[1][0], "MB", 1.12)
        figure.align_ylabels()
        _tier_legend(figure, tiers)
        svg = svg_of(figure, f"residency{number}", title)
    caption = "\n".join(_residency_caption(c, held, len(told) > 1) for c, held in told)
    return Plot(title, caption, svg)


def _tier_legend(figure: Any, tiers: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=TIER_COLOURS.get(tier, GREY),
            linestyle=TIER_DASHES.get(tier, "-."),
            label=tier.upper(),
        )
        for tier in tiers
    ]
    legend(figure, handles, len(handles))


def _residency_caption(column: ReportColumn, held: TierShares, named: bool) -> str:
    # The metrics count everything that the server holds, for other levels and callers too.
    most = {tier: max(held.adapters[tier], default=0) for tier in held.adapters}
    parts = [
        f"{most[tier]:,} in {tier.upper()} ({bytes_words(max(held.bytes.get(tier) or [0]))})"
        for tier in tiers_in_order([*most])
    ]
    asked = column.level.adapters
    told = f"the load asked for {count(asked, 'adapter')}; the server held "
    told += f"at most {' and '.join(parts)}" if parts else "none"
    if max(most.values(), default=0) > asked:
        told += ", including adapters other than the load's"
    server = column.level.server
    if server is not None:
        evicted = {key: n for key, n in sorted(server.evictions.items()) if n}
        whence = ", ".join(f"{n:,} {_eviction(key)}" for key, n in evicted.items())
        told += f"; {'evicted: ' + whence if evicted else 'nothing was evicted'}"
    return f"{column.short}: {told}." if named else f"{told[0].upper()}{told[1:]}."


def _eviction(key: str) -> str:
    tier, _, cause = key.partition(" ")
    return f"from {tier.upper()} for {cause}" if cause else f"from {tier.upper()}"


def first_token_by_tier(columns: Sequence[ReportColumn]) -> Plot:
    """Plot p50 and p99 as bars: a group for each tier, a bar for each run."""
    title = "First token by where the adapter was found"
    found = {
        tier
        for column in columns
        for tier, split in column.level.by_tier.items()
        if split.first_token_p50_ms is not None
    }
    tiers = tiers_in_order([*found])
    if not set(tiers) - {"none"}:
        return Plot(title, "The server reported for no request where its adapter was found.")
    with canvas(1, 1, 3.4) as (figure, axes):
        _tier_bars(axes[0][0], columns, tiers)
        _bar_legend(figure, columns)
        svg = svg_of(figure, "tiers", title)
    return Plot(title, "\n".join(_tier_caption(c, len(columns) > 1) for c in columns), svg)


def _tier_bars(axis: Any, columns: Sequence[ReportColumn], tiers: Sequence[str]) -> None:
    width = min(0.8 / len(columns), _WIDEST * len(tiers))
    for place, tier in enumerate(tiers):
        for number, column in enumerate(columns):
            split = column.level.by_tier.get(tier)
            if split is None or split.first_token_p50_ms is None:
                continue
            p50, p99 = split.first_token_p50_ms, split.first_token_p99_ms or 0.0
            at = place + width * (number + 0.5 - len(columns) / 2)
            colour = COLOURS[number]
            size = width * 0.86
            axis.bar(at, p99, size, facecolor=colour, alpha=0.22)
            axis.bar(at, p99, size, facecolor="none", edgecolor=colour, hatch=_HATCHES[number])
            axis.bar(at, p50, size * 0.5, facecolor=colour)
            text = _bar_text(split.requests, p50, p99, len(tiers) * len(columns))
            axis.annotate(
                text,
                (at, p99),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=LABEL,
            )
    axis.set_xlim(-0.5, len(tiers) - 0.5)
    axis.set_xticks(range(len(tiers)), [_tier_name(tier) for tier in tiers])
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("tier in which the server found the adapter")
    from_zero(axis, "first token, ms", 1.25)


def _bar_text(requests: int, p50: float, p99: float, bars: int) -> str:
    """Return as much text as there is room for."""
    if bars > _LABELLED:
        return f"{requests:,}"
    between = " / " if bars <= _LABELLED // 2 else "\n"
    return f"{ms(p50)}{between}{ms(p99)}\nn = {requests:,}"


def _tier_name(tier: str) -> str:
    return "no adapter, or not reported" if tier == "none" else tier.upper()


def _bar_legend(figure: Any, columns: Sequence[ReportColumn]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=f"{COLOURS[number]}38",
            edgecolor=COLOURS[number],
            hatch=_HATCHES[number],
            label=column.short,
        )
        for number, column in enumerate(columns)
        if len(columns) > 1
    ]
    handles += [
        Patch(facecolor=GREY, label="p50 (narrow)"),
        Patch(facecolor=f"{GREY}38", edgecolor=GREY, label="p99 (wide); above: requests"),
    ]
    legend(figure, handles, 5)


def _tier_caption(column: ReportColumn, named: bool) -> str:
    splits = {tier: s for tier, s in column.level.by_tier.items() if tier != "none"}
    whole = sum(split.requests for split in splits.values())
    told: list[str] = []
    for tier in tiers_in_order([*splits]):
        requests, p50 = splits[tier].requests, splits[tier].first_token_p50_ms
        of = "" if told else f" of {count(whole, 'request')} found their adapter"
        half = "" if p50 is None else f" (half of their first tokens within {ms(p50)})"
        told.append(f"{requests:,}{of} in {tier.upper()}{half}")
    text = ", ".join(told) or "no tier was reported"
    return f"{column.short}: {text}." if named else f"{text[0].upper()}{text[1:]}."
