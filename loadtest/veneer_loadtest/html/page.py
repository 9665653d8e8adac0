"""The page: one HTML file with its plots inside, which needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from veneer_loadtest.html import plots, rate_plots, tables, tier_plots, timeline
from veneer_loadtest.html.cautions import Banner, banners
from veneer_loadtest.html.columns import Column, columns_of, drawn, name_of, pairs
from veneer_loadtest.html.drawing import Plot
from veneer_loadtest.html.style import STYLE
from veneer_loadtest.html.words import amount, count, ms, rate_words, share
from veneer_loadtest.results import FindMaxResult, Result

__all__ = ["page", "write_page"]


def write_page(path: Path, results: Sequence[Result], names: Sequence[str] = ()) -> None:
    """Write the page at once or not at all; its folder must exist.

    ``names``, such as the files', stand for results without a label.
    """
    work = path.with_name(path.name + ".part")
    work.write_text(page(results, names), "utf-8")
    work.replace(path)


def page(results: Sequence[Result], names: Sequence[str] = ()) -> str:
    """The whole document."""
    columns = columns_of(results, names)
    shown = drawn(columns)
    title = _title(results, names)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lede">{"<br>".join(map(escape, _lede(results, columns, names)))}</p>',
        *(_banner(banner) for banner in banners(results, columns, names)),
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
        "<footer>Written by veneer-loadtest. p50, p90, p99: the time within which so many of a"
        " hundred came. Times are the client's, of requests due in the measured time."
        "</footer>",
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Whatever a name may hold, nothing is loaded and no script runs.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def _title(results: Sequence[Result], names: Sequence[str]) -> str:
    kind = "Search for the highest rate" if _searches(results) else "Load test"
    if len(results) > 1:
        return f"{kind}, {len(results)} results"
    told = [name for n in range(len(results)) if (name := name_of(results, n, names))]
    return f"{kind}: {', '.join(told)}" if told else kind


def _searches(results: Sequence[Result]) -> bool:
    return all(isinstance(result, FindMaxResult) for result in results)


def _lede(
    results: Sequence[Result], columns: Sequence[Column], names: Sequence[str]
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


def _banner(banner: Banner) -> str:
    return (
        f'<div class="banner {banner.kind}"><strong>{escape(banner.head)}</strong> '
        f"{escape(banner.text)}</div>"
    )


def _key_figures(results: Sequence[Result], columns: Sequence[Column]) -> str:
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
    results: Sequence[Result], columns: Sequence[Column], shown: Sequence[Column]
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
    return note + [_figure(plot, number) for number, plot in enumerate(found)]


def _figure(plot: Plot, number: int) -> str:
    title = escape(plot.title)
    caption = "<br>\n".join(escape(line) for line in plot.caption.splitlines())
    if not plot.svg:
        return f'<h3>{title}</h3>\n<p class="note">Left out. {caption}</p>'
    return f"<figure><h3>{title}</h3>\n{plot.svg}\n<figcaption>{caption}</figcaption></figure>"


def _section(title: str, table: str, otherwise: str) -> list[str]:
    return [f"<h3>{title}</h3>", table or f'<p class="note">{otherwise}</p>']
