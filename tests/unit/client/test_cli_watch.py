"""``veneer adapter watch``: the table by itself, lines and JSON through a pipe."""

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
from veneer_client import (
    AdapterEvent,
    AdapterEventKind,
    AdapterInfo,
    Client,
    RetryPolicy,
    Tier,
)
from veneer_client.cli.main import cli
from veneer_client.cli.watch import Board, follow, leases_now
from veneer_client.convert_admin import adapter_info
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import inference_pb2

from tests.ports import free_port
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


def test_ended_requests_are_not_shown_as_in_use() -> None:
    board = Board()
    board.apply(event(Kind.PRESENT, info("sql", "a", Tier.DEVICE, current=True, leases=3)))
    board.apply(event(Kind.PRESENT, info("chat", "b", Tier.DISK, current=True)))
    assert board.busy() == {("sql", "a" * 64)}
    board.count({("sql", "a" * 64): 1, ("gone", "c" * 64): 2})
    assert [row[5] for row in shown(board)] == ["0", "1"]
    board.count({})
    assert [row[5] for row in shown(board)] == ["0", "0"]
    assert board.busy() == set()
    board.lose()
    assert [row[5] for row in shown(board)] == ["?", "?"]
    board.apply(event(Kind.LOADED, info("chat", "b", Tier.HOST, current=True, leases=2)))
    assert [row[5] for row in shown(board)] == ["2", "?"]


def test_requests_are_asked_for_where_they_can_be(server: FakeServer) -> None:
    wire = {
        "one": (inference_pb2.TIER_DEVICE, 1),
        "two": (inference_pb2.TIER_HOST, 2),
        "old": (inference_pb2.TIER_DISK, 3),
    }
    for name, (tier, leases) in wire.items():
        made = server.add(name)
        made.tier, made.leases = tier, leases
    old = ("old", server.adapters["old"].revision)
    with Client(server.address) as client:
        found = leases_now(client, {old, ("deleted", "d" * 64)})
    assert {name: n for (name, _), n in found.items()} == {"one": 1, "two": 2, "old": 3}


def test_a_server_that_was_never_there_is_an_error_at_once() -> None:
    place = {"VENEER_SERVER": f"127.0.0.1:{free_port()}"}
    done = CliRunner().invoke(cli, ["adapter", "watch"], env=place)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: no Veneer server answers")
    assert len(done.stderr.splitlines()) == 1


def test_what_was_lost_is_told_once_and_the_row_goes_on(server: FakeServer) -> None:
    def told(kind: Any, sequence: int, name: str = "") -> pb.WatchAdaptersResponse:
        message = pb.WatchAdaptersResponse(event=kind, sequence=sequence)
        if name:
            message.adapter.CopyFrom(server.add(name))
        return message

    server.watches.extend(
        [
            [told(pb.ADAPTER_EVENT_SYNCED, 7), told(pb.ADAPTER_EVENT_LOADED, 8, "sql")],
            [told(pb.ADAPTER_EVENT_EVICTED, 9, "sql")],
        ]
    )
    server.break_after = Refusal(grpc.StatusCode.UNAVAILABLE, "stopping", "DRAINING")
    lines: list[str] = []
    with Client(server.address, retry=RetryPolicy(attempts=1)) as client:
        events = follow(client, 0, lines.append)
        assert [next(events).sequence for _ in range(3)] == [7, 8, 9]
    asked = [r.since_sequence for name, r in server.calls if name == "WatchAdapters"]
    assert asked == [0, 8]
    lost, back = lines
    assert lost.endswith("stopping; reconnecting (Ctrl-C to stop)")
    assert back.endswith(f"{server.address} reconnected")


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
        "failed",
        "sql@73716c73716c",
        "disk",
        "200",
        "B",
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
