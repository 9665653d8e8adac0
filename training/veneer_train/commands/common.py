"""Shared by all commands: one-line errors, quiet libraries, a progress bar."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Any, Final, Self

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
from veneer_client.cli.words import in_cli_words
from veneer_registry.errors import VeneerError
from veneer_registry.screen import Screen

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Base = Annotated[
    str,
    typer.Option(
        "--base", help="The base model: a Hugging Face folder, a hub name, or smollm2-135m."
    ),
]

_YIELDS: Final = 10
"""Niceness of a run on a server's machine."""


def stderr() -> Console:
    """Console for progress and errors."""
    return Screen(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def errors(
    debug: bool,
    kept: Callable[[], str] = lambda: "the same command starts over",
) -> Iterator[None]:
    """End the command with one line and code 1 for our errors; show a bug's traceback. Ctrl-C
    ends it with code 130.

    Args:
        kept: returns what a stopped command leaves behind, and how to resume it.
    """
    try:
        yield
    except VeneerError as error:
        if debug:
            raise
        # A server's message about a refused push names gRPC methods.
        stderr().print(f"veneer-train: {in_cli_words(str(error))}", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stderr().print(f"veneer-train: stopped by Ctrl-C: {kept()}", markup=False)
        raise typer.Exit(130) from None


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


EVERY_S: Final = 4.0
"""Longest time without a line of output."""


class Pulse:
    """Prints what the command is doing whenever nothing else was printed for `EVERY_S`. Use it
    in a ``with``; its methods may be called in any thread.

    Args:
        shown: called with a line.
    """

    def __init__(self, shown: Callable[[str], None], every_s: float = EVERY_S) -> None:
        self._shown = shown
        self._every_s = every_s
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._what, self._done, self._total = "", 0, 0
        self._began = self._due = time.monotonic()
        self._ended = False

    def __enter__(self) -> Self:
        self.printed()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """Set the current activity, and how much of it is done; "" prints nothing."""
        with self._changed:
            if what != self._what:
                self._what, self._began = what, time.monotonic()
            self._done, self._total = done, total

    def printed(self) -> None:
        """Note that something else was printed: the next line is due `EVERY_S` later."""
        with self._changed:
            self._due = time.monotonic() + self._every_s

    def _run(self) -> None:
        with self._changed:
            while not self._ended:
                left = self._due - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._due = time.monotonic() + self._every_s
                if self._what:
                    count = f"{self._done} of {self._total}, " if self._total else ""
                    seconds = time.monotonic() - self._began
                    self._shown(f"{self._what}: {count}{seconds:.0f} s so far")


@contextmanager
def pulse(what: str) -> Iterator[Pulse]:
    """Print the current activity, at first ``what``, every `EVERY_S`; for commands without a
    progress bar."""
    console = stderr()
    with Pulse(lambda line: console.print(line, style="dim", markup=False)) as running:
        running.doing(what)
        yield running


class Reporter:
    """Shows a run's progress; see `reporter`."""

    def __init__(self, console: Console, progress: Progress, running: Pulse) -> None:
        self._console = console
        self._progress = progress
        self._task = progress.add_task("train", total=None, note="")
        self._pulse = running

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show a row of the metrics."""
        if row["event"] != "step":
            self._print(_words(row))
            return
        step, steps = row["step"], row["steps"]
        speed = row["tokens"] / max(row["seconds"], 1e-9)
        note = f"loss {row['loss']:.3f}  grad {row['grad_norm']:.2f}  {speed:.0f} tok/s"
        self._progress.update(self._task, completed=step, total=steps, note=note)
        self._pulse.doing("training, steps", step, steps)
        if not self._console.is_terminal and (step % 10 == 0 or step == 1):
            self._print(f"step {step}/{steps}  {note}")

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """Show an activity before, between or after the steps."""
        self._pulse.doing(what, done, total)
        count = f" {done} of {total}" if total else ""
        self._progress.update(self._task, note=f"{what}{count}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False)
        self._pulse.printed()


@contextmanager
def reporter() -> Iterator[Reporter]:
    """Show a run's progress: a bar on a terminal, otherwise a line at least every
    `EVERY_S`."""
    console = stderr()
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )

    def shown(line: str) -> None:
        if not console.is_terminal:  # a terminal has the bar and its note
            console.print(line, markup=False)

    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        Pulse(shown) as running,
    ):
        yield Reporter(console, progress, running)


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
