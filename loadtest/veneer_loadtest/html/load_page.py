"""The page of loads: ``run`` and ``find-max``."""

from __future__ import annotations

from collections.abc import Sequence

from veneer_loadtest.html import plots, rate_plots, tables, tier_plots, timeline
from veneer_loadtest.html.cautions import banners
from veneer_loadtest.html.columns import ReportColumn, columns_of, drawn, name_of, pairs
from veneer_loadtest.html.document import document
from veneer_loadtest.html.drawing import Plot
from veneer_loadtest.html.words import amount, count, ms, rate_words, share
from veneer_loadtest.results import FindMaxResult, LoadResult


def load_page(results: Sequence[LoadResult], names: Sequence[str] = ()) -> str:
    """The whole document."""
    columns = columns_of(results, names)
    shown = drawn(columns)
    return document(
        "load",
        _title(results, names),
        _lede(results, columns, names),
        banners(results, columns, names),
        facts=tables.facts(results, names),
        key_figures=tables.key_figures(columns, len(results)) if columns else [],
        unmatched=bool(columns) and len(results) == 2 and not pairs(columns, 2),
        columns=len(columns),
        shown=[column.short for column in shown],
        plots=_plots(results, columns, shown),
        errors=tables.errors(columns),
        by_tier=tables.by_tier(columns),
        adapters=tables.adapters(shown),
        server_counts=tables.server_counts(columns),
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
    results: Sequence[LoadResult], columns: Sequence[ReportColumn], names: Sequence[str]
) -> list[str]:
    """The outcome, in a sentence for each result."""
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


def _level_words(column: ReportColumn) -> str:
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


def _plots(
    results: Sequence[LoadResult],
    columns: Sequence[ReportColumn],
    shown: Sequence[ReportColumn],
) -> list[Plot]:
    found: list[Plot] = []
    if shown:
        found += [plots.latencies(shown), *timeline.timelines(shown)]
        found += tier_plots.residencies(shown)
        found.append(tier_plots.first_token_by_tier(shown))
    if not _searches(results):
        found.append(rate_plots.against_adapters(results, columns))
    return found + rate_plots.against_rate(results)
