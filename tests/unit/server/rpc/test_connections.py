"""Connections without calls are closed if others need their places."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc
from veneer_server.rpc.transport import connections as connections_module
from veneer_server.rpc.transport.connections import KNOWN, Connections

from tests.attacks.http2 import Connection, grpc_message
from tests.unit.server.access.tenants_kit import shared
from tests.unit.server.rpc.front_harness import Front, prompt, running

MOST = 8


@pytest.fixture
async def front(base_folder: Path, front_cache: Path, tmp_path: Path) -> AsyncIterator[Front]:
    flags = {"max_connections": str(MOST), "openai_listen": "127.0.0.1:0"}
    async with running(base_folder, front_cache, tmp_path, **flags) as started:
        yield started


def channel(front: Front, number: int) -> Any:
    """A connection of its own."""
    options = (
        ("grpc.use_local_subchannel_pool", 1),
        ("tests.number", number),
        # A client whose connection was closed connects again at once, not after seconds.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 100),
    )
    return grpc.aio.insecure_channel(front.addresses["grpc"], options=options)


async def healthy(through: Any) -> None:
    """Asks until there is an answer, as clients do; a test that waits for ever fails."""
    stub = health_pb2_grpc.HealthStub(through)
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            return
        await asyncio.sleep(0.01)


async def test_clients_that_ask_for_nothing_more_make_room_for_others(front: Front) -> None:
    async with contextlib.AsyncExitStack() as stack:
        quiet = [await stack.enter_async_context(channel(front, n)) for n in range(3 * MOST)]
        for each in quiet:
            await healthy(each)
        # And each of them is served again when it asks.
        for each in quiet:
            await healthy(each)


async def test_sockets_that_say_nothing_make_room(front: Front) -> None:
    host, port = front.addresses["grpc"].rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        for _ in range(3 * MOST):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex((host, int(port)))
        async with channel(front, 0) as late:
            await healthy(late)


async def test_a_connection_with_a_call_stays(front: Front) -> None:
    async with contextlib.AsyncExitStack() as stack:
        watching = await stack.enter_async_context(channel(front, 0))
        watch: Any = adapters_pb2_grpc.AdapterServiceStub(watching).WatchAdapters(
            adapters_pb2.WatchAdaptersRequest()
        )
        await watch.read()
        for n in range(1, 3 * MOST):
            await healthy(await stack.enter_async_context(channel(front, n)))
        assert not watch.done()
        watch.cancel()


async def test_where_there_is_room_nobody_is_closed(front: Front) -> None:
    """One place is kept free; the front's own channel has another."""
    async with contextlib.AsyncExitStack() as stack:
        quiet = [await stack.enter_async_context(channel(front, n)) for n in range(MOST - 2)]
        for each in quiet:
            await healthy(each)
        await healthy(front.channel)


async def test_strangers_go_before_callers_those_first_that_called_longest_ago() -> None:
    clock = iter(range(1000))
    connections = Connections(MOST, clock=lambda: float(next(clock)))
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listening.getsockname()[1]
        clients = []
        for n in range(MOST + 2):
            address = ("127.0.0.1", port)
            clients.append(stack.enter_context(socket.create_connection(address)))
            stack.enter_context(listening.accept()[0])
            with connections.call(f"ipv4:127.0.0.1:{clients[n].getsockname()[1]}") as call:
                call.arrived()
                if n not in (1, 3, 6, 7):
                    call.earned("")
        for each in clients:
            each.setblocking(False)
        watching = asyncio.create_task(connections.watch(port))
        for n in (1, 3, 6):
            assert await asyncio.get_running_loop().sock_recv(clients[n], 1) == b""
        watching.cancel()
        for other in (each for n, each in enumerate(clients) if n not in (1, 3, 6)):
            with pytest.raises(BlockingIOError):
                other.recv(1)


@contextlib.contextmanager
def accepted(count: int) -> Iterator[tuple[int, list[socket.socket]]]:
    """So many connections to a port of this process, of which nobody has called."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = listening.getsockname()
        clients = []
        for _ in range(count):
            clients.append(stack.enter_context(socket.create_connection(address)))
            clients[-1].setblocking(False)
            stack.enter_context(listening.accept()[0])
        yield address[1], clients


async def test_room_is_made_after_thousands_of_connections_have_called() -> None:
    """The one that called first is forgotten where others are added: a KeyError ended the
    watch, and nobody knew."""
    connections = Connections(MOST)
    with accepted(MOST + 1) as (port, clients):
        with connections.call(f"ipv4:127.0.0.1:{clients[0].getsockname()[1]}") as call:
            call.arrived()
            call.earned("")
        for n in range(KNOWN - 1):
            with connections.call(f"ipv4:10.0.0.2:{n}"):
                pass
        watching = asyncio.create_task(connections.watch(port))
        for each in clients[1:3]:
            assert await asyncio.get_running_loop().sock_recv(each, 1) == b""
        watching.cancel()
        with pytest.raises(BlockingIOError):
            clients[0].recv(1)


async def test_one_failed_look_does_not_end_the_watch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FAULT: no descriptor is left to look at descriptors with."""
    monkeypatch.setattr(connections_module, "LOOK_S", 0.001)
    look, failures = os.listdir, iter(range(5))

    def listdir(path: Any) -> list[str]:
        if next(failures, None) is not None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return look(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with accepted(MOST + 1) as (port, clients):
        watching = asyncio.create_task(Connections(MOST).watch(port))
        assert await asyncio.get_running_loop().sock_recv(clients[0], 1) == b""
        watching.cancel()
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


@pytest.mark.parametrize("peer", ["ipv6:%5B::1%5D:{}", "ipv6:[::1]:{}"])
async def test_addresses_of_ipv6_are_known(peer: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    connections = Connections(1)
    with contextlib.ExitStack() as stack:
        try:
            listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
        stack.enter_context(listening)
        port = listening.getsockname()[1]
        quiet = stack.enter_context(socket.create_connection(("::1", port)))
        calling = stack.enter_context(socket.create_connection(("::1", port)))
        for _ in range(2):
            stack.enter_context(listening.accept()[0])
        quiet.setblocking(False)
        calling.setblocking(False)
        with connections.call(peer.format(calling.getsockname()[1])) as call:
            call.arrived()
            watching = asyncio.create_task(connections.watch(port))
            assert await asyncio.get_running_loop().sock_recv(quiet, 1) == b""
            watching.cancel()
            with pytest.raises(BlockingIOError):
                calling.recv(1)


async def test_a_call_that_has_just_begun_goes_after_connections_that_say_nothing() -> None:
    """Its head was seen at once, and their sockets only by the next look: it was closed as the
    one that had waited longest, milliseconds after it had come."""
    connections, loop = Connections(MOST), asyncio.get_running_loop()
    with accepted(MOST + 2) as (port, clients):
        peer = f"ipv4:127.0.0.1:{clients[-1].getsockname()[1]}"
        watching = asyncio.create_task(connections.watch(port))
        gone = {asyncio.create_task(loop.sock_recv(each, 1)) for each in clients[:-1]}
        with connections.call(peer):
            while sum(each.done() for each in gone) < 3:
                await asyncio.wait(
                    {each for each in gone if not each.done()},
                    return_when=asyncio.FIRST_COMPLETED,
                )
            with pytest.raises(BlockingIOError):
                clients[-1].recv(1)
        for each in (watching, *gone):
            each.cancel()
        await asyncio.gather(watching, *gone, return_exceptions=True)


# ------------------------------------------------------------- half-sent and silent calls

HALF_HEADERS = b"\0\0\1\1\0\0\0\0\1\x83"
"""Frame of headers that a CONTINUATION frame should follow."""
CHECK, WATCH = (f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch"))
SHAPES = ("nothing", "settings", "half headers", "headers", "half a message", "a watch")


async def half(address: str, shape: str, number: int) -> Connection | None:
    """A connection that begins a call as far as its shape says. None if it is refused."""
    host, port = address.rsplit(":", 1)
    local = (f"127.0.0.{1 + number % 5}", 0)
    try:
        opened = await asyncio.open_connection(host, int(port), local_addr=local)
    except OSError:
        return None
    connection = Connection(*opened)
    if shape == "nothing":
        return connection
    await connection.begin()
    if connection.lost.is_set():
        return connection
    if shape == "half headers":
        opened[1].write(HALF_HEADERS)
    elif shape != "settings":
        stream = connection.call(WATCH if shape == "a watch" else CHECK)
        if shape == "half a message":
            await connection.send(stream, grpc_message(100), patience_s=1)
        elif shape == "a watch":
            await connection.send(stream, grpc_message(0, whole=True), patience_s=1)
    return connection


@pytest.mark.push
@pytest.mark.parametrize("asks", ["without keys", "with keys"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_calls_that_do_not_arrive_take_no_place_of_others(
    base_folder: Path, front_cache: Path, tmp_path: Path, asks: str, shape: str
) -> None:
    """A caller keeps its connection, and new ones get in."""
    async with contextlib.AsyncExitStack() as stack:
        most = {"max_connections": str(MOST)}
        if asks == "with keys":
            both = await stack.enter_async_context(
                shared(base_folder, front_cache, tmp_path, **most)
            )
            front, key = both.front, both.caller("team-a", "inference").key
            metadata = (("authorization", f"Bearer {key}"),)
        else:
            front = await stack.enter_async_context(
                running(base_folder, front_cache, tmp_path, **most)
            )
            metadata = ()
        kept = await stack.enter_async_context(channel(front, 0))
        stubs = inference_pb2_grpc.InferenceServiceStub(kept)
        states: list[grpc.ChannelConnectivity] = []
        await stubs.Generate(prompt(), metadata=metadata)
        for round_ in range(2):
            for n in range(4 * MOST):
                if (opened := await half(front.addresses["grpc"], shape, n)) is not None:
                    stack.callback(opened.close)
                states.append(kept.get_state())
                if n % 8 == 7:
                    async with channel(front, 1 + n + 100 * round_) as new:
                        fresh = inference_pb2_grpc.InferenceServiceStub(new)
                        await fresh.Generate(prompt(), metadata=metadata, wait_for_ready=True)
        await stubs.Generate(prompt(), metadata=metadata)
        assert set(states) == {grpc.ChannelConnectivity.READY}, "it was closed"
