"""``veneer adapter watch``: a live table, lines for a pipe, or JSON for a program."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from veneer_registry.adapter import Tier

from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.show import byte_size, json_line, place_of
from veneer_client.records import AdapterEvent, AdapterEventKind, AdapterInfo

__all__ = ["EXAMPLES", "Board", "event_line", "watch"]

EXAMPLES = """
Examples:

  veneer adapter watch

  veneer adapter watch | grep failed

  veneer adapter watch --json --since 1795042800000000042
"""

_QUIET = (AdapterEventKind.RESET, AdapterEventKind.SYNCED)


def watch(
    context: typer.Context,
    since: Annotated[
        int,
        typer.Option(help="Go on after this sequence number; 0 shows what there is.", min=0),
    ] = 0,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show adapters and what happens to them, until Ctrl-C."""
    console = Console(highlight=False)
    with (
        errors_shown(context, debug),
        connect(context, server) as client,
        client.watch(since) as events,
    ):
        if json_:
            for event in events:
                print(json_line(event), flush=True)
        elif console.is_terminal:
            board = Board()
            with Live(console=console, get_renderable=board.table):
                for event in events:
                    board.apply(event)
        else:
            for event in events:
                if event.kind not in _QUIET:
                    print(event_line(event), flush=True)


class Board:
    """Every adapter and its last event."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], tuple[AdapterInfo, str]] = {}

    def apply(self, event: AdapterEvent) -> None:
        """Take in one event."""
        if event.kind is AdapterEventKind.RESET:
            self._rows.clear()
        adapter = event.adapter
        if adapter is None:
            return
        key = (adapter.name, adapter.revision)
        if event.kind is AdapterEventKind.DELETED:
            self._rows.pop(key, None)
            return
        if event.kind in (AdapterEventKind.PUBLISHED, AdapterEventKind.REPLACED):
            self._supersede(adapter.name)
        # What is neither current nor in memory is of no interest here.
        if adapter.current or adapter.tier is not Tier.DISK:
            self._rows[key] = (adapter, _last(event))
        else:
            self._rows.pop(key, None)

    def _supersede(self, name: str) -> None:
        for key, (adapter, _) in tuple(self._rows.items()):
            if adapter.name == name and adapter.tier is Tier.DISK:
                del self._rows[key]

    def table(self) -> Table:
        """As it is now."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("adapter", "revision", "tier", "size", "in use", "last event"):
            right = column in ("size", "in use")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        for (name, revision), (adapter, last) in sorted(self._rows.items()):
            table.add_row(
                name,
                revision[:12],
                place_of(adapter),
                byte_size(adapter.size),
                str(adapter.leases),
                last,
            )
        return table


def _clock(moment: datetime) -> str:
    return moment.astimezone().strftime("%H:%M:%S")


def _last(event: AdapterEvent) -> str:
    if event.kind is AdapterEventKind.PRESENT:
        return ""
    detail = f" ({event.detail})" if event.detail else ""
    return f"{event.kind.value}{detail} {_clock(event.time)}"


def event_line(event: AdapterEvent) -> str:
    """One event for a person or ``grep``; its columns are separated by two spaces."""
    parts = [_clock(event.time), f"{event.kind.value:13}"]
    if event.adapter is not None:
        adapter = event.adapter
        parts += [adapter.short, place_of(adapter), byte_size(adapter.size)]
    if event.detail:
        parts.append(event.detail)
    return "  ".join(parts)
