"""How a command ends: files, the summary, the exit status."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape
from veneer_registry.screen import Screen

from veneer_loadtest.commands.common import OUT, check_writable, print_banners, print_summary
from veneer_loadtest.html.cautions import banners
from veneer_loadtest.html.columns import columns_of
from veneer_loadtest.html.page import write_page
from veneer_loadtest.load.summary import FailLimit
from veneer_loadtest.results import FindMaxResult, Result, RunResult, write_result

ENDED_EARLY: Final = 130
"""The usual exit status after Ctrl-C."""
FAIL_IF: Final = 3

Label = Annotated[str, typer.Option("--label", help="Name of the run in reports.")]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a report with plots.")
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="COND",
        help="Exit with status 3 if the condition holds; repeatable.",
    ),
]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a result goes, and the conditions under which the command is to fail.

    Attributes:
        more: other files, and the functions that write them.
    """

    json_file: Path | None
    html_file: Path | None
    limits: Sequence[FailLimit]
    more: Mapping[Path, Callable[[Path], None]]

    def check(self) -> None:
        """Check before the load, not after it, that the files can be written.

        Raises:
            BadOption: a file cannot be written.
        """
        for file in (self.json_file, self.html_file, *self.more):
            check_writable(file)

    def deliver(self, result: Result) -> None:
        """Write and print everything.

        Raises:
            typer.Exit: 1 if a file could not be written, 130 if the run was ended early, 3
                if a limit holds.
        """
        written = dict(self.more)
        if self.json_file is not None:
            written[self.json_file] = lambda file: write_result(file, result)
        if self.html_file is not None:
            written[self.html_file] = lambda file: write_page(file, [result])
        errors = Screen(stderr=True, highlight=False, soft_wrap=True)
        unwritten = False
        for file, write in written.items():
            try:
                write(file)
            except OSError as error:  # still write the other files and print the figures
                unwritten = True
                errors.print(f"[red]error:[/red] cannot write {escape(str(file))}: {error}")
            else:
                OUT.print(f"wrote {escape(str(file))}", style="dim")
        if isinstance(result, RunResult | FindMaxResult):
            print_banners(banners([result], columns_of([result])))
        print_summary(result.summary)
        if unwritten:
            raise typer.Exit(1)
        if result.partial:
            errors.print(
                f"[yellow]partial:[/yellow] {escape(result.why)}; the figures cover the "
                "requests that had ended by then"
            )
            raise typer.Exit(ENDED_EARLY)
        held = [limit for limit in self.limits if limit.holds(result.summary)]
        for limit in held:
            figure = result.summary.get(limit.key)
            told = "there is no such figure" if figure is None else f"it is {figure:.4g}"
            errors.print(f"[red]failed:[/red] {escape(limit.text)} ({told})")
        if held:
            raise typer.Exit(FAIL_IF)
