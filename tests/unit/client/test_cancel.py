"""However a caller leaves, the server stops its work; if a server ends, callers notice."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from veneer_client import AsyncClient, Client, GenerationStream, RetryPolicy, Text
from veneer_client.failures import Attempts
from veneer_client.readers import StreamStart
from veneer_registry.errors import Cancelled, QueueFull, ServerUnreachable, VeneerError

from tests.refused import refused
from tests.unit.client.drivers import Driver
from tests.unit.client.fake_server import FakeServer, Refusal
from tests.unit.client.wire import Wire


class Interrupted:
    """A FAKE call: Ctrl-C is pressed while it is waited for, which no test can time."""

    cancelled = False

    def result(self) -> None:
        raise KeyboardInterrupt

    __next__ = result

    def cancel(self) -> None:
        self.cancelled = True


def test_ctrl_c_ends_a_unary_call_that_is_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Interrupted()
    method = SimpleNamespace(future=lambda request, **_: call)
    channel = SimpleNamespace(unary_unary=lambda *_, **__: method, close=lambda: None)
    monkeypatch.setattr(grpc, "insecure_channel", lambda *_, **__: channel)
    with Client("nowhere:1") as client, pytest.raises(KeyboardInterrupt):
        client.generate(Text("hi"))
    assert call.cancelled


def test_ctrl_c_ends_a_stream() -> None:
    call = Interrupted()
    attempts = Attempts(RetryPolicy(), repeatable=True, timeout_s=None)
    stream = GenerationStream(StreamStart(lambda left_s: call, attempts, lambda error: error))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert call.cancelled


def test_breaking_out_of_the_loop_ends_the_call(server: FakeServer) -> None:
    server.hold = threading.Event()
    with Client(server.address) as client:
        for _ in client.generate_stream(Text("hi")):
            break
        assert server.cancelled.wait(10)


async def test_breaking_out_of_the_async_loop_ends_the_call(server: FakeServer) -> None:
    server.hold = threading.Event()
    async with AsyncClient(server.address) as client:
        async for _ in client.generate_stream(Text("hi")):
            break
        assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_cancelling_the_task_ends_a_unary_call(server: FakeServer) -> None:
    server.hold = threading.Event()
    async with AsyncClient(server.address) as client:
        task = asyncio.create_task(client.generate(Text("hi")))
        await asyncio.to_thread(server.begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.cancelled.wait, 10)


@pytest.mark.parametrize("method", ["GenerateStream", "WatchAdapters"])
def test_cancelled_between_two_attempts(
    method: str, server: FakeServer, client: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call runs then that could be cancelled."""
    server.watches.append([])
    server.refusals.append(
        Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_s=0.001)
    )

    def cancel(*_: object) -> float:
        stream.cancel()
        return 0.0

    monkeypatch.setattr(Attempts, "wait_s", cancel)
    if method == "GenerateStream":
        stream = client.generate_stream(Text("hi"))
    else:
        stream = client.watch()
    with pytest.raises(Cancelled):
        client.take(stream, 1)
    assert server.count(method) == 1


def test_cancelled_while_the_next_attempt_begins() -> None:
    """By another thread, which still sees the call before."""
    calls: list[Any] = []

    class Ended(grpc.RpcError):
        """A FAKE call that the server refused, or that was cancelled."""

        cancelled = False

        def __next__(self) -> None:
            assert self.cancelled or len(calls) == 1, "runs on"
            raise self

        def cancel(self) -> None:
            self.cancelled = True

    def begin(left_s: float | None) -> Ended:
        if calls:
            stream.cancel()
        calls.append(Ended())
        return calls[-1]  # type: ignore[no-any-return]

    def failure(error: Ended) -> VeneerError:
        return Cancelled("gone") if error.cancelled else QueueFull("full", retry_after_s=0.0)

    attempts = Attempts(RetryPolicy(), repeatable=True, timeout_s=None)
    stream = GenerationStream(StreamStart(begin, attempts, failure))
    with pytest.raises(Cancelled):
        next(stream)
    assert [call.cancelled for call in calls] == [True, True]


def test_a_closed_client_says_so(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    client.close()
    for call in (
        client.info,
        lambda: client.generate(Text("hi")),
        lambda: client.generate_stream(Text("hi")),
        lambda: client.watch(),
        lambda: client.push(adapter_folder, "sql"),
    ):
        with refused(Cancelled, cause="client_closed"):
            call()


def test_closing_ends_what_runs(server: FakeServer) -> None:
    server.hold = threading.Event()
    client = Client(server.address)
    stream = client.generate_stream(Text("hi"))
    next(stream)
    client.close()
    with pytest.raises(Cancelled):
        next(stream)


async def test_closing_ends_what_runs_async(server: FakeServer) -> None:
    """With an error: a group of tasks swallows a CancelledError that it did not cause."""
    server.hold = threading.Event()
    client = AsyncClient(server.address)
    stream = client.generate_stream(Text("hi"))
    await anext(stream)
    server.begun.clear()
    unary = asyncio.create_task(client.generate(Text("hi")))
    await asyncio.to_thread(server.begun.wait, 10)
    await client.close()
    for outcome in (unary, anext(stream)):
        with pytest.raises(Cancelled):
            await outcome


async def test_cancelling_an_async_stream_is_an_error_for_its_reader(
    server: FakeServer,
) -> None:
    server.hold = threading.Event()
    async with AsyncClient(server.address) as client:
        stream = client.generate_stream(Text("hi"))
        await anext(stream)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)  # it waits for a message
        stream.cancel()
        with pytest.raises(Cancelled):
            await reader
        with pytest.raises(Cancelled):
            await anext(stream)


async def test_cancelling_the_task_stays_what_it_is_for_a_stream(server: FakeServer) -> None:
    server.hold = threading.Event()
    async with AsyncClient(server.address) as client:
        stream = client.generate_stream(Text("hi"))
        await anext(stream)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(stream)


def test_a_machine_that_went_silent_is_noticed(server: FakeServer, wire: Wire) -> None:
    """No deadline, no closed socket: only the pings tell."""
    server.hold = threading.Event()
    with Client(wire.address, keepalive_s=0.2) as client:
        stream = client.generate_stream(Text("hi"))
        next(stream)
        wire.cut()
        with pytest.raises(ServerUnreachable):
            next(stream)


async def test_a_machine_that_went_silent_is_noticed_async(
    server: FakeServer, wire: Wire
) -> None:
    server.hold = threading.Event()
    async with AsyncClient(wire.address, keepalive_s=0.2) as client:
        stream = client.generate_stream(Text("hi"))
        await anext(stream)
        wire.cut()
        with pytest.raises(ServerUnreachable):
            await anext(stream)
