"""Places in the queue: taken together, released, and never another tenant's for long."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from veneer_registry.errors import DeadlineTooShort, InvalidField, QueueFull, VeneerError
from veneer_server.engine_client.places import Place, Places, Seat
from veneer_server.queues.fairness import Fairness
from veneer_server.wire.messages import SamplingParams, SequenceRequest, StepDone

from tests.refused import refused

HOG, LIGHT = Fairness("hog"), Fairness("light")


def places() -> Places:
    """Three may run and two may wait."""
    return Places(3, 2)


def held(stack: ExitStack, among: Places, whose: Fairness, count: int = 1) -> Place:
    return stack.enter_context(among.hold(count, whose, at_once=count))


def started(among: Places, place: Place) -> Seat:
    """The request's sample has had an output."""
    seat = seated(among, place)
    among.started(seat)
    return seat


def seated(among: Places, place: Place) -> Seat:
    seat = among.take(place)
    assert seat is not None
    return seat


class Stream:
    """What ends a stream."""

    def __init__(self, among: Places, place: Place) -> None:
        self.error: VeneerError | None = None
        self.seat = seated(among, place)
        self.seat.stream = self

    def fail(self, error: VeneerError) -> None:
        self.error = error


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_places_are_taken_together_and_given_back() -> None:
    among = places()
    with among.hold(3, at_once=3):
        with pytest.raises(QueueFull) as caught, among.hold(3, at_once=3):
            pass
        assert caught.value.retry_after_s
        with among.hold(2, at_once=2), pytest.raises(QueueFull), among.hold(1):
            pass
    with among.hold(5, at_once=5):
        pass


def test_places_come_back_whatever_ended_the_request() -> None:
    among = places()
    with pytest.raises(RuntimeError), among.hold(5, at_once=5):
        raise RuntimeError
    with among.hold(5, at_once=5):
        pass


def test_more_samples_than_there_are_places_will_never_fit() -> None:
    with refused(InvalidField, field="output.n", limit=5), places().hold(6):
        pass


# ------------------------------------------------------------------- a queue by tenant


def test_a_tenant_alone_may_have_all_places(stack: ExitStack) -> None:
    among = Places(3, 7)
    for _ in range(10):
        held(stack, among, HOG)
    with refused(QueueFull, cause="queue_full"):
        held(stack, among, HOG)


def test_a_full_queue_of_one_tenant_does_not_keep_another_out(stack: ExitStack) -> None:
    """The newest one that waits goes: it has waited least, and nothing was computed for it."""
    refusals: Counter[tuple[str, str]] = Counter()
    among = Places(3, 7, on_refused=lambda *why: refusals.update([why]))
    hogs = [held(stack, among, HOG) for _ in range(10)]
    streams = [Stream(among, place) for place in hogs]
    among.started(streams[-1].seat)
    for _ in range(5):
        held(stack, among, LIGHT)
    displaced = [place.refused for place in hogs]
    assert displaced == [False] * 4 + [True] * 5 + [False]
    error = streams[8].error
    assert isinstance(error, QueueFull)
    assert (error.metadata["cause"], error.retry_after_s is not None) == ("displaced", True)
    with pytest.raises(QueueFull):
        hogs[8].check()  # while its prompt is being prepared
    with refused(QueueFull, cause="queue_full"):
        held(stack, among, LIGHT)  # each has half of them now
    assert refusals == {("hog", "displaced"): 5, ("light", "queue_full"): 1}
    assert among.taken == 10


def test_what_runs_keeps_its_place(stack: ExitStack) -> None:
    among = Places(3, 0)
    for _ in range(3):
        started(among, held(stack, among, HOG))
    with refused(QueueFull, cause="queue_full"):
        held(stack, among, LIGHT)


def test_a_refusal_takes_nobodys_place(stack: ExitStack) -> None:
    """Two more places do not do for three samples."""
    among = Places(2, 3)
    hogs = [held(stack, among, HOG) for _ in range(5)]
    for place in hogs[:3]:
        started(among, place)
    with refused(QueueFull, cause="queue_full"):
        held(stack, among, LIGHT, 3)
    assert not any(place.refused for place in hogs)
    held(stack, among, LIGHT, 2)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 3), st.integers(0, 9)),
        max_size=60,
    ),
)
def test_a_tenant_below_its_share_always_gets_in(
    arrivals: list[tuple[str, int, int]],
) -> None:
    """A share is by weight, among those that have places. Nothing is lost or counted twice."""
    weights = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}
    among = Places(0, 12)
    with ExitStack() as stack:
        live: dict[Place, tuple[ExitStack, str]] = {}
        for name, count, other in arrivals:
            if other == 9 and live:
                place = next(iter(live))
                live.pop(place)[0].close()
                continue
            mine = sum(p.count for p, (_, whose) in live.items() if whose == name)
            names = {whose for _, whose in live.values()} | {name}
            share = 12 * weights[name] / sum(weights[n] for n in names)
            own = stack.enter_context(ExitStack())
            try:
                place = own.enter_context(
                    among.hold(count, Fairness(name, "", weights[name]), at_once=count)
                )
            except QueueFull:
                assert mine + count > share, f"{name} has {mine} of {share:.1f}"
            else:
                live[place] = own, name
            live = {p: entry for p, entry in live.items() if not p.refused}
            assert sum(p.count for p in live) == among.taken <= 12
    assert among.taken == 0
    assert among.waiting() == {}


def test_those_that_a_gateway_calls_for_share_its_part(stack: ExitStack) -> None:
    """Else whoever names many would have all places."""
    among = Places(0, 100)
    for number in range(10_000):
        try:
            held(stack, among, Fairness("gateway", f"user {number}"))
        except QueueFull:
            assert number >= 100
    for _ in range(50):
        held(stack, among, LIGHT)
    assert among.waiting() == {"gateway": 50, "light": 50}


# -------------------------------------------------------------------------- estimates


def busy(among: Places, seconds: float = 1.0) -> None:
    """Steps of 10 decode rows in a tenth of ``seconds``: a work of 200 per ``seconds``. And
    sequences have 40 tokens when they end."""
    among.estimate.ended(40)
    for number in range(20):
        among.estimate.step(StepDone(number, seconds / 10, 0, 10, 0))


def request(prompt: int = 20, new: int = 40) -> SequenceRequest:
    """A work of 100."""
    return SequenceRequest([1] * prompt, new, SamplingParams())


def test_nobody_waits_while_places_are_free(stack: ExitStack) -> None:
    among = Places(3, 7)
    busy(among)
    for _ in range(2):
        among.resolved(held(stack, among, HOG), request())
    assert among.expected_wait(HOG) == 0
    held(stack, among, HOG)
    assert among.expected_wait(HOG) > 0


def test_a_wait_is_the_work_ahead_by_the_recent_pace(stack: ExitStack) -> None:
    """A tenant's own queue, and as much of the others' as they get meanwhile."""
    among = Places(1, 50)
    started(among, held(stack, among, HOG))
    busy(among)
    for _ in range(20):
        among.resolved(held(stack, among, HOG), request())
    # 20 of its own, and a place that is still to come: 100 each, at 200 a second.
    assert among.expected_wait(HOG) == pytest.approx(10.5)
    # One of the other's, and a place.
    assert among.expected_wait(LIGHT) == pytest.approx(1.0)
    among.resolved(held(stack, among, LIGHT), request())
    assert among.expected_wait(LIGHT) == pytest.approx((100 + 200 + 100) / 200)


async def test_who_cannot_be_in_time_is_refused_and_told_when_to_come_back() -> None:
    among = Places(1, 50, max_wait_s=5.2)
    with ExitStack() as stack:
        started(among, held(stack, among, HOG))
        busy(among)
        for _ in range(9):
            among.resolved(held(stack, among, HOG), request())
        with pytest.raises(DeadlineTooShort) as late, among.hold(1, HOG, within_s=2):
            pass
        assert late.value.retry_after_s == pytest.approx(3.0)
        with among.hold(1, LIGHT, within_s=2):
            pass
        among.resolved(held(stack, among, HOG), request())
        with pytest.raises(QueueFull) as long, among.hold(1, HOG):
            pass
        assert long.value.metadata["cause"] == "queue_wait"
        assert long.value.retry_after_s == pytest.approx(0.3)


async def test_who_has_waited_for_the_limit_is_refused() -> None:
    """By the loop's monotonic clock: all at once, and whoever has started is not."""
    refusals: Counter[tuple[str, str]] = Counter()
    among = Places(1, 50, max_wait_s=0.02, on_refused=lambda *why: refusals.update([why]))
    ended = asyncio.Event()

    class Ends:
        def fail(self, error: VeneerError) -> None:
            ended.set()

    with ExitStack() as stack:
        running = held(stack, among, HOG)
        started(among, running)
        waiting = [held(stack, among, HOG) for _ in range(20)]
        seated(among, waiting[-1]).stream = Ends()
        await ended.wait()
        assert all(place.refused for place in waiting)
        assert not running.refused
        assert among.taken == 1
    assert refusals == {("hog", "queue_wait"): 20}


def test_an_unknown_pace_refuses_nobody(stack: ExitStack) -> None:
    """At the start, and after the engine was restarted."""
    among = Places(1, 50)
    started(among, held(stack, among, HOG))
    among.resolved(held(stack, among, HOG), request())
    with among.hold(1, HOG, within_s=0.001):
        pass
    busy(among)
    with pytest.raises(DeadlineTooShort), among.hold(1, HOG, within_s=0.001):
        pass
    among.estimate.restart()
    with among.hold(1, HOG, within_s=0.001):
        pass
