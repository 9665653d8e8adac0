"""The command ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table
from veneer_registry.replacing import replace_file

from veneer_loadtest.commands.common import OUT, Debug, check_writable, print_banners
from veneer_loadtest.commands.common import run as run_command
from veneer_loadtest.html.cautions import banners, conditions_banners
from veneer_loadtest.html.columns import (
    FIGURES,
    ReportColumn,
    columns_of,
    name_of,
    pairs,
    ratio,
)
from veneer_loadtest.html.page import page
from veneer_loadtest.html.words import amount
from veneer_loadtest.results import (
    CompareResult,
    FindMaxResult,
    LoadResult,
    Result,
    RunResult,
    SwapResult,
    read_result,
)
from veneer_loadtest.tables import churn_table, compare_table, swap_table

EXAMPLES = (
    "Examples:\n\n"
    "  veneer-loadtest report a.json --html a.html\n\n"
    "  veneer-loadtest report before.json after.json --html both.html"
)

_NAME_WIDTH: Final = 32
_COLUMN_WIDTH: Final = 16


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Result files (--json) of run, find-max, swap or compare."
        ),
    ],
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show results side by side, in the terminal and as a page with plots."""

    async def work() -> None:
        check_writable(html_file)
        results = [read_result(file) for file in files]
        names = [file.name for file in files]
        # First, since it rejects results that cannot be shown side by side.
        told = page(results, names)
        loads = [each for each in results if isinstance(each, RunResult | FindMaxResult)]
        if loads:
            _print_loads(loads, names)
        else:
            _print_others(results, names)
        if html_file is not None:
            replace_file(html_file, told)
            OUT.print(f"wrote {escape(str(html_file))}", style="dim")

    run_command(work(), debug)


def _print_loads(results: Sequence[LoadResult], names: Sequence[str]) -> None:
    columns = columns_of(results, names)
    if len(results) > 1:
        for number in range(len(results)):
            OUT.print(escape(name_of(results, number, names)), soft_wrap=True)
    print_banners(banners(results, columns, names))
    matched = pairs(columns, len(results))
    for pair in matched:
        OUT.print(_table(pair, ratios=True))
    if matched:
        return
    beside = max(1, (OUT.width - _NAME_WIDTH) // _COLUMN_WIDTH)
    for begin in range(0, len(columns), beside):
        OUT.print(_table(columns[begin : begin + beside], ratios=False))


def _print_others(results: Sequence[Result], names: Sequence[str]) -> None:
    print_banners(conditions_banners(results, names))
    for number, result in enumerate(results):
        if name := name_of(results, number, names):
            OUT.print(escape(name), style="bold", soft_wrap=True)
        if isinstance(result, SwapResult):
            OUT.print(swap_table(result.cases))
            if result.churn is not None:
                OUT.print(churn_table(result.churn))
        elif isinstance(result, CompareResult):
            OUT.print(compare_table(result.levels))


def _table(columns: Sequence[ReportColumn], *, ratios: bool) -> Table:
    """Figures as rows, so that columns can have long names."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(escape(column.title), justify="right", overflow="fold")
    if ratios:
        table.add_column("B/A", justify="right", no_wrap=True)
    for figure in FIGURES:
        values = [figure.get(column.level) for column in columns]
        if all(value is None for value in values):
            continue
        cells = ["" if value is None else figure.text(value) for value in values]
        if ratios:
            by = ratio(figure, columns[0], columns[1])
            cells.append("" if by is None else amount(by))
        table.add_row(f"{figure.group}: {figure.name}", *cells)
    return table
