"""The page's tables: the content of each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from veneer_loadtest.html.columns import FIGURES, Figure, ReportColumn, name_of, pairs, ratio
from veneer_loadtest.html.drawing import tiers_in_order
from veneer_loadtest.html.words import (
    adapters_words,
    amount,
    limits_words,
    load_average,
    load_words,
    machine_words,
    ms,
    share,
)
from veneer_loadtest.load.figures import OTHER
from veneer_loadtest.results import FindMaxResult, LoadResult, RequestSplit, Result

_BESIDE: Final = 6
"""Most columns in a table; more start a new one, so that none is wider than the page."""
_MOST_ADAPTERS: Final = 15
_ALWAYS_DIFFERENT: Final = ("label", "time", "load average before")


@dataclass(frozen=True, slots=True)
class Cell:
    """Text with a class of the style sheet (``kind``), a mark beside it, or a note below."""

    text: str
    kind: str = ""
    mark: str = ""
    below: str = ""


Row = Sequence[str | Cell]


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table. The first cell of a row names it; a row of one cell is a heading."""

    head: Row
    rows: Sequence[Row]
    kind: str = "figures"


@dataclass(frozen=True, slots=True)
class Grouped:
    """A table whose first column names a group of rows, and whose second names each row."""

    head: Row
    groups: Mapping[str, Sequence[Row]]


def plain_facts(
    results: Sequence[Result], names: Sequence[str], workloads: Sequence[str]
) -> ReportTable:
    """Tabulate what was run, where and on what, for results of any kind."""
    conditions = [result.conditions for result in results]
    told = {
        "label": [result.label for result in results],
        "command": [str(each.get("command", "")) for each in conditions],
        "time": [str(each.get("time", "")) for each in conditions],
        "machine": [machine_words(each) for each in conditions],
        "load average before": [_busy_words(each) for each in conditions],
        "work": list(workloads),
        "versions": [", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in results],
    }
    rows = [[name, *cells] for name, cells in told.items() if any(cells)]
    return ReportTable(["", *names] if len(results) > 1 else [], rows, "facts")


def facts(results: Sequence[LoadResult], names: Sequence[str] = ()) -> ReportTable:
    """Tabulate what was run, where and on what: a column for each result."""
    rows: list[Row] = []

    def row(name: str, cells: Sequence[str], kind: str = "") -> None:
        if not any(cells):
            return
        differ = len(set(cells)) > 1 and name not in _ALWAYS_DIFFERENT
        mark = "differs" if differ else ""
        rows.append([Cell(name, mark=mark), *(Cell(cell, kind) for cell in cells)])

    conditions = [result.conditions for result in results]
    row("label", [result.label for result in results])
    row("command", [str(each.get("command", "")) for each in conditions], "code")
    row("time", [str(each.get("time", "")) for each in conditions])
    row("machine", [machine_words(each) for each in conditions])
    row("load average before", [_busy_words(each) for each in conditions])
    row("load", [_load(result) for result in results])
    row("adapters", [_adapters(result) for result in results])
    row("limits", [_limits(result) for result in results])
    row("target", [_target(result.target) for result in results])
    row("server", [result.target.get("command", "") for result in results], "code")
    row("Python", [str(each.get("python", "")) for each in conditions])
    row("versions", [", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in results])
    head = [""] + [name_of(results, n, names) for n in range(len(results))]
    return ReportTable(head if len(results) > 1 else (), rows, "facts")


def _load(result: LoadResult) -> str:
    probes = result.probes if isinstance(result, FindMaxResult) else []
    rates = [probe.rate for probe in probes]
    return " ".join(load_words(result.load, rates if len(rates) > 1 else ()))


def _target(target: Mapping[str, str]) -> str:
    told = (f"{key.replace('_', ' ')} {value}" for key, value in target.items())
    return ", ".join(text for text in told if not text.startswith("command "))


def _adapters(result: LoadResult) -> str:
    told = adapters_words(result.load.adapters)
    levels = [] if isinstance(result, FindMaxResult) else result.levels
    if len(levels) < 2:
        return told
    counts = ", ".join(f"{level.adapters:,}" for level in levels)
    return f"one load each on {counts}; the last: {told}"


def _limits(result: LoadResult) -> str:
    if isinstance(result, FindMaxResult):
        part = share(result.share)
        return f"{limits_words(result.limits)}; {part} of the requests must keep them"
    slo = next((level.slo for level in result.levels if level.slo), None)
    return limits_words(slo.limits) if slo else ""


def _busy_words(conditions: Mapping[str, object]) -> str:
    names = ("1 min", "5 min", "15 min")
    told = zip(load_average(conditions), names, strict=False)
    return ", ".join(f"{value:g} ({name})" for value, name in told)


def key_figures(columns: Sequence[ReportColumn], results: int) -> list[Grouped]:
    """Tabulate the figures, one a row; if two runs match, with their ratio."""
    matched = pairs(columns, results)
    rows_of = _ratio_rows if matched else _plain_rows
    blocks: list[Sequence[ReportColumn]] = [list(pair) for pair in matched]
    if not matched:
        blocks = [columns[n : n + _BESIDE] for n in range(0, len(columns), _BESIDE)]
    told = [
        figure for figure in FIGURES if any(figure.get(c.level) is not None for c in columns)
    ]
    tables = []
    for block in blocks:
        head: list[str | Cell] = ["", "", *map(_titled, block)]
        if matched:
            head.append("B / A")
        groups: dict[str, list[Row]] = {}
        for figure in told:
            cells = [figure.name, *rows_of(figure, block)]
            groups.setdefault(figure.group, []).append(cells)
        tables.append(Grouped(head, groups))
    return tables


def _titled(column: ReportColumn) -> Cell:
    kept = "" if column.rate is None else f"{'kept' if column.kept else 'broke'} the limits"
    return Cell(column.title, below=kept)


def _plain_rows(figure: Figure, block: Sequence[ReportColumn]) -> list[str]:
    values = [figure.get(column.level) for column in block]
    return ["" if value is None else figure.text(value) for value in values]


def _ratio_rows(figure: Figure, block: Sequence[ReportColumn]) -> list[str]:
    by = ratio(figure, block[0], block[1])
    return [*_plain_rows(figure, block), "" if by is None else amount(by)]


def errors(columns: Sequence[ReportColumn]) -> list[ReportTable]:
    """Failed requests by reason; no table if none failed."""
    reasons = list(dict.fromkeys(reason for c in columns for reason in c.level.errors))
    rows = [[r, *(_number(c.level.errors.get(r, 0)) for c in columns)] for r in reasons]
    return _in_blocks("reason", columns, rows)


def _number(value: int) -> str:
    return f"{value:,}"


def _in_blocks(
    name: str, columns: Sequence[ReportColumn], rows: Sequence[Row]
) -> list[ReportTable]:
    """Build a table with a column for each load, in parts that fit the page; none without
    rows."""
    tables: list[ReportTable] = []
    if not rows:
        return tables
    for begin in range(0, len(columns), _BESIDE):
        head = [name, *(c.title for c in columns[begin : begin + _BESIDE])]
        part = [[row[0], *row[1 + begin : 1 + begin + _BESIDE]] for row in rows]
        tables.append(ReportTable(head, part))
    return tables


_SPLIT_HEAD: Final = (
    "requests",
    "failed",
    "tokens",
    "first token p50",
    "p99",
    "between tokens p50",
    "p99",
    "adapter wait p50",
)


def _split(split: RequestSplit) -> list[str]:
    times = (
        split.first_token_p50_ms,
        split.first_token_p99_ms,
        split.inter_token_p50_ms,
        split.inter_token_p99_ms,
        split.load_p50_ms,
    )
    counts = (split.requests, split.failed, split.tokens)
    return [*map(_number, counts), *("" if value is None else ms(value) for value in times)]


def by_tier(columns: Sequence[ReportColumn]) -> list[ReportTable]:
    """Tabulate requests by tier, under each column's name."""
    rows: list[Row] = []
    for column in columns:
        if len(columns) > 1:
            rows.append([column.title])
        for tier in tiers_in_order([*column.level.by_tier]):
            name = "none, or not reported" if tier == "none" else tier.upper()
            rows.append([name, *_split(column.level.by_tier[tier])])
    return [ReportTable(["found in", *_SPLIT_HEAD], rows)] if rows else []


def adapters(columns: Sequence[ReportColumn]) -> list[ReportTable]:
    """Tabulate the most requested adapters of each column, and all others in one row."""
    rows: list[Row] = []
    for column in columns:
        named = [item for item in column.level.by_adapter.items() if item[0] != OTHER]
        if len(columns) > 1:
            rows.append([column.title])
        for name, split in named[:_MOST_ADAPTERS]:
            rows.append([name or "the base model", *_split(split)])
        rest = named[_MOST_ADAPTERS:]
        other = column.level.by_adapter.get(OTHER)
        splits = [split for _, split in rest] + ([other] if other else [])
        if splits:
            sums = (
                sum(split.requests for split in splits),
                sum(split.failed for split in splits),
                sum(split.tokens for split in splits),
            )
            rows.append(["all others", *map(_number, sums), "", "", "", "", ""])
    return [ReportTable(["adapter", *_SPLIT_HEAD], rows)] if rows else []


def server_counts(columns: Sequence[ReportColumn]) -> list[ReportTable]:
    """Tabulate what the server counted; return no table if its metrics were not read."""
    servers = [column.level.server for column in columns]
    if not any(servers):
        return []
    rows: list[Row] = []
    for name in ("requests", "prompt_tokens", "tokens"):
        cells = ["" if s is None else _number(getattr(s, name)) for s in servers]
        rows.append([name.replace("_", " "), *cells])
    told = {True: "yes", False: "NO", None: "not comparable"}
    rows.append(
        ["as the client counted", *("" if s is None else told[s.agrees] for s in servers)]
    )
    for group, field in (("lookup: ", "lookups"), ("eviction: ", "evictions")):
        counts: list[dict[str, int]] = [getattr(s, field) if s else {} for s in servers]
        for key in dict.fromkeys(key for each in counts for key in each):
            if any(each.get(key) for each in counts):
                cells = [
                    "" if server is None else _number(each.get(key, 0))
                    for server, each in zip(servers, counts, strict=True)
                ]
                rows.append([group + _counter_name(key), *cells])
    return _in_blocks("counter", columns, rows)


def _counter_name(key: str) -> str:
    tier, _, rest = key.partition(" ")
    return f"{tier.upper()} {rest}"
