"""``veneer adapter watch``: a live table, lines for a pipe, or JSON for a program."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from veneer_registry.adapter import Tier
from veneer_registry.errors import AdapterNotFound, ServerUnreachable, Unavailable, VeneerError
from veneer_registry.screen import Screen, cell
from veneer_registry.terminal import one_line

from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    errors_shown,
    find_server,
)
from veneer_client.cli.show import byte_size, json_line, place_of
from veneer_client.client import Client
from veneer_client.failures import RetryPolicy
from veneer_client.records import AdapterEvent, AdapterEventKind, AdapterInfo

__all__ = ["EXAMPLES", "Board", "event_line", "follow", "leases_now", "watch"]

EXAMPLES = """
Examples:

  veneer adapter watch

  veneer adapter watch | grep failed

  veneer adapter watch --json --since 1795042800000000042
"""

_LOOK_S: Final = 1.0
"""Poll intervals: for a server that is away, and for running requests."""
_CALL_S: Final = 5.0
_GONE: Final = "connection lost, or the server stopped"

Key = tuple[str, str]
"""Name and revision."""

_QUIET = (AdapterEventKind.RESET, AdapterEventKind.SYNCED)


def watch(
    context: typer.Context,
    since: Annotated[
        int,
        typer.Option(
            help="Resume after this sequence number; 0 starts with the current adapters.", min=0
        ),
    ] = 0,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show adapters and their events live, until Ctrl-C.

    If the connection is lost, it reconnects and resumes: with the missed events or,
    after a restart of the server, with all current adapters.
    """
    console, errors = Screen(highlight=False), Screen(stderr=True, highlight=False)

    def tell(line: str) -> None:
        errors.print(line, style="yellow", markup=False, soft_wrap=True)

    # `follow` waits for the server itself, since it can report that.
    once = RetryPolicy(attempts=1)
    with (
        errors_shown(context, debug),
        Client(find_server(context, server), retry=once) as client,
    ):
        if json_:
            for event in follow(client, since, tell):
                print(json_line(event), flush=True)
        elif console.is_terminal:
            _show_board(client, since, console)
        else:
            for event in follow(client, since, tell):
                if event.kind not in _QUIET:
                    print(event_line(event), flush=True)


def follow(client: Client, since: int, tell: Callable[[str], None]) -> Iterator[AdapterEvent]:
    """Yield events without end, even if the server goes away for a while.

    Args:
        client: a client that does not retry by itself.
        tell: called with a line when the server goes away, and one when it is back.

    Raises:
        ServerUnreachable: there is no server at the start.
        VeneerError: the server refuses the watch.
    """
    reached = away = False
    while True:
        watch = client.watch(since)
        try:
            with watch:
                for event in watch:
                    if away:
                        tell(f"{_now()}  {client.address} reconnected")
                    reached, away = True, False
                    yield event
        except Unavailable as error:
            if not reached and isinstance(error, ServerUnreachable):
                raise
            since = watch.sequence
            if not away:
                why = _GONE if isinstance(error, ServerUnreachable) else error.message
                tell(f"{_now()}  {client.address}: {why}; reconnecting (Ctrl-C to stop)")
            away = True
            time.sleep(_LOOK_S)


def _show_board(client: Client, since: int, console: Console) -> None:
    board, done = Board(), threading.Event()
    with Live(console=console, get_renderable=board.table) as live:

        def tell(line: str) -> None:
            board.lose()
            live.console.print(line, style="yellow", markup=False)

        def count() -> None:
            while not done.wait(_LOOK_S):
                with contextlib.suppress(VeneerError):  # `follow` reports it
                    board.count(leases_now(client, board.busy()))

        counting = threading.Thread(target=count, name="leases", daemon=True)
        counting.start()
        try:
            for event in follow(client, since, tell):
                board.apply(event)
        finally:
            done.set()
            counting.join()


def leases_now(client: Client, also: Iterable[Key]) -> dict[Key, int]:
    """Number of running requests of each revision that is in memory or in ``also``. This is
    polled, since the end of a request is not an event."""
    found = {
        (adapter.name, adapter.revision): adapter.leases
        for tier in (Tier.DEVICE, Tier.HOST)
        for adapter in client.list(tier=tier, timeout_s=_CALL_S)
    }
    for name, revision in set(also) - found.keys():
        try:
            adapter = client.get(f"{name}@{revision}", timeout_s=_CALL_S).adapter
        except AdapterNotFound:
            continue
        found[name, revision] = adapter.leases
    return found


class Board:
    """Every adapter with its last event and its requests. Thread-safe."""

    def __init__(self) -> None:
        self._rows: dict[Key, tuple[AdapterInfo, str]] = {}
        self._leases: dict[Key, int] = {}
        """Number of running requests by row; a missing row's is unknown."""
        self._lock = threading.Lock()

    def lose(self) -> None:
        """Forget the numbers of requests: the server is away, so they are unknown."""
        with self._lock:
            self._leases.clear()

    def busy(self) -> set[Key]:
        """Rows that had requests at the last `count`."""
        with self._lock:
            return {key for key in self._rows if self._leases.get(key)}

    def count(self, leases: Mapping[Key, int]) -> None:
        """Set the numbers of running requests; 0 for rows that ``leases`` lacks."""
        with self._lock:
            self._leases = {key: leases.get(key, 0) for key in self._rows}

    def apply(self, event: AdapterEvent) -> None:
        """Apply one event."""
        with self._lock:
            self._apply(event)
            if event.adapter is not None:
                self._leases[event.adapter.name, event.adapter.revision] = event.adapter.leases

    def _apply(self, event: AdapterEvent) -> None:
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
        # A revision that is neither current nor in memory is not shown.
        if adapter.current or adapter.tier is not Tier.DISK:
            self._rows[key] = (adapter, _last(event))
        else:
            self._rows.pop(key, None)

    def _supersede(self, name: str) -> None:
        for key, (adapter, _) in tuple(self._rows.items()):
            if adapter.name == name and adapter.tier is Tier.DISK:
                del self._rows[key]

    def table(self) -> Table:
        """The present state as a table."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("adapter", "revision", "tier", "size", "in use", "last event"):
            right = column in ("size", "in use")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        with self._lock:
            rows, leases = sorted(self._rows.items()), dict(self._leases)
        for (name, revision), (adapter, last) in rows:
            table.add_row(
                cell(name),
                cell(revision[:12]),
                cell(place_of(adapter)),
                byte_size(adapter.size),
                str(leases.get((name, revision), "?")),
                cell(last),
            )
        return table


def _now() -> str:
    return datetime.now().strftime("%H:%M:%S")


def _clock(moment: datetime) -> str:
    return moment.astimezone().strftime("%H:%M:%S")


def _last(event: AdapterEvent) -> str:
    if event.kind is AdapterEventKind.PRESENT:
        return ""
    detail = f" ({event.detail})" if event.detail else ""
    return f"{event.kind.value}{detail} {_clock(event.time)}"


def event_line(event: AdapterEvent) -> str:
    """One event for a person or ``grep``, with columns separated by two spaces."""
    parts = [_clock(event.time), f"{event.kind.value:13}"]
    if event.adapter is not None:
        adapter = event.adapter
        parts += [adapter.short, place_of(adapter), byte_size(adapter.size)]
    if event.detail:
        parts.append(event.detail)
    return one_line("  ".join(parts))
