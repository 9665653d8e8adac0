"""``veneer adapter watch``: the table as a thing of its own, lines and JSON from a pipe."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from rich.console import Console
from typer.testing import CliRunner
from veneer_client import AdapterEvent, AdapterEventKind, AdapterInfo, Tier
from veneer_client.cli.main import cli
from veneer_client.cli.watch import Board
from veneer_client.convert_admin import adapter_info
from veneer_proto.v1 import adapters_pb2 as pb

from tests.unit.client.fake_server import FakeServer, Refusal

Kind = AdapterEventKind
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def info(name: str, revision: str, tier: Tier, **fields: Any) -> AdapterInfo:
    wire = pb.Adapter(name=name, revision=revision * 64, bytes=2048, **fields)
    wire.created.FromDatetime(NOW)
    made = adapter_info(wire)
    return AdapterInfo(**{n: getattr(made, n) for n in made.__slots__} | {"tier": tier})


def shown(board: Board) -> list[list[str]]:
    """The table's rows, without its heading, as words."""
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(board.table())
    return [line.split() for line in captured.get().splitlines()[1:]]


def event(kind: Kind, adapter: AdapterInfo | None = None, detail: str = "") -> AdapterEvent:
    return AdapterEvent(kind, 1, NOW, adapter, detail)


def test_the_table_follows_events() -> None:
    board = Board()
    board.apply(event(Kind.PRESENT, info("sql", "a", Tier.DISK, current=True)))
    assert shown(board) == [["sql", "a" * 12, "disk", "2.0", "KiB", "0"]]
    board.apply(
        event(
            Kind.ACTIVATED, info("sql", "a", Tier.DEVICE, current=True, pinned=True, leases=3)
        )
    )
    ((name, revision, tier, pinned, _, _, leases, last, _),) = shown(board)
    assert (name, revision, tier, pinned) == ("sql", "a" * 12, "device", "(pinned)")
    assert (leases, last) == ("3", "activated")
    board.apply(event(Kind.EVICTED, info("sql", "a", Tier.HOST, current=True), "capacity"))
    assert "(capacity)" in shown(board)[0]


def test_the_table_tells_of_damage_and_aliases() -> None:
    board = Board()
    damaged = info(
        "sql", "a", Tier.DISK, current=True, state=pb.ADAPTER_STATE_QUARANTINED, pinned=True
    )
    board.apply(event(Kind.QUARANTINED, damaged, "weights differ"))
    (row,) = shown(board)
    assert row[2:5] == ["disk", "(pinned,", "quarantined)"]
    assert "(weights" in row
    board.apply(event(Kind.ALIAS_CHANGED, info("sql", "b", Tier.HOST), "sql/prod"))
    assert shown(board)[1][6:8] == ["alias_changed", "(sql/prod)"]
    board.apply(event(Kind.UPDATED, info("sql", "a", Tier.DISK, current=True)))
    assert "quarantined)" not in shown(board)[0], "repaired"


def test_a_replaced_revision_stays_as_long_as_it_is_in_memory() -> None:
    board = Board()
    board.apply(event(Kind.PRESENT, info("sql", "a", Tier.DEVICE, current=True)))
    board.apply(event(Kind.REPLACED, info("sql", "b", Tier.DISK, current=True)))
    assert [row[1][0] for row in shown(board)] == ["a", "b"]
    board.apply(event(Kind.EVICTED, info("sql", "a", Tier.DISK), "admin"))
    assert [row[1][0] for row in shown(board)] == ["b"]
    board.apply(event(Kind.REPLACED, info("sql", "c", Tier.DISK, current=True)))
    assert [row[1][0] for row in shown(board)] == ["c"], "b was on disk only"


def test_deleted_rows_go_and_a_reset_starts_anew() -> None:
    board = Board()
    for name in ("one", "two"):
        board.apply(event(Kind.PUBLISHED, info(name, "a", Tier.DISK, current=True)))
    board.apply(event(Kind.DELETED, info("one", "a", Tier.DISK)))
    assert [row[0] for row in shown(board)] == ["two"]
    board.apply(event(Kind.RESET))
    assert shown(board) == []


@pytest.fixture
def run(server: FakeServer) -> Callable[..., Any]:
    def invoke(*args: str) -> Any:
        seen = [(pb.ADAPTER_EVENT_RESET, 0, ""), (pb.ADAPTER_EVENT_PRESENT, 0, "sql")]
        seen += [(pb.ADAPTER_EVENT_SYNCED, 7, ""), (pb.ADAPTER_EVENT_FAILED, 8, "sql")]
        messages = []
        for kind, sequence, name in seen:
            message = pb.WatchAdaptersResponse(event=kind, sequence=sequence)
            message.time.FromDatetime(NOW)
            if name:
                message.adapter.CopyFrom(server.add(name))
                message.detail = "push it again" if kind == pb.ADAPTER_EVENT_FAILED else ""
            messages.append(message)
        server.watches.append(messages)
        server.break_after = Refusal(grpc.StatusCode.ABORTED, "fell behind", "ABORTED")
        place = {"VENEER_SERVER": server.address, "COLUMNS": "200"}
        return CliRunner().invoke(cli, ["adapter", "watch", *args], env=place)

    return invoke


def test_lines_for_a_pipe(run: Callable[..., Any]) -> None:
    done = run()
    first, second = (line.split() for line in done.stdout.splitlines())
    assert first[1:] == ["present", "sql@73716c73716c", "disk", "200", "B"]
    assert second[1:] == [
        *["failed", "sql@73716c73716c", "disk", "200", "B"],
        "push",
        "it",
        "again",
    ]
    assert (done.exit_code, done.stderr) == (1, "error: fell behind\n")


def test_json_for_a_program(server: FakeServer, run: Callable[..., Any]) -> None:
    done = run("--json", "--since", "5")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["kind"] for e in events] == ["reset", "present", "synced", "failed"]
    assert [e["sequence"] for e in events] == [0, 0, 7, 8]
    assert events[1]["adapter"]["name"] == "sql"
    assert server.calls[0][1].since_sequence == 5
