"""The leak checks of an idle engine: how long they delay a message, and what they find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from veneer_server.engine.loop import CHECK_SECONDS
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.wire.messages import Activate, Ping, Pong

from tests.unit.server.engine.test_loop import Engine, request
from tests.unit.server.engine.world import adapter

ADAPTERS = 3_000


class Watched(dict[str, Any]):
    """A dict that counts the entries that are looked at one after the other.

    Attributes:
        meanwhile: called once, when ``at`` of them have been looked at.
    """

    looked_at = 0
    at = 0
    meanwhile: Callable[[], None] | None = None

    def _count(self, items: Any) -> Any:
        for item in items:
            self.looked_at += 1
            if self.meanwhile is not None and self.looked_at > self.at:
                call, self.meanwhile = self.meanwhile, None
                call()
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
    ledger = made.scheduler.residency.ledger
    watched = Watched(ledger.entries)
    ledger.entries = watched
    return made, watched


def answered(made: Engine, pings: int, between: Callable[[], None] = lambda: None) -> list[int]:
    """Send an idle engine so many pings, one at a time; their numbers as it answered them.

    Args:
        between: called before each ping.
    """
    made.turn()
    for number in range(pings):
        between()
        made.inbox.put(Ping(number))
        made.turn()
    return [m.number for m in made.sent if isinstance(m, Pong)]


def leak_bytes(made: Engine) -> None:
    """An adapter takes a byte more than was planned for it."""
    entry = made.scheduler.residency.ledger.entries["a7"]
    entry.sizes = {**entry.sizes, "host": entry.sizes["host"] + 1}


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
    leak_bytes(made)
    answered(made, 3)

    def pass_time() -> None:
        made.now += CHECK_SECONDS

    # Only its words tell one broken invariant from another, here and below.
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
        nobody = Sequence(99, request(99).request, 0.0, None)
        assert made.scheduler.blocks.grow(nobody, 1)
    else:
        residency.lease(adapter("a"))
    if leak == "hold":
        assert residency.try_hold("a")
    with pytest.raises(AssertionError):
        answered(made, 2)


def test_a_message_that_comes_during_the_full_check_is_answered_before_its_end() -> None:
    made, entries = filled()
    made.turn()
    made.now += CHECK_SECONDS
    before = entries.looked_at
    entries.at = before + ADAPTERS // 10
    entries.meanwhile = lambda: made.inbox.put(Ping(-1))
    for _ in range(2):
        made.turn()
        assert ADAPTERS / 10 < entries.looked_at - before < ADAPTERS / 2
    assert Pong(-1, 0) in made.sent


def test_a_check_that_was_interrupted_is_made_up_for() -> None:
    made, entries = filled()
    leak_bytes(made)
    entries.meanwhile = lambda: made.inbox.put(Ping(-1))

    def pass_time() -> None:
        made.now += CHECK_SECONDS / 3

    with pytest.raises(AssertionError, match="bytes in host differ"):
        answered(made, 5, between=pass_time)
    assert ADAPTERS < entries.looked_at < 2 * ADAPTERS
