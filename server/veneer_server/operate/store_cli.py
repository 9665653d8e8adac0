"""``veneer-server store``: the adapters in a data folder."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from veneer_registry.command_line import Program

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.config import load_config
from veneer_server.operate.flags import Debug, Json, guarded, options, with_flags

store_cli = Program(
    help="Verify, clean up and recover stored adapters.",
    guesses={
        "ls": "veneer ls",
        "list": "veneer ls",
        "check": "veneer-server store verify",
        "fsck": "veneer-server store verify",
        "repair": "veneer-server store recover",
        "clean": "veneer-server store gc",
    },
)


@store_cli.command(
    "verify",
    epilog="""
Examples:

  veneer-server store verify                     also works while a server is running

  veneer-server store verify --data-dir /srv/veneer --quarantine

  veneer-server store verify --store s3://adapters/production --catalog postgresql://veneer@db/veneer
""",
)
@with_flags(options("data_dir", "store", "catalog", "catalog_password_file"))
def store_verify(
    *,
    quarantine: Annotated[
        bool,
        typer.Option(
            "--quarantine", help="Move damaged weights to quarantine (stop the server first)."
        ),
    ] = False,
    tenant: Annotated[
        str, typer.Option(metavar="NAME", help="Tenant to check, with --store.")
    ] = DEFAULT_TENANT,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Verify the digests of all stored files; exit status 1 if any differs."""
    from veneer_server.operate.store_command import verify, verify_elsewhere

    def run() -> None:
        config = load_config(flags, os.environ)
        if config.store:
            whole = verify_elsewhere(
                config, tenant, print, quarantine=quarantine, as_json=as_json
            )
        else:
            whole = verify(config.data_dir, print, quarantine=quarantine, as_json=as_json)
        raise typer.Exit(0 if whole else 1)

    guarded(run, debug)


@store_cli.command(
    "gc",
    epilog="""
Examples:

  veneer-server store gc --dry-run

  veneer-server store gc --upload-ttl 0 --quarantine
""",
)
@with_flags(options("data_dir", "upload_ttl"))
def store_gc(
    *,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Also remove quarantined content.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed without removing it.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Remove content that no adapter uses, and old interrupted uploads.

    A running server does this itself.
    """
    from veneer_server.operate.store_command import collect

    def run() -> None:
        config = load_config(flags, os.environ)
        collect(
            config.data_dir,
            print,
            upload_hours=config.upload_ttl,
            quarantine=quarantine,
            dry_run=dry_run,
            as_json=as_json,
        )

    guarded(run, debug)


@store_cli.command(
    "recover",
    epilog="""
Examples:

  veneer-server store recover                    the catalog is missing, damaged or too old

  veneer-server store recover --data-dir /srv/veneer --json
""",
)
@with_flags(options("data_dir"))
def store_recover(*, as_json: Json = False, debug: Debug = False, **flags: Any) -> None:
    """Rebuild the catalog from its readable part and from the stored adapters.

    Every stored file is compared with its digest. The old catalog is kept next to the new one.
    Data that only the catalog had (aliases, history, retention, pins) is lost if it cannot be
    read. Stop the server first.
    """
    from veneer_server.operate.store_command import recover

    guarded(
        lambda: recover(load_config(flags, os.environ).data_dir, print, as_json=as_json), debug
    )
