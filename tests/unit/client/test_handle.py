"""``with client.adapter(name)``: one revision for all calls inside."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from veneer_client import AsyncClient, Client, Text, Tier
from veneer_registry.errors import AdapterNotFound, EngineFailed, QueueFull, ServerUnreachable

from tests.unit.client.drivers import Driver
from tests.unit.client.fake_server import FakeServer, Refusal


def named(server: FakeServer, method: str) -> list[str]:
    field = "adapter" if method.startswith("Generate") else "name"
    return [getattr(request, field) for name, request in server.calls if name == method]


def test_all_calls_name_the_revision_of_entry(server: FakeServer, client: Driver) -> None:
    revision = server.add("sql").revision

    def use(a: Any) -> str:
        server.add("sql").revision = "f" * 64  # published meanwhile
        a.generate(Text("x"), max_tokens=1)
        a.chat([{"role": "user", "content": "x"}])
        return str(a.ref)

    ref = client.inside(client.adapter("sql"), use)
    assert ref == f"sql@{revision}"
    assert named(server, "GetAdapter") == ["sql"]
    assert named(server, "Generate") == [ref, ref]
    assert server.count("ActivateAdapter") == server.count("UpdateAdapter") == 0


def test_streams_and_details_of_the_handle(server: FakeServer) -> None:
    ref = f"sql@{server.add('sql').revision}"
    with Client(server.address) as client, client.adapter("sql") as a:
        assert [c.text for c in a.generate_stream(Text("x"), max_tokens=1)] == ["0 "]
        assert len(list(a.chat_stream([{"role": "user", "content": "x"}]))) == 3
        assert a.details().adapter == a.info
    assert named(server, "GenerateStream") == [ref, ref]
    assert named(server, "GetAdapter") == ["sql", ref]


async def test_streams_and_details_of_the_async_handle(server: FakeServer) -> None:
    ref = f"sql@{server.add('sql').revision}"
    async with AsyncClient(server.address) as client, client.adapter("sql") as a:
        assert [c.text async for c in a.generate_stream(Text("x"), max_tokens=1)] == ["0 "]
        chat = a.chat_stream([{"role": "user", "content": "x"}])
        assert len([c async for c in chat]) == 3
        assert (await a.details()).adapter == a.info
    assert named(server, "GenerateStream") == [ref, ref]
    assert named(server, "GetAdapter") == ["sql", ref]


def test_unknown_name_is_told_at_entry(server: FakeServer, client: Driver) -> None:
    handle = client.adapter("sqll")
    with pytest.raises(AdapterNotFound) as caught:
        client.inside(handle, lambda a: None)
    assert caught.value.metadata["did_you_mean"] == "chat"
    # A wrong use of the client is a plain error, whose sentence is the fix.
    with pytest.raises(RuntimeError, match=r"inside its `(async )?with`"):
        _ = handle.info


def test_activate(server: FakeServer, client: Driver) -> None:
    server.add("sql")
    tier = client.inside(client.adapter("sql", activate=True), lambda a: a.info.tier)
    assert tier is Tier.DEVICE
    assert server.count("UpdateAdapter") == 0


def test_a_pin_of_ours_goes_with_us(server: FakeServer, client: Driver) -> None:
    adapter = server.add("sql")
    inside = client.inside(client.adapter("sql", pin=True), lambda a: adapter.pinned)
    assert (inside, adapter.pinned) == (True, False)


def test_a_pin_of_others_stays(server: FakeServer, client: Driver) -> None:
    adapter = server.add("sql")
    adapter.pinned = True
    client.inside(client.adapter("sql", pin=True), lambda a: None)
    assert server.count("UpdateAdapter") == 0
    assert server.count("ActivateAdapter") == 1, "it may be pinned and not there yet"


def test_unpinned_also_after_an_error_which_is_the_one_raised(
    server: FakeServer, client: Driver
) -> None:
    adapter = server.add("sql")

    def fail(a: Any) -> None:
        # The first for the call inside, the second for the unpinning.
        for _ in range(2):
            server.refusals.append(
                Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL")
            )
        a.generate(Text("x"))

    with pytest.raises(QueueFull):
        client.inside(client.adapter("sql", pin=True), fail)
    assert adapter.pinned, "the server refused"
    assert server.count("UpdateAdapter") == 2


def pins(server: FakeServer) -> list[bool]:
    return [request.pinned for name, request in server.calls if name == "UpdateAdapter"]


def test_a_pin_whose_answer_was_lost_is_removed(server: FakeServer, client: Driver) -> None:
    """The server may have set it, and nobody will leave the `with`."""
    server.add("sql")
    server.lost = Refusal(grpc.StatusCode.UNAVAILABLE, "the socket closed")
    with pytest.raises(ServerUnreachable):
        client.inside(client.adapter("sql", pin=True), lambda a: None)
    assert pins(server) == [True, False]


def test_a_pin_that_was_interrupted_is_removed(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = server.add("sql")
    with Client(server.address) as client:
        pin = client.pin

        def ctrl_c(name: str) -> None:
            pin(name)
            raise KeyboardInterrupt

        monkeypatch.setattr(client, "pin", ctrl_c)
        with pytest.raises(KeyboardInterrupt), client.adapter("sql", pin=True):
            pass
    assert not adapter.pinned


async def test_a_pin_that_was_cancelled_is_removed(server: FakeServer) -> None:
    adapter = server.add("sql")
    server.hold = threading.Event()
    async with AsyncClient(server.address) as client:
        entry = asyncio.create_task(client.adapter("sql", pin=True).__aenter__())
        await asyncio.to_thread(server.begun.wait, 10)
        entry.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entry
    assert not adapter.pinned
    assert pins(server) == [True, False]


def test_a_failed_unpin_is_told_when_nothing_else_went_wrong(
    server: FakeServer, client: Driver
) -> None:
    server.add("sql")

    def break_it(a: Any) -> None:
        server.refusals.append(Refusal(grpc.StatusCode.UNAVAILABLE, "dead", "ENGINE_FAILED"))

    with pytest.raises(EngineFailed):
        client.inside(client.adapter("sql", pin=True), break_it)


def test_an_adapter_deleted_meanwhile_needs_no_unpin(
    server: FakeServer, client: Driver
) -> None:
    server.add("sql")
    client.inside(client.adapter("sql", pin=True), lambda a: server.adapters.clear())
