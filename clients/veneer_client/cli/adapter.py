"""``veneer adapter``: push, ls, show, activate, pin, unpin, evict, rm, watch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from veneer_registry.adapter import Tier
from veneer_registry.errors import InvalidField

from veneer_client.cli import watch
from veneer_client.cli.complete import adapter_names
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    errors_shown,
    find_server,
)
from veneer_client.cli.show import adapter_rows, adapter_table, as_json, byte_size
from veneer_client.client import Client
from veneer_client.records import EvictMode, Pushed

__all__ = ["adapter_cli", "print_rows"]

adapter_cli = typer.Typer(
    help="Publish, inspect, move and remove adapters.",
    epilog="Examples:\n\n  veneer adapter push runs/sql/adapter --name sql\n\n"
    "  veneer adapter ls --tier device\n\n  veneer adapter watch",
    no_args_is_help=True,
    rich_markup_mode=None,
)

adapter_cli.command(epilog=watch.EXAMPLES)(watch.watch)

NameArgument = Annotated[
    str, typer.Argument(help="NAME or NAME@REVISION.", autocompletion=adapter_names)
]

_PUSH_EXAMPLES = """
Examples:

  veneer adapter push runs/sql/adapter --name sql

  veneer adapter push runs/sql/adapter --name sql --replace --activate --label team=data

  veneer adapter push runs/sql/adapter --name sql --dry-run      check, publish nothing
"""


@adapter_cli.command(epilog=_PUSH_EXAMPLES)
def push(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote.")],
    name: Annotated[str, typer.Option("--name", help="Name to publish it under.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="The name may hold another revision.")
    ] = False,
    activate: Annotated[
        bool, typer.Option("--activate", help="Return when it is on the device.")
    ] = False,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, publish nothing.")
    ] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Check an adapter folder here, then publish it."""
    console = Console(stderr=True, highlight=False)
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        labels = _labels(label or ())
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        with bar:
            task = bar.add_task(f"checking {escape(str(folder))}", total=None)
            pushed = client.push(
                folder,
                name,
                labels=labels,
                validate_only=dry_run,
                activate=activate,
                allow_replace=replace,
                progress=lambda sent, total: bar.update(
                    task, description=f"sending {name}", completed=sent, total=total
                ),
            )
        for file in pushed.skipped:
            console.print(f"[yellow]skipped:[/yellow] {escape(file)} (not part of a bundle)")
        for warning in pushed.warnings:
            console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
        print(as_json(pushed) if json_ else _outcome(pushed, dry_run))


def _outcome(pushed: Pushed, dry_run: bool) -> str:
    adapter = pushed.adapter
    facts = f"rank {adapter.rank}, {byte_size(adapter.size)} resident"
    if dry_run:
        return f"valid: {adapter.short} would be published ({facts}); nothing was"
    if not pushed.published:
        return f"unchanged: {adapter.short} holds this content already"
    verb = "replaced" if pushed.replaced else "published"
    return f"{verb}: {adapter.short} ({facts}, now in {adapter.tier.value})"


def _labels(pairs: Iterable[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InvalidField(
                f"label {pair!r} is not KEY=VALUE, for example --label team=data",
                metadata={"field": "labels"},
            )
        labels[key] = value
    return labels


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter ls\n\n  veneer adapter ls --prefix sql --tier device"
)
def ls(
    context: typer.Context,
    prefix: Annotated[str, typer.Option("--prefix", help="Names that start so.")] = "",
    tier: Annotated[Tier | None, typer.Option("--tier", help="Nearest tier.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Repeatable.")
    ] = None,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """List adapters and where they are."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        found = tuple(client.list(name_prefix=prefix, tier=tier, labels=_labels(label or ())))
        if json_:
            print(as_json(found))
        elif found:
            Console(highlight=False).print(adapter_table(found))
        else:
            print("no adapters: publish one with `veneer adapter push FOLDER --name NAME`")


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter show sql\n\n  veneer adapter show sql@1a2b3c4d5e6f"
)
def show(
    context: typer.Context,
    name: NameArgument,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show one adapter and its revisions."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        details = client.get(name)
        if json_:
            print(as_json(details))
            return
        rows = adapter_rows(details.adapter)
        for number, revision in enumerate(details.revisions):
            mark = " (current)" if revision.current else ""
            when = revision.created.isoformat(timespec="seconds")
            title = "revisions" if number == 0 else " " * number
            rows[title] = f"{revision.revision[:12]}  {when}{mark}"
        print_rows(rows)


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter activate sql\n\n  veneer adapter activate sql --pin"
)
def activate(
    context: typer.Context,
    name: NameArgument,
    tier: Annotated[Tier, typer.Option("--tier", help="host or device.")] = Tier.DEVICE,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it there.")] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Bring an adapter into memory before the first request asks for it."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        adapter = client.activate(name, tier=tier, pin=pin)
        pinned = ", pinned" if adapter.pinned else ""
        print(
            as_json(adapter) if json_ else f"{adapter.short} is in {adapter.tier.value}{pinned}"
        )


@adapter_cli.command(epilog="Examples:\n\n  veneer adapter pin sql")
def pin(
    context: typer.Context,
    name: NameArgument,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Bring an adapter to the device and keep it there."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        adapter = client.pin(name)
        print(as_json(adapter) if json_ else f"{adapter.short} is pinned")


@adapter_cli.command(epilog="Examples:\n\n  veneer adapter unpin sql")
def unpin(
    context: typer.Context,
    name: NameArgument,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Remove the pin; the adapter stays until room is needed."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        adapter = client.unpin(name)
        print(
            as_json(adapter) if json_ else f"{adapter.short} is in {adapter.tier.value}, free"
        )


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter evict sql\n\n  veneer adapter evict sql --mode abort"
)
def evict(
    context: typer.Context,
    name: NameArgument,
    mode: Annotated[
        EvictMode, typer.Option("--mode", help="What happens to its running requests.")
    ] = EvictMode.DRAIN,
    unpin: Annotated[bool, typer.Option("--unpin", help="Remove its pin first.")] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Free an adapter's memory; it stays registered."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        eviction = client.evict(name, mode=mode, unpin=unpin)
        if json_:
            print(as_json(eviction))
        elif eviction.evicted:
            print(f"evicted {name}, freed {byte_size(eviction.freed_bytes)}")
        else:
            print(f"{name} leaves when its running requests have finished")


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter rm sql\n\n  veneer adapter rm sql@1a2b3c4d5e6f"
)
def rm(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="NAME (all revisions) or NAME@REVISION.", autocompletion=adapter_names
        ),
    ],
    etag: Annotated[
        str, typer.Option("--etag", help="Only if it is still this (see `show`).")
    ] = "",
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Delete an adapter for good."""
    with errors_shown(context, debug), Client(find_server(context, server)) as client:
        revisions = client.delete(name, etag=etag)
        removed = ", ".join(revision[:12] for revision in revisions)
        print(as_json(revisions) if json_ else f"deleted {name} ({removed})")


def print_rows(rows: dict[str, str]) -> None:
    """Label and text, one pair a line."""
    table: Any = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows.items():
        table.add_row(label, escape(text))
    Console(highlight=False).print(table)
