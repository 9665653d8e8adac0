"""Watching adapters: records, resuming after interruptions, leaving."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from veneer_client import AdapterEventKind, AsyncClient, Client, RetryPolicy
from veneer_client.convert_admin import adapter_event
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_registry.errors import Aborted, InternalError, ServerUnreachable

from tests.refused import refused
from tests.unit.client.drivers import Driver, driver
from tests.unit.client.fake_server import FakeServer, Refusal

QUICK = RetryPolicy(attempts=5, longest_wait_s=0.002)
DRAINING = Refusal(grpc.StatusCode.UNAVAILABLE, "stopping", "DRAINING", retry_s=0.001)


def event(
    server: FakeServer, kind: int, sequence: int, name: str = ""
) -> pb.WatchAdaptersResponse:
    made = pb.WatchAdaptersResponse(event=kind, sequence=sequence)  # type: ignore[arg-type]
    made.time.FromSeconds(1_700_000_000)
    if name:
        made.adapter.CopyFrom(server.add(name))
    return made


def since(server: FakeServer) -> list[int]:
    return [r.since_sequence for name, r in server.calls if name == "WatchAdapters"]


def test_events_are_records(server: FakeServer, client: Driver) -> None:
    server.hold = None
    server.watches.append(
        [
            event(server, pb.ADAPTER_EVENT_RESET, 0),
            event(server, pb.ADAPTER_EVENT_PRESENT, 0, "sql"),
            event(server, pb.ADAPTER_EVENT_SYNCED, 7),
            event(server, pb.ADAPTER_EVENT_EVICTED, 8, "sql"),
            event(server, 99, 9),
        ]
    )
    watch = client.watch(since=5)
    events = client.take(watch, 5)
    assert [e.kind for e in events] == [
        AdapterEventKind.RESET,
        AdapterEventKind.PRESENT,
        AdapterEventKind.SYNCED,
        AdapterEventKind.EVICTED,
        AdapterEventKind.UNKNOWN,
    ]
    assert [e.adapter.name if e.adapter else None for e in events] == [
        None,
        "sql",
        None,
        "sql",
        None,
    ]
    assert events[0].time.year == 2023
    assert (since(server), watch.sequence) == ([5], 9)
    with refused(InternalError, cause="stream_cut"):
        client.take(watch, 1)


def test_every_kind_of_the_contract_has_a_record() -> None:
    for name, number in pb.AdapterEvent.items():
        read = adapter_event(pb.WatchAdaptersResponse(event=number)).kind
        unknown = name == "ADAPTER_EVENT_UNSPECIFIED"
        assert read.name == ("UNKNOWN" if unknown else name.removeprefix("ADAPTER_EVENT_"))


def test_goes_on_after_an_interruption_from_where_it_was(kind: str, server: FakeServer) -> None:
    server.watches.extend(
        [
            [event(server, pb.ADAPTER_EVENT_SYNCED, 7), event(server, 2, 0, "a")],
            [event(server, pb.ADAPTER_EVENT_LOADED, 8, "a")],
        ]
    )
    server.break_after = DRAINING
    with driver(kind, server.address, retry=QUICK) as client:
        events = client.take(client.watch(), 3)
    assert events[-1].kind is AdapterEventKind.LOADED
    assert since(server) == [0, 7], "0 is no place to resume from"


def test_a_server_that_is_gone_is_waited_for_only_once_known(
    kind: str, server: FakeServer
) -> None:
    server.watches.append([event(server, pb.ADAPTER_EVENT_SYNCED, 7)])
    server.break_after = DRAINING
    gone = Refusal(grpc.StatusCode.UNAVAILABLE, "the socket closed")
    with driver(kind, server.address, retry=QUICK) as client:
        watch = client.watch()
        client.take(watch, 1)
        server.refusals.extend([gone] * 9)
        with pytest.raises(ServerUnreachable):
            client.take(watch, 1)
        assert server.count("WatchAdapters") == 5
        server.refusals.clear()
        server.refusals.append(gone)
        with pytest.raises(ServerUnreachable):
            client.take(client.watch(), 1)
        assert server.count("WatchAdapters") == 6


def test_who_fell_behind_is_told(server: FakeServer, client: Driver) -> None:
    server.watches.append([event(server, pb.ADAPTER_EVENT_SYNCED, 7)])
    server.break_after = Refusal(grpc.StatusCode.ABORTED, "fell behind", "ABORTED")
    watch = client.watch()
    client.take(watch, 1)
    with refused(Aborted):
        client.take(watch, 1)


def test_leaving_ends_the_call(server: FakeServer) -> None:
    server.hold = threading.Event()
    server.watches.append([event(server, pb.ADAPTER_EVENT_SYNCED, 7)])
    with Client(server.address) as client:
        with client.watch() as events:
            next(events)
            assert not server.cancelled.is_set()
        assert server.cancelled.wait(10)


async def test_leaving_ends_the_async_call(server: FakeServer) -> None:
    server.hold = threading.Event()
    server.watches.append([event(server, pb.ADAPTER_EVENT_SYNCED, 7)])
    async with AsyncClient(server.address) as client:
        async with client.watch() as events:
            await anext(events)
            assert not server.cancelled.is_set()
        assert await asyncio.to_thread(server.cancelled.wait, 10)
