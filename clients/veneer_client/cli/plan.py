"""``veneer plan``: how much would fit on a running server."""

from __future__ import annotations

from typing import Annotated

import typer
from veneer_registry.errors import InvalidField

from veneer_client.cli.complete import adapter_names
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.show import as_json, byte_size, print_rows
from veneer_client.server_records import Capacity, Limit

__all__ = ["EXAMPLES", "plan"]

EXAMPLES = """
Examples:

  veneer plan                                                rank 16, all modules

  veneer plan --like sql --adapters 100

  veneer plan --rank 64 --module q_proj --module v_proj

  veneer plan --context 2048 --concurrency 32 || echo "does not fit"
"""


def plan(
    context: typer.Context,
    like: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Plan for adapters with this adapter's rank and modules.",
            autocompletion=adapter_names,
        ),
    ] = "",
    rank: Annotated[
        int | None, typer.Option(help="Rank to plan for; 16 if unset.", min=1, max=4096)
    ] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="Module to plan for; repeatable; all if unset.")
    ] = None,
    adapters: Annotated[int, typer.Option(help="Adapters to keep in memory.", min=0)] = 0,
    length: Annotated[
        int,
        typer.Option(
            "--context", help="Tokens per sequence; default: the server's maximum.", min=0
        ),
    ] = 0,
    concurrency: Annotated[int, typer.Option(help="Sequences to run at once.", min=0)] = 0,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show how many adapters and sequences fit; exit status 1 if those asked for do not."""
    with errors_shown(context, debug), connect(context, server) as client:
        if like and (rank or module):
            raise InvalidField(
                f"--like {like} implies rank and modules: leave out --rank and --module, or "
                "--like",
                metadata={"field": "like"},
            )
        capacity = client.plan(
            like=like,
            rank=rank or 0,
            modules=module or (),
            adapters=adapters,
            context_length=length,
            concurrency=concurrency,
        )
    if json_:
        print(as_json(capacity))
    else:
        print_rows(_rows(capacity))
    if not capacity.fits:
        raise typer.Exit(1)


def _rows(capacity: Capacity) -> dict[str, str]:
    adapters, sequences = capacity.adapters, capacity.sequences
    limit = sequences.limited_by
    because = "" if limit is Limit.NONE else f", limited by {limit.value}"
    rows = {
        "one adapter": f"{byte_size(adapters.size)} ({adapters.parameters:,} parameters)",
        "adapters": f"{adapters.on_device:,} on the device, {adapters.on_host:,} on the host",
        "one sequence": f"{byte_size(sequences.size)} for {sequences.context_length:,} tokens",
        "sequences": f"{sequences.running:,} at once{because}",
        "fits": "yes" if capacity.fits else "no",
    }
    for number, shortfall in enumerate(capacity.shortfalls):
        rows["not enough" if not number else " " * number] = shortfall.message
    return rows
