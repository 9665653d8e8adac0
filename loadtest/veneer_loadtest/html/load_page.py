"""The page of loads: ``run`` and ``find-max``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from veneer_loadtest.html import plots, rate_plots, tables, tier_plots, timeline
from veneer_loadtest.html.cautions import banners
from veneer_loadtest.html.columns import Column, columns_of, drawn, name_of, pairs
from veneer_loadtest.html.document import banner_html, document, figure_html
from veneer_loadtest.html.drawing import Plot
from veneer_loadtest.html.words import amount, count, ms, rate_words, share
from veneer_loadtest.results import FindMaxResult, LoadResult

__all__ = ["load_page"]


def load_page(results: Sequence[LoadResult], names: Sequence[str] = ()) -> str:
    """The whole document."""
    columns = columns_of(results, names)
    shown = drawn(columns)
    return document(
        _title(results, names),
        _lede(results, columns, names),
        [
            *(banner_html(banner) for banner in banners(results, columns, names)),
            "<h2>What was run</h2>",
            tables.facts(results, names),
            "<h2>Key figures</h2>",
            _key_figures(results, columns),
            "<h2>Plots</h2>",
            *_plots(results, columns, shown),
            "<h2>Tables</h2>",
            *_section("Errors by reason", tables.errors(columns), "No request failed."),
            *_section("By tier", tables.by_tier(columns), "No request ended."),
            *_section("Most asked for adapters", tables.adapters(shown), "No request ended."),
            *_section(
                "What the server counted, warm-up included",
                tables.server_counts(columns),
                "The server's metrics were not read (--metrics).",
            ),
        ],
        "Written by veneer-loadtest. p50, p90, p99: the time within which so many of a "
        "hundred came. Times are the client's, of requests due in the measured time.",
    )


def _title(results: Sequence[LoadResult], names: Sequence[str]) -> str:
    kind = "Search for the highest rate" if _searches(results) else "Load test"
    if len(results) > 1:
        return f"{kind}, {len(results)} results"
    told = [name for n in range(len(results)) if (name := name_of(results, n, names))]
    return f"{kind}: {', '.join(told)}" if told else kind


def _searches(results: Sequence[LoadResult]) -> bool:
    return all(isinstance(result, FindMaxResult) for result in results)


def _lede(
    results: Sequence[LoadResult], columns: Sequence[Column], names: Sequence[str]
) -> list[str]:
    """What came out, in a sentence for each result."""
    told = []
    for number, result in enumerate(results):
        own = [column for column in columns if column.result == number]
        name = f"{name_of(results, number, names)}: " if len(results) > 1 else ""
        if isinstance(result, FindMaxResult) and result.max_rate:
            told.append(
                f"{name}{rate_words(result.max_rate)} is the highest rate at which "
                f"{share(result.share)} of the requests kept the limits."
            )
        elif isinstance(result, FindMaxResult):
            told.append(f"{name}no rate kept the limits.")
        elif not own:
            told.append(f"{name}nothing was measured.")
        else:
            told.append(name + _level_words(own[-1]))
    return told


def _level_words(column: Column) -> str:
    level = column.level
    first = level.first_token_ms
    failed = level.requests.failed
    return (
        f"{count(level.adapters, 'adapter')}, {amount(level.requests_per_s)} requests/s "
        f"and {amount(level.tokens_per_s)} new tokens/s"
        + (f"; half of the first tokens came within {ms(first.p50)}" if first else "")
        + (f"; {count(failed, 'request')} failed" if failed else "; no request failed")
        + (f"; {share(level.slo.share)} kept the limits" if level.slo else "")
        + "."
    )


def _key_figures(results: Sequence[LoadResult], columns: Sequence[Column]) -> str:
    if not columns:
        return '<p class="note">Nothing was measured.</p>'
    note = ""
    if len(results) == 2 and not pairs(columns, 2):
        note = (
            '<p class="note">No ratios: the two runs are not of the same numbers of adapters.'
            "</p>"
        )
    return note + tables.key_figures(columns, len(results))


def _plots(
    results: Sequence[LoadResult], columns: Sequence[Column], shown: Sequence[Column]
) -> list[str]:
    found: list[Plot] = []
    note = []
    if len(shown) < len(columns):
        names = ", ".join(column.short for column in shown)
        note = [
            f'<p class="note">Plots over time and of latencies show {len(shown)} of '
            f"{len(columns)} loads: {escape(names)}. The tables have all.</p>"
        ]
    if shown:
        found += [plots.latencies(shown), *timeline.timelines(shown)]
        found += tier_plots.residencies(shown)
        found.append(tier_plots.first_token_by_tier(shown))
    if not _searches(results):
        found.append(rate_plots.against_adapters(results, columns))
    found += rate_plots.against_rate(results)
    return note + [figure_html(plot) for plot in found]


def _section(title: str, table: str, otherwise: str) -> list[str]:
    return [f"<h3>{title}</h3>", table or f'<p class="note">{otherwise}</p>']
