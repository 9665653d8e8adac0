"""Requests that never arrive completely: what they may hold, and that others are read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import psutil
import pytest
from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import Aborted, QueueFull
from veneer_server.rpc.transport import connections, receiving
from veneer_server.rpc.transport.channel import SPARE_STREAMS
from veneer_server.rpc.transport.receiving import MAX_MESSAGE, Receiving

from tests.attacks.http2 import Connection, grpc_message
from tests.unit.server.rpc.front_harness import Front, failure, prompt, running, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PLACES = 3
GENERATE = "/veneer.v1.InferenceService/Generate"
HEALTH = "/grpc.health.v1.Health/Check"


async def never() -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


async def whole() -> bytes:
    return b"whole"


def arriving(event: asyncio.Event) -> Callable[[], Awaitable[bytes]]:
    """A message that is whole once the event is set."""

    async def read() -> bytes:
        await event.wait()
        return b"there"

    return read


async def held(reading: Receiving, *peers: str) -> list[asyncio.Task[bytes]]:
    """Messages that never arrive, each being read or waiting to be."""
    tasks = [asyncio.create_task(reading.message(never, peer)) for peer in peers]
    await asyncio.sleep(0)
    return tasks


async def gone(*tasks: asyncio.Task[bytes]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's place is safe for long."""
    monkeypatch.setattr(receiving, "PATIENCE_S", 0.02)
    monkeypatch.setattr(receiving, "GREEDY_PATIENCE_S", 0.01)


async def test_a_message_that_does_not_arrive_is_given_up() -> None:
    reading = Receiving(limit_s=0.01)
    with pytest.raises(Aborted):
        await reading.message(never, "a")
    assert reading.held == 0
    assert await reading.message(whole, "a") == b"whole"


async def test_a_slow_message_loses_its_place_only_where_others_wait(hurried: None) -> None:
    reading = Receiving(places=1)
    (slow,) = await held(reading, "slow")
    await asyncio.sleep(0.05)  # far longer than its place is safe
    assert not slow.done()
    assert await reading.message(whole, "quick") == b"whole"
    with pytest.raises(QueueFull) as caught:
        await slow
    assert caught.value.retry_after_s
    assert (reading.held, reading.waiting) == (0, 0)


async def test_the_connection_with_most_places_loses_one_first(hurried: None) -> None:
    reading = Receiving(places=3)
    honest, *greedy = await held(reading, "honest", "greedy", "greedy")
    assert await reading.message(whole, "other") == b"whole"
    assert not honest.done()
    assert sum(task.done() for task in greedy) == 1
    await gone(honest, *greedy)


async def test_who_asks_for_few_need_not_wait_for_the_turn_of_all_others() -> None:
    """Six connections, each with many that wait, kept a seventh out for half a minute."""
    reading = Receiving(places=1)
    crowds = await held(reading, "first", *[f"crowd-{n}" for n in range(20) for _ in range(10)])
    honest = asyncio.create_task(reading.message(whole, "honest"))
    await asyncio.sleep(0)
    await gone(crowds[0])
    for task in crowds[1::10]:  # at most one of them was read before it
        if not honest.done():
            await gone(task)
    assert honest.done()
    assert sum(task.done() for task in crowds[1:]) <= 1
    await gone(*crowds)


async def test_a_slow_request_alone_on_its_connection_is_given_more_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receiving, "GREEDY_PATIENCE_S", 0.01)
    monkeypatch.setattr(receiving, "PATIENCE_S", 60)
    reading = Receiving(places=2)
    alone, *crowd = await held(reading, "alone", *["crowd"] * 5)
    assert await reading.message(whole, "other") == b"whole"
    assert not alone.done()
    assert any(task.done() for task in crowd)
    await gone(alone, *crowd)


async def test_slow_messages_of_many_connections_keep_nobody_else_waiting() -> None:
    """However patient the server is with each: half of the places are for what is there."""
    reading = Receiving(places=4, slow=2)
    crowd = await held(reading, *[f"slow-{n}" for n in range(12)])
    assert await reading.message(whole, "other") == b"whole"
    assert [task.done() for task in crowd[:4]] == [False, False, True, True]
    await gone(*crowd)


async def made_late(reading: Receiving, peer: str) -> None:
    """A message of the connection loses its place to another one."""
    slow = await held(reading, *[peer] * PLACES)
    assert await reading.message(whole, "another") == b"whole"
    assert sum(task.done() for task in slow) == 1
    await gone(*slow)


async def test_a_late_connection_is_not_read_for_a_while() -> None:
    reading = Receiving(places=PLACES, slow=PLACES - 1)
    await made_late(reading, "late")
    again = asyncio.create_task(reading.message(whole, "late"))
    await asyncio.sleep(0)
    assert (reading.held, reading.waiting) == (0, 1)
    assert await reading.message(whole, "other") == b"whole"
    assert not again.done()
    assert await again == b"whole"


async def test_a_late_connection_loses_its_places_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "PAUSE_S", 0)
    reading = Receiving(places=PLACES, slow=PLACES - 1)
    await made_late(reading, "late")
    late, *honest = await held(reading, "late", *["honest"] * (PLACES - 1))
    assert await reading.message(whole, "other") == b"whole"
    assert late.done()
    assert not any(task.done() for task in honest)
    await gone(late, *honest)


async def order_read(reading: Receiving, *peers: str) -> list[str]:
    """Who is read when, of messages that wait at the same time for one place."""
    order: list[str] = []

    async def noted(peer: str) -> None:
        async def read() -> bytes:
            order.append(peer)
            await asyncio.sleep(0)
            return b""

        await reading.message(read, peer)

    busy = await held(reading, *["busy"] * PLACES)
    tasks = [asyncio.create_task(noted(peer)) for peer in peers]
    await asyncio.sleep(0)
    await gone(busy[0])
    await asyncio.gather(*tasks)
    await gone(*busy)
    return order


async def test_a_late_connection_is_read_after_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PAUSE_S", 0)
    reading = Receiving(places=PLACES, slow=PLACES - 1)
    await made_late(reading, "late")
    order = await order_read(reading, "late", "a", "b", "c")
    assert order[-1] == "late"


async def test_of_many_new_connections_one_that_is_known_does_not_wait_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A caller with a new connection for each message that it does not send."""
    monkeypatch.setattr(receiving, "BRIEF_S", 60.0)
    reading = Receiving(places=PLACES)
    await reading.message(whole, "known")
    order = await order_read(reading, *[f"new-{n}" for n in range(20)], "known")
    assert "known" in order[:2]


async def test_a_message_that_a_late_loop_has_not_seen_yet_keeps_its_place() -> None:
    reading = Receiving(places=1, slow=0)
    there = asyncio.Event()
    honest = asyncio.create_task(reading.message(arriving(there), "honest"))
    await asyncio.sleep(0)
    other = asyncio.create_task(reading.message(whole, "other"))
    await asyncio.sleep(0)
    time.sleep(0.05)  # noqa: ASYNC251 - the loop is late
    asyncio.get_running_loop().call_soon(
        asyncio.get_running_loop().call_soon, there.set
    )  # after the timers that are due
    assert (await honest, await other) == (b"there", b"whole")


async def test_a_message_that_came_slowly_while_nobody_waited_does_not_make_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading = Receiving(places=PLACES)
    monkeypatch.setattr(receiving, "BRIEF_S", 0.0)
    await reading.message(whole, "slow")
    monkeypatch.setattr(receiving, "BRIEF_S", 60.0)
    await reading.message(whole, "known")
    assert (await order_read(reading, "slow", "new", "known"))[0] == "known"


async def test_slow_messages_of_one_connection_are_left_time_by_its_others() -> None:
    """Many far callers behind one proxy: they wait for each other, as before."""
    reading = Receiving(places=2, slow=1)
    there = asyncio.Event()
    far = [asyncio.create_task(reading.message(arriving(there), "proxy")) for _ in range(6)]
    await asyncio.sleep(0.1)  # far longer than a message may take that others wait for
    there.set()
    assert await asyncio.gather(*far) == [b"there"] * 6


async def test_places_go_round_by_connection() -> None:
    reading = Receiving(places=1)
    (first,) = await held(reading, "first")
    order: list[str] = []

    async def noted(peer: str) -> None:
        async def read() -> bytes:
            order.append(peer)
            return b""

        await reading.message(read, peer)

    tasks = [asyncio.create_task(noted(peer)) for peer in ("many",) * 5 + ("one",)]
    await asyncio.sleep(0)
    await gone(first)
    await asyncio.gather(*tasks)
    assert order[:2] == ["many", "one"]


async def test_where_too_many_wait_the_longest_queue_is_cut() -> None:
    reading = Receiving(places=1, waiting=3)
    crowd = await held(reading, *["crowd"] * 4)
    with pytest.raises(QueueFull):
        await reading.message(whole, "crowd")
    (other,) = await held(reading, "other")
    with pytest.raises(QueueFull):
        await crowd[3]
    assert not other.done()
    assert reading.waiting == 3
    await gone(*crowd[:3], other)
    assert (reading.held, reading.waiting) == (0, 0)


async def test_calls_that_came_together_do_not_time_out_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refusing 355 at once took 140 ms, in which no stream moved."""
    draws = iter((0.0, 1e6, 0.0, 1e6))
    monkeypatch.setattr(receiving.random, "random", lambda: next(draws))
    reading = Receiving(places=1)
    busy = await held(reading, "busy")
    reading.limit_s = 0.01
    early, late, also_early, also_late = await held(reading, "a", "b", "c", "d")
    await asyncio.wait({early, also_early})
    assert not late.done()
    assert not also_late.done()
    await gone(*busy, late, also_late, early, also_early)


async def test_a_caller_that_leaves_gives_its_place_back() -> None:
    reading = Receiving(places=1)
    tasks = await held(reading, "a", "b", "c")
    tasks[1].cancel()
    tasks[0].cancel()
    await gone(*tasks)
    assert (reading.held, reading.waiting) == (0, 0)
    assert await reading.message(whole, "a") == b"whole"


async def attack(address: str, connections: int, streams: int) -> tuple[list[Connection], int]:
    """Messages of the largest size but for their last byte; also how much was taken."""
    body = grpc_message(MAX_MESSAGE - 16)
    opened = [await Connection.open(address) for _ in range(connections)]
    sent = await asyncio.gather(
        *(
            connection.send(connection.call(GENERATE), body, patience_s=0.5)
            for connection in opened
            for _ in range(streams)
        )
    )
    return opened, sum(sent)


@pytest.mark.push
async def test_half_sent_requests_hold_little_and_others_are_answered(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """Six connections with sixty half-sent requests each were 1.4 GB, for ever."""
    async with running(base_folder, front_cache, tmp_path) as front:
        process = psutil.Process()
        before = process.memory_info().rss
        opened, sent = await attack(front.addresses["grpc"], 6, 60)
        assert sent < 360 * MAX_MESSAGE // 2, "most are never read"
        assert process.memory_info().rss - before < 160 << 20  # the attacker's, too
        answers = await asyncio.gather(*(front.inference.Generate(prompt()) for _ in range(8)))
        assert all(answer.token_ids for answer in answers)
        for connection in opened:
            connection.close()


@pytest.mark.push
async def test_a_half_sent_request_is_ended_in_time(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path, reader_limit="0.3") as front:
        async with await Connection.open(front.addresses["grpc"]) as connection:
            for method in (GENERATE, HEALTH):
                stream = connection.call(method)
                await connection.send(stream, grpc_message(1000), patience_s=1)
                await connection.until_ended(stream)
        assert (await front.inference.Generate(prompt())).token_ids


async def test_a_dribble_is_ended_all_the_same(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with (
        running(base_folder, front_cache, tmp_path, reader_limit="0.3") as front,
        await Connection.open(front.addresses["grpc"]) as connection,
    ):
        stream = connection.call(GENERATE)
        body = grpc_message(1000)
        for at in range(len(body)):
            if stream in connection.ended:
                break
            await connection.send(stream, body[at : at + 1], patience_s=1)
            await asyncio.sleep(0.01)
        assert stream in connection.ended


async def test_streams_of_a_connection_are_bounded(front: Front) -> None:
    async with await Connection.open(front.addresses["grpc"]) as connection:
        assert connection.max_streams == front.engine.places.capacity + SPARE_STREAMS


async def test_a_call_without_a_request_is_the_callers_error(front: Front) -> None:
    call = front.channel.stream_unary(GENERATE)(iter(()))
    assert (await failure(call)).reason == "INVALID_FIELD"


async def test_connections_beyond_the_bound_are_closed_and_room_is_given_back(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path, max_connections="8") as front:
        opened = [await Connection.open(front.addresses["grpc"]) for _ in range(12)]
        await until(lambda: sum(connection.lost.is_set() for connection in opened) >= 4)

        async def answered() -> bool:
            """Its own connection was idle too, and may be closed as the call is sent."""
            try:
                return bool((await front.inference.Generate(prompt())).token_ids)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                return False

        assert await answered() or await answered()
        for connection in opened:
            connection.close()

        async def again() -> None:
            while True:
                async with await Connection.open(front.addresses["grpc"]) as connection:
                    if not connection.lost.is_set():
                        return
                await asyncio.sleep(0.01)

        await again()


async def test_watchers_beyond_the_bound_are_refused_with_the_flag(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path, max_watchers="2") as front:
        request = adapters_pb2.WatchAdaptersRequest()
        watches = [front.adapters.WatchAdapters(request) for _ in range(2)]
        for watch in watches:
            await watch.read()
        refused = await failure(front.adapters.WatchAdapters(request))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--max-watchers" in refused.message
        assert "RetryInfo" in refused.details
        watches[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watches[0].read()

        async def admitted() -> bool:
            watch = front.adapters.WatchAdapters(request)
            try:
                return await watch.read() is not grpc.aio.EOF
            except grpc.aio.AioRpcError:
                return False
            finally:
                watch.cancel()

        while not await admitted():  # noqa: ASYNC110 - the server has yet to see it leave
            await asyncio.sleep(0.01)
        watches[1].cancel()
