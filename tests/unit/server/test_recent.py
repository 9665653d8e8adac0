"""The state kept about callers is bounded."""

from __future__ import annotations

from veneer_server.queues.recent import Recent
from veneer_server.queues.refusal_pace import RefusalPace
from veneer_server.rpc.transport.connections import Standings


def test_the_key_assigned_longest_ago_is_forgotten() -> None:
    recent: Recent[str, int] = Recent(2)
    recent["a"] = 1
    recent["b"] = 2
    recent["a"] = 3
    recent["c"] = 4
    assert dict(recent) == {"a": 3, "c": 4}


def test_a_host_among_thousands_is_forgotten() -> None:
    """New hosts cost an attacker nothing where it has an IPv6 network."""
    pace = RefusalPace(1.0, clock=lambda: 0.0)
    for _ in range(40):
        last = pace.charge("first:1")
    assert last > 0
    for number in range(4096):
        pace.charge(f"host{number}:1")
    assert pace.charge("first:1") == 0


def test_a_connection_among_thousands_is_forgotten() -> None:
    standings = Standings(lambda: 0.0)
    standings.was_prompt("first")
    for number in range(4095):
        standings.was_prompt(str(number))
    assert standings.prompt("first")
    standings.was_prompt("first")
    for number in range(4096):
        standings.was_late(str(-number), displaced=False)
    assert not standings.prompt("first")
