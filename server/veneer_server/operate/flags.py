"""Helpers of the commands: flags made from settings, and one-line errors."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from veneer_registry.command_line import with_parameters
from veneer_registry.errors import VeneerError
from veneer_registry.extras import missing_extra

from veneer_server.config import OPTIONS, Option

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_Command = Callable[..., None]


def options(*names: str) -> tuple[Option, ...]:
    """The options with these names."""
    return tuple(option for option in OPTIONS if option.name in names)


def _flag_parameter(option: Option) -> inspect.Parameter:
    default = f"default {option.default}" if option.default else "default: none"
    text = f"{option.help} [{option.variable}; {default}]"
    if option.switch:
        off = f"/--no-{option.flag[2:]}" if option.default == "true" else ""
        kind: Any = Annotated[bool | None, typer.Option(option.flag + off, help=text)]
    else:
        info = typer.Option(*option.flags, metavar=option.metavar, help=text)
        kind = Annotated[list[str] | None if option.repeated else str | None, info]
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind
    )


def with_flags(options: Sequence[Option]) -> Callable[[_Command], _Command]:
    """Give a command that takes ``**flags`` a parameter for each option."""
    return with_parameters(map(_flag_parameter, options))


def guarded(run: Callable[[], None], debug: bool) -> None:
    """Run a command. An error becomes one line that says what to do; with ``debug``, the
    traceback is printed too."""
    try:
        run()
    except typer.Exit:
        raise
    except VeneerError as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), error)
    except OSError as error:
        if debug:
            traceback.print_exc()
        _fail(f"{error}; --debug shows where", error)
    except ModuleNotFoundError as error:
        if debug:
            traceback.print_exc()
        line = missing_extra(error, "server")
        _fail(line or f"a bug: {error}; please report it with what --debug shows", error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        kind = type(error).__name__
        _fail(f"a bug: {kind}: {error}; please report it with what --debug shows", error)


def _fail(line: str, error: Exception) -> NoReturn:
    print(f"veneer-server: {line}", file=sys.stderr)
    raise typer.Exit(1) from error
