"""``veneer-server tls``: creates a self-signed certificate for testing."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer
from veneer_registry.command_line import Program
from veneer_registry.disk import FILE_MODE
from veneer_registry.errors import InvalidField

from veneer_server.operate.flags import Debug, guarded

tls_cli = Program(help="Create TLS certificates.")


@tls_cli.callback()
def certificates() -> None:
    """Create TLS certificates."""


@tls_cli.command(
    "self-signed",
    epilog="""
Examples:

  veneer-server tls self-signed --name gpu1 --name 10.0.0.5 --out tls

  veneer-server --tls-cert tls/cert.pem --tls-key tls/key.pem

  VENEER_SERVER=https://gpu1:50051 VENEER_CA=tls/cert.pem veneer info
""",
)
def make(
    *,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name or address that clients use; repeatable. Default: "
            "this machine's name, localhost and its addresses."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Output folder for both files.")
    ] = Path("tls"),
    days: Annotated[int, typer.Option(min=1, max=3650, help="Validity in days.")] = 365,
    debug: Debug = False,
) -> None:
    """Create a private key and a self-signed certificate, for testing: clients
    need the certificate (--ca)."""
    from veneer_server.access.self_signed import self_signed

    def run() -> None:
        names = name or [socket.gethostname(), "localhost", "127.0.0.1", "::1"]
        out.mkdir(parents=True, exist_ok=True)
        key, certificate = self_signed(names, days)
        for file, data in ((out / "key.pem", key), (out / "cert.pem", certificate)):
            try:
                fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
            except FileExistsError as error:
                raise InvalidField(
                    f"{file} already exists: give another folder with --out",
                    metadata={"field": "out"},
                ) from error
            with open(fd, "wb") as opened:
                opened.write(data)
        print(f"wrote {out / 'cert.pem'} and {out / 'key.pem'} for {', '.join(names)}")
        print(
            f"next: veneer-server --tls-cert {out / 'cert.pem'} --tls-key {out / 'key.pem'}\n"
            f"clients: VENEER_CA={out / 'cert.pem'}, and https://{names[0]}:PORT"
        )

    guarded(run, debug)
