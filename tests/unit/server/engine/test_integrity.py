"""The checks for leaks of an idle engine: what they cost a message, and what they find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from veneer_server.engine.loop import CHECK_SECONDS
from veneer_server.wire.messages import Activate, Ping, Pong, Stop

from tests.unit.server.engine.test_loop import Engine, request
from tests.unit.server.engine.world import adapter

ADAPTERS = 3_000


class Watched(dict[str, Any]):
    """A dict that counts the entries that are looked at one after the other."""

    looked_at = 0

    def _count(self, items: Any) -> Any:
        for item in items:
            self.looked_at += 1
            yield item

    def values(self) -> Any:
        return self._count(super().values())

    def items(self) -> Any:
        return self._count(super().items())


def filled(adapters: int = ADAPTERS) -> tuple[Engine, Watched]:
    """An idle engine (FAKE runner and memory) that holds so many adapters."""
    made = Engine()
    made.scheduler.residency.set_budgets(host=adapters, device=adapters)
    for number in range(adapters):
        made.inbox.put(Activate(number, adapter(f"a{number}", 1), "host"))
    while len(made.memory.held) < adapters:
        made.turn()
    made.sent.clear()
    ledger = made.scheduler.residency._ledger
    watched = Watched(ledger.entries)
    ledger.entries = made.scheduler.residency._entries = watched
    return made, watched


class Pings:
    """FAKE inbox of a loop: where that would sleep, the next ping comes, at last `Stop`.

    Args:
        between: called before each ping.
        meanwhile: asked whenever the loop looks whether something has come; a ping has,
            where it says so.
    """

    def __init__(
        self,
        made: Engine,
        pings: int,
        between: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], bool] = lambda: False,
    ) -> None:
        self._inbox = made.inbox
        self._left = iter(range(pings))
        self._between = between
        self._meanwhile = meanwhile

    def get(self, *, block: bool) -> Any:
        if block and self._inbox.empty():
            self._between()
            number = next(self._left, None)
            return Stop() if number is None else Ping(number)
        return self._inbox.get(block=False)

    def put(self, message: Any) -> None:
        self._inbox.put(message)

    def empty(self) -> bool:
        if self._meanwhile():
            self._inbox.put(Ping(-1))
        return self._inbox.empty()


def answered(made: Engine, pings: int, **options: Any) -> list[int]:
    """Run the loop until it has answered so many pings, one at a time; their numbers."""
    made.loop._inbox = Pings(made, pings, **options)  # type: ignore[assignment]
    made.loop.run()
    return [m.number for m in made.sent if isinstance(m, Pong)]


def test_a_message_to_an_idle_engine_does_not_cost_a_look_at_every_adapter() -> None:
    made, entries = filled()
    assert answered(made, 200) == list(range(200))
    assert entries.looked_at <= ADAPTERS + 200


def test_all_of_it_is_checked_once_a_minute_of_idleness() -> None:
    made, entries = filled()

    def pass_time() -> None:
        made.now += CHECK_SECONDS / 10

    answered(made, 100, between=pass_time)
    assert 9 * ADAPTERS <= entries.looked_at <= 11 * ADAPTERS


def test_what_leaked_ends_the_engine_at_the_next_full_check() -> None:
    made, _ = filled()
    made.scheduler.residency._ledger._bytes["host"] += 1
    answered(made, 3)

    def pass_time() -> None:
        made.now += CHECK_SECONDS

    with pytest.raises(AssertionError, match="bytes in host differ"):
        answered(made, 3, between=pass_time)


@pytest.mark.parametrize("leak", ["lease", "hold", "block"])
def test_what_an_ended_request_left_behind_is_found_at_once(leak: str) -> None:
    made = Engine()
    made.inbox.put(request(1, adapter("a")))
    while not made.memory.held or made.scheduler.has_work():
        made.turn()
    residency = made.scheduler.residency
    if leak == "block":
        made.scheduler.blocks._free.pop()
    else:
        residency.lease(adapter("a"))
    if leak == "hold":
        assert residency.try_hold("a")
    with pytest.raises(AssertionError):
        answered(made, 2)


def once(holds: Callable[[], bool]) -> Callable[[], bool]:
    """True the first time that it holds."""
    told: list[bool] = []

    def found() -> bool:
        if told or not holds():
            return False
        told.append(True)
        return True

    return found


def test_a_message_that_comes_during_the_full_check_is_answered_before_its_end() -> None:
    made, entries = filled()
    made.now += CHECK_SECONDS
    looked_at: list[int] = []

    class Sent(list[Any]):
        def extend(self, messages: Any) -> None:
            looked_at.extend(entries.looked_at for m in messages if m == Pong(-1, 0))

    made.loop._send = Sent().extend
    answered(made, 1, meanwhile=once(lambda: entries.looked_at > ADAPTERS / 10))
    (before,) = looked_at
    assert ADAPTERS / 10 < before < ADAPTERS / 2


def test_a_check_that_was_interrupted_is_made_up_for() -> None:
    made, entries = filled()
    made.scheduler.residency._ledger._bytes["host"] += 1
    interrupt = once(lambda: entries.looked_at > 0)

    def pass_time() -> None:
        made.now += CHECK_SECONDS / 3

    with pytest.raises(AssertionError, match="bytes in host differ"):
        answered(made, 5, between=pass_time, meanwhile=interrupt)
    assert ADAPTERS < entries.looked_at < 2 * ADAPTERS
