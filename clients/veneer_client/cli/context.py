"""Shared by all commands: the server's address, and how an error is shown."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated

import typer
from veneer_registry.errors import ModelLoading, VeneerError
from veneer_registry.screen import Screen, cell

from veneer_client.address import DEFAULT_ADDRESS
from veneer_client.cli.words import in_cli_words
from veneer_client.client import Client
from veneer_client.failures import RetryPolicy

__all__ = [
    "DebugFlag",
    "GlobalOptions",
    "JsonFlag",
    "ServerOption",
    "VersionFlag",
    "connect",
    "doing",
    "errors_shown",
    "find_server",
]


ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        help=f"Server address; default: VENEER_SERVER, else {DEFAULT_ADDRESS}.",
        show_default=False,
    ),
]
DebugFlag = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of errors.", show_default=False)
]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of text.", show_default=False)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"veneer {version('veneer')}")
        raise typer.Exit


VersionFlag = Annotated[
    bool,
    typer.Option(
        "--version",
        help="Print the version.",
        show_default=False,
        callback=_print_version,
        is_eager=True,
    ),
]


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """Global options, given before the subcommand (or by VENEER_SERVER)."""

    server: str | None = None
    debug: bool = False


def find_server(context: typer.Context, server: str | None) -> str | None:
    """The address for a command: its own option takes precedence over the global one."""
    place = context.find_object(GlobalOptions) or GlobalOptions()
    return server or place.server


def connect(context: typer.Context, server: str | None) -> Client:
    """Make a client for a command. It does not retry while the server is still loading, so that
    the user is told at once; see `errors_shown`."""
    return Client(find_server(context, server), retry=RetryPolicy(final=(ModelLoading,)))


def doing(error: ModelLoading) -> str:
    """What a loading server is doing, in words."""
    return error.metadata.get("doing", "starting")


@contextmanager
def errors_shown(
    context: typer.Context, debug: bool, say: Callable[[str], str] = in_cli_words
) -> Iterator[None]:
    """Turn a `VeneerError` into one line on standard error and exit status 1.

    Args:
        say: rewrites its message in the caller's terms.
    """
    place = context.find_object(GlobalOptions) or GlobalOptions()
    try:
        yield
    except VeneerError as error:
        if debug or place.debug:
            traceback.print_exc()
        hint = error.metadata.get("did_you_mean")
        # The server's message usually contains the suggestion already.
        tail = f" (did you mean {hint}?)" if hint and hint not in error.message else ""
        text = say(error.message) + tail
        if isinstance(error, ModelLoading):
            text = (
                f"the server is still loading ({doing(error)}): `veneer health --wait 5m` "
                "returns once it is ready"
            )
        console = Screen(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[red]error:[/red] {cell(text)}")
        raise typer.Exit(1) from error
