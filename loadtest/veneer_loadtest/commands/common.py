"""Shared by the commands: options, the warning about a busy machine, errors, results."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from veneer_client import VeneerError
from veneer_client.cli.words import in_cli_words
from veneer_registry.screen import Screen

from veneer_loadtest import report
from veneer_loadtest.errors import BadOption
from veneer_loadtest.html.cautions import Banner
from veneer_loadtest.html.words import BUSY

PACKAGES: Final = (
    "veneer",
    "grpcio",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "numpy",
)

Spawn = Annotated[bool, typer.Option("--spawn", help="Start a server for this run.")]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        help="Use a running server; adapters published there are deleted at the end.",
    ),
]
BaseFolder = Annotated[
    Path | None,
    typer.Option(help="Hugging Face folder of the base to serve; default: the bundled one."),
]
Threads = Annotated[int, typer.Option(help="Threads per system; 0: one per usable core.")]
ServerFlag = Annotated[
    list[str] | None, typer.Option(help="A flag for the spawned server; repeatable.")
]
Rank = Annotated[int, typer.Option(help="Rank of the synthetic adapters.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of adapters and prompts.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result to this file.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]

_COLOURS: Final = {"bad": "red", "warn": "yellow", "good": "green"}

_TABLE_WIDTH: Final = 140
"""Columns if the output is a file or pipe; 80, the default there, would cut tables."""

OUT: Final = Screen(highlight=False, width=None if sys.stdout.isatty() else _TABLE_WIDTH)


def warn_if_busy() -> None:
    """Warn if other work on the machine will spoil the figures."""
    share, cores = report.busy_share(), report.usable_cores()
    if share > BUSY:
        OUT.print(
            f"[yellow]warning:[/yellow] other processes were busy in the last minute (load "
            f"{share * cores:.1f} on {cores} cores): results will be worse than on an idle "
            "machine",
            soft_wrap=True,
        )


def print_banners(found: Sequence[Banner]) -> None:
    """Print what a reader must know before looking at any figure."""
    for banner in found:
        head = f"[{_COLOURS[banner.kind]}]{escape(banner.head)}[/]"
        OUT.print(f"{head} {escape(banner.text)}", soft_wrap=True)


def print_notes(notes: Sequence[str]) -> None:
    """Print what a reader of the figures should know about the target."""
    for note in notes:
        OUT.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)


def run(work: Coroutine[Any, Any, None], debug: bool) -> None:
    """Run a command; a `VeneerError` becomes one line and exit status 1."""
    try:
        asyncio.run(work)
    except* VeneerError as group:
        if debug:
            traceback.print_exc()
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        console = Screen(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[red]error:[/red] {escape(in_cli_words(str(error)))}")
        raise typer.Exit(1) from None


def finish(result: Mapping[str, Any], json_file: Path | None) -> None:
    """Write the result, and its summary as ``key=value`` lines."""
    if json_file is not None:
        report.write_json(json_file, result)
        OUT.print(f"wrote {escape(str(json_file))}", style="dim")
    print_summary(result["summary"])


def print_summary(figures: Mapping[str, float]) -> None:
    """Print the figures as ``key=value`` lines."""
    for key, value in figures.items():
        print(f"{key}={value:.6g}")


def check_writable(file: Path | None) -> None:
    """Check that the file can be written, before a run rather than after it.

    Raises:
        BadOption: the file's folder does not exist, or the file is a folder.
    """
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise BadOption(f"cannot write {file}: give a file in a folder that exists")
