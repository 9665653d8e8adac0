"""The router behind Serve's order of events. No Ray is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from veneer_ray.routing.assignments import Assignments, report_of
from veneer_server.routing.records import Wanted


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def stats(at: float, requests: int = 0, resident: Iterable[str] = ()) -> Mapping[str, Any]:
    return {"at": at, "requests": requests, "resident": list(resident)}


def assignments(*replicas: str, clock: Clock | None = None) -> Assignments:
    made = Assignments(clock or Clock(), clock or Clock())
    made.update({each: {} for each in replicas})
    return made


def here() -> bool:
    """Its caller waits."""
    return False


def send(made: Assignments, request: str, digest: str) -> str:
    chosen = made.choose(request, Wanted(digest), here)
    made.sent(request, chosen)
    return chosen


def test_an_adapter_s_requests_go_to_one_replica_while_that_has_no_more_to_do() -> None:
    made = assignments("a", "b", "c")
    chosen = []
    for number in range(6):
        chosen.append(send(made, str(number), "digest"))
        made.ended(str(number), chosen[-1])
    assert len(set(chosen)) == 1
    assert made.under_way == 0


def test_requests_that_have_ended_make_room_and_others_do_not() -> None:
    made = assignments("a", "b")
    placed = {str(number): send(made, str(number), "digest") for number in range(40)}
    counts = Counter(placed.values())
    assert max(counts.values()) <= 0.5 * 1.25 * 40 + 1, "more than the bound at one replica"
    for request in placed:
        made.ended(request, "another")  # an attempt there, of no concern
    assert made.under_way == 40
    for request, replica in placed.items():
        made.ended(request, replica)
    assert made.under_way == 0


def test_a_request_that_is_sent_again_counts_once() -> None:
    made = assignments("a", "b")
    first = made.choose("1", Wanted("digest"), here)
    made.ended("1", first)  # that replica refused it
    second = made.choose("1", Wanted("digest"), here)
    made.sent("1", second)
    assert made.under_way == 1
    made.ended("1", second)
    assert made.under_way == 0


def test_a_caller_that_leaves_while_it_waits_is_forgotten() -> None:
    left = False
    made = assignments("a")
    made.choose("1", Wanted("digest"), lambda: left)
    left = True
    send(made, "2", "digest")
    assert made.under_way == 1, "the one that has left still counts"


def test_a_request_that_another_replica_took_is_left_to_its_report() -> None:
    made = assignments("a", "b")
    chosen = made.choose("1", Wanted("digest"), here)
    made.sent("1", "b" if chosen == "a" else "a")
    assert made.under_way == 0


def test_a_request_goes_where_a_replica_reports_its_adapter() -> None:
    clock = Clock()
    made = assignments("a", "b", clock=clock)
    for digest in map(str, range(20)):
        for holder, other in (("a", "b"), ("b", "a")):
            clock.now += 1
            made.update({holder: stats(clock.now, resident=[digest]), other: stats(clock.now)})
            request = f"{digest}-{holder}"
            assert send(made, request, digest) == holder
            made.ended(request, holder)


def test_replicas_that_are_gone_get_nothing_and_may_come_back() -> None:
    made = assignments("a", "b")
    made.update({"b": {}})
    assert {send(made, str(number), str(number)) for number in range(10)} == {"b"}
    made.update({"a": {}, "b": {}})
    made.gone("b")
    assert {send(made, str(number), str(number)) for number in range(10, 20)} == {"a"}


def test_an_old_report_told_again_changes_nothing() -> None:
    clock = Clock()
    made = assignments("a", "b", clock=clock)
    old = {"a": stats(clock.now, requests=50), "b": stats(clock.now)}
    made.update(old)
    clock.now += 10
    made.update({"a": stats(clock.now), "b": stats(clock.now)})
    made.update(old)
    chosen = {send(made, str(number), str(number)) for number in range(16)}
    assert chosen == {"a", "b"}, "the 50 requests of an old report still count"


def test_a_report_from_a_clock_that_is_ahead_is_as_of_now() -> None:
    assert report_of(stats(at=2000.0, requests=3), 1000.0).age_s == 0.0
    assert report_of(stats(at=990.0), 1000.0).age_s == 10.0
    assert report_of({}, 1000.0).requests == 0, "a replica that has not reported yet"
