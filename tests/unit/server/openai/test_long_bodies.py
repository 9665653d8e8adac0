"""Long bodies are read and parsed in small pieces, so that other calls continue meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator

import pytest
from veneer_registry.errors import QueueFull
from veneer_server.openai.http.asgi import LONG_BODY, Bodies, read_json
from veneer_server.queues.connection_places import STALLED_S
from veneer_server.serving import spare_time

from tests.refused import refused


@pytest.fixture
def bodies() -> Iterator[Bodies]:
    made = Bodies()
    with contextlib.closing(made):
        yield made


def _pieces(count: int) -> list[bytes]:
    """Of a body whose first piece is long."""
    body = json.dumps({"prompt": "x" * (2 * LONG_BODY + count)}).encode()
    ends = [0, *range(LONG_BODY, LONG_BODY + count), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(ends)]


async def test_one_piece_is_read_in_each_turn_of_the_event_loop(bodies: Bodies) -> None:
    callers, count = 20, 10
    read: Counter[int] = Counter()
    turn = 0
    over = False

    def tick() -> None:
        nonlocal turn
        turn += 1
        if not over:
            asyncio.get_running_loop().call_soon(tick)

    async def one() -> object:
        left = iter(enumerate(_pieces(count), 1))

        async def receive() -> dict[str, object]:
            number, piece = next(left)
            if number > 1:  # up to there no body is long
                read[turn] += 1
            return {"type": "http.request", "body": piece, "more_body": number <= count}

        with bodies.share() as share:
            return await read_json(receive, 30.0, bodies, share)

    tick()
    answers = await asyncio.gather(*(one() for _ in range(callers)))
    over = True
    assert all(isinstance(answer, dict) for answer in answers)
    assert sum(read.values()) == callers * count
    assert max(read.values()) == 1


async def test_who_leaves_gives_up_its_turn(bodies: Bodies) -> None:
    tasks = [asyncio.create_task(bodies.turn()) for _ in range(5)]
    await asyncio.sleep(0)
    for task in tasks[:4]:
        task.cancel()
    await tasks[4]
    await bodies.turn()


class Clock:
    """In place of `time`: each look at the CPU time comes after 1.5 ms of work."""

    def __init__(self) -> None:
        self.worked = self.rested = 0.0
        self.stretch = self.longest = 0.0
        """Work since the last rest; the most that ever was."""

    def thread_time(self) -> float:
        self.worked += 0.0015
        self.stretch += 0.0015
        self.longest = max(self.longest, self.stretch)
        return self.worked

    def monotonic(self) -> float:
        return self.worked + self.rested

    def sleep(self, duration_s: float) -> None:
        self.rested += duration_s
        if duration_s > 0:
            self.stretch = 0.0


async def test_the_thread_rests_while_it_parses_and_between_bodies(
    bodies: Bodies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after one that is no JSON."""
    clock = Clock()
    monkeypatch.setattr(spare_time, "time", clock)
    text, broken = b'"' + b"x" * LONG_BODY + b'"', b"[" * LONG_BODY
    quotes = b'"' + rb"\"" * (1 << 20) + b'"'
    parses = (bodies.parse(body) for body in (text, broken, quotes, text))
    answers = await asyncio.gather(*parses, return_exceptions=True)
    assert [isinstance(answer, str) for answer in answers] == [True, False, True, True]
    assert clock.longest < 0.01
    assert clock.rested > clock.worked > 32 * 0.0015, "also within the long one"


async def test_a_body_that_stalls_loses_its_room_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And only then: one that arrives keeps it, whoever else wants it."""
    bodies, size = Bodies(long_limit=1 << 20), LONG_BODY + (1 << 20)
    now = 0.0
    monkeypatch.setattr("veneer_server.openai.http.asgi.time.monotonic", lambda: now)
    sent: asyncio.Queue[int] = asyncio.Queue()

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b" " * await sent.get(), "more_body": True}

    async def first() -> object:
        with bodies.share() as share:
            return await read_json(receive, 30.0, bodies, share)

    stalled = asyncio.create_task(first())
    sent.put_nowait(size)
    for _ in range(10):  # it is read
        await asyncio.sleep(0)
    now = STALLED_S / 2
    with bodies.share() as mine, refused(QueueFull):
        mine(size)
    now = 2 * STALLED_S
    with bodies.share() as mine:
        mine(size)
        with refused(QueueFull):
            await stalled
    with bodies.share() as other:
        other(size)
    bodies.close()
