"""Shared by all commands: one-line errors, quiet libraries, a progress bar."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from veneer_client.address import server_address
from veneer_registry.errors import VeneerError
from veneer_registry.screen import Screen

__all__ = ["AsJson", "Base", "Debug", "errors", "quiet_libraries", "reporter", "share_cores"]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Base = Annotated[
    str,
    typer.Option(
        "--base", help="The base model: a Hugging Face folder, a hub name, or smollm2-135m."
    ),
]


_NO_LABS: Final = (
    "labs and data recipes need the package veneer-labs, which is not installed: pip install "
    "./labs in Veneer's folder"
)
_YIELDS: Final = 10
"""Niceness of a run on a server's machine."""


def stderr() -> Console:
    """Console for progress and errors."""
    return Screen(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """End the command with one line and code 1 for our errors; show a bug's traceback.

    A missing package of labs and recipes counts as one of our errors.
    """
    try:
        yield
    except VeneerError as error:
        if debug:
            raise
        stderr().print(f"veneer-train: {error}", markup=False)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        if error.name != "veneer_labs":
            raise
        stderr().print(f"veneer-train: {_NO_LABS}", markup=False)
        raise typer.Exit(1) from None


def quiet_libraries() -> None:
    """Silence irrelevant messages of libraries such as torch; call before importing them."""
    # bitsandbytes reports a missing optional kernel on import.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # our dependencies warn about each other


def share_cores(server: str) -> None:
    """Yield cores to a server that the run publishes to. Call before torch is imported.

    A server on this machine needs the cores, too. By default OpenMP threads spin at barriers,
    which makes steps of the run and of the server 3 to 20 times as long when one other process
    is busy (2 cores). Sleeping threads cost a run that is alone a third of its speed. The run
    also lowers its priority, since people wait for the server's streams.
    """
    host = server_address(server).rpartition(":")[0].strip("[]")
    if host in ("localhost", "::1") or host.startswith("127."):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, max(niceness, _YIELDS))


@contextmanager
def reporter() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Shows a run's progress: a bar on a terminal, otherwise occasional lines."""
    console = stderr()
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=None, note="")

        def report(row: Mapping[str, Any]) -> None:
            if row["event"] != "step":
                console.print(_words(row))
                return
            speed = row["tokens"] / max(row["seconds"], 1e-9)
            note = f"loss {row['loss']:.3f}  grad {row['grad_norm']:.2f}  {speed:.0f} tok/s"
            progress.update(task, completed=row["step"], total=row["steps"], note=note)
            if not console.is_terminal and (row["step"] % 10 == 0 or row["step"] == 1):
                console.print(f"step {row['step']}/{row['steps']}  {note}")

        yield report


def _words(row: Mapping[str, Any]) -> str:
    match row["event"]:
        case "eval":
            return (
                f"step {row['step']}: validation loss {row['val_loss']:.4f}, "
                f"accuracy {row['val_accuracy']:.1%}"
            )
        case "tasks":
            asked = f"{row['asked']} {row['kind']} tasks"
            return f"step {row['step']}: {row['right']} of {asked} right"
        case "expected":
            return str(row["words"])
        case "resumed":
            return f"resuming from step {row['step']} ({row['folder']})"
        case "pushed":
            return f"step {row['step']}: published as {row['revision'][:12]}"
        case "push_failed":
            return f"step {row['step']}: not published: {row['error']}"
        case event:
            return f"step {row['step']}: {event}"
