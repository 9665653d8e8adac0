"""``veneer login`` and ``veneer logout``: a server and its key, kept in a profile."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from veneer_registry.errors import InvalidField
from veneer_registry.screen import Screen

from veneer_client.cli.context import DebugFlag, errors_shown
from veneer_client.client import Client
from veneer_client.login import DEFAULT_PROFILE, forget_profile, save_profile

__all__ = ["EXAMPLES", "login", "logout"]

EXAMPLES = """
Examples:

  veneer login https://gpu1:50051                asks for the API key

  veneer login https://gpu1:50051 --ca ca.pem --profile team < key.txt

  VENEER_PROFILE=team veneer adapter ls
"""

_Profile = Annotated[
    str,
    typer.Option("--profile", metavar="NAME", help="The profile's name.", show_default=True),
]


def login(
    context: typer.Context,
    server: Annotated[
        str, typer.Argument(metavar="SERVER", help="HOST:PORT, or https://HOST:PORT for TLS.")
    ],
    profile: _Profile = DEFAULT_PROFILE,
    ca: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="CA certificates to trust (PEM); default: the system's."
        ),
    ] = "",
    cert: Annotated[str, typer.Option(metavar="FILE", help="Client certificate (PEM).")] = "",
    key: Annotated[
        str, typer.Option(metavar="FILE", help="Private key of the client certificate (PEM).")
    ] = "",
    debug: DebugFlag = False,
) -> None:
    """Check an API key with a server and save both for later commands."""
    with errors_shown(context, debug):
        secret = _ask()
        files = {
            name: os.path.abspath(os.path.expanduser(path)) if path else ""
            for name, path in (("ca", ca), ("cert", cert), ("key", key))
        }
        with Client(
            server,
            api_key=secret or None,
            ca=files["ca"] or None,
            cert=files["cert"] or None,
            key=files["key"] or None,
        ) as client:
            client.info()
        file = save_profile(profile, {"server": server, "api_key": secret, **files})
        Screen(stderr=True, soft_wrap=True, highlight=False).print(
            f"saved profile {profile} in {file}", markup=False
        )


def logout(
    context: typer.Context, profile: _Profile = DEFAULT_PROFILE, debug: DebugFlag = False
) -> None:
    """Delete a saved profile."""
    with errors_shown(context, debug):
        if not forget_profile(profile):
            raise InvalidField(f"there is no profile {profile}", metadata={"field": "profile"})


def _ask() -> str:
    """The key: from the terminal without showing it, else from standard input."""
    if sys.stdin.isatty():
        text: str = typer.prompt(
            "API key", hide_input=True, default="", show_default=False, err=True
        )
        return text.strip()
    return sys.stdin.readline().strip()
