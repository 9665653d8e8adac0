"""Flags for credentials and trusted certificates, the same in all our programs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

__all__ = ["CaFlag", "CertFlag", "KeyFlag", "ProfileFlag", "keep_login"]

ProfileFlag = Annotated[
    str | None,
    typer.Option("--profile", metavar="NAME", help="A profile saved by `veneer login`."),
]
CaFlag = Annotated[
    str | None,
    typer.Option(
        "--ca", metavar="FILE", help="CA certificates to trust (PEM); default: VENEER_CA."
    ),
]
CertFlag = Annotated[
    str | None,
    typer.Option(
        "--cert", metavar="FILE", help="Client certificate (PEM); default: VENEER_CERT."
    ),
]
KeyFlag = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="FILE",
        help="Private key of the client certificate; default: VENEER_KEY.",
    ),
]


def keep_login(
    *, profile: str | None, ca: str | None, cert: str | None, key: str | None
) -> None:
    """Write the given flags to environment variables, where every client in this process and
    its children reads them. A flag takes precedence over its variable."""
    for name, value in (("PROFILE", profile), ("CA", ca), ("CERT", cert), ("KEY", key)):
        if value is not None:
            os.environ[f"VENEER_{name}"] = value
    # In child processes gRPC would print a line for each failed handshake, beside our own
    # error. This process has imported gRPC already, so the variable no longer affects it.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
