"""The command ``compare``, which the package ``veneer-peers`` adds."""

from __future__ import annotations

import sys
from typing import Final

import typer
from veneer_registry.command_line import Program

__all__ = ["add_compare"]

_MISSING: Final = (
    "compare needs the package veneer-peers, which is not installed: pip install ./peers in "
    "Veneer's folder"
)


def add_compare(cli: Program) -> None:
    """Add the command; without its package, one that names the package and fails."""
    try:
        from veneer_peers.command import EXAMPLES, compare
    except ModuleNotFoundError as error:
        if error.name != "veneer_peers":
            raise
        # Whatever the arguments are, --help included: the options are in that package.
        anything = {"ignore_unknown_options": True, "allow_extra_args": True}
        cli.command("compare", context_settings=anything, add_help_option=False)(_missing)
    else:
        cli.command(epilog=EXAMPLES)(compare)


def _missing() -> None:
    """Compare with other systems (needs the package veneer-peers)."""
    print(f"veneer-loadtest: {_MISSING}", file=sys.stderr)
    raise typer.Exit(1)
