"""``veneer usage``: what tenants have used."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from veneer_registry.errors import InvalidField

from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.show import as_json, print_table, usage_table

__all__ = ["EXAMPLES", "usage"]

EXAMPLES = """
Examples:

  veneer usage                                               all time

  veneer usage --start 2026-11-01 --end 2026-12-01           November (UTC)

  veneer usage --tenant team-a --json
"""


def usage(
    context: typer.Context,
    tenant: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Tenant; default: your own, or all tenants for an operator."
        ),
    ] = "",
    start: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Start of the period, such as 2026-11-01 or 2026-11-01T13:00Z; UTC unless it "
            "has a time zone. Default: all time.",
        ),
    ] = "",
    end: Annotated[
        str, typer.Option(metavar="TIME", help="End of the period. Default: now.")
    ] = "",
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show the usage of tenants: requests, tokens and stored adapters."""
    with errors_shown(context, debug), connect(context, server) as client:
        report = client.usage(tenant, start=_time("start", start), end=_time("end", end))
    if json_:
        print(as_json(report))
        return
    print(f"{report.start:%Y-%m-%d %H:%M} to {report.end:%Y-%m-%d %H:%M} UTC")
    print_table(usage_table(report))


def _time(flag: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidField(
            f"--{flag} {text!r} is not a time: give 2026-11-01 or 2026-11-01T13:00Z",
            metadata={"field": flag},
        ) from error
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
