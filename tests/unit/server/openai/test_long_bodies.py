"""Long bodies are read and parsed a little at a time: other calls go on meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator

import pytest
from veneer_server.openai import wire
from veneer_server.openai.wire import LONG_BODY, Bodies, read_json

SCOPE = {"headers": [(b"content-type", b"application/json")]}


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

        return await read_json(SCOPE, receive, 30.0, bodies, lambda _: None)

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


async def test_the_thread_rests_between_long_bodies_but_never_for_long(
    bodies: Bodies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between those that wait together, and after one that is no JSON."""
    rests: list[float] = []
    monkeypatch.setattr(wire.time, "sleep", rests.append)
    text, broken = b'"' + b"x" * LONG_BODY + b'"', b"[" * LONG_BODY
    slow = b'"' + rb"\"" * (1 << 20) + b'"'
    parses = (bodies.parse(body) for body in (text, broken, slow, text))
    answers = await asyncio.gather(*parses, return_exceptions=True)
    assert [isinstance(answer, str) for answer in answers] == [True, False, True, True]
    first, *later = rests
    assert first == 0, "nothing was parsed before"
    assert all(0 < rest <= wire._LONGEST_REST_S for rest in later)
    assert len(later) == 3
