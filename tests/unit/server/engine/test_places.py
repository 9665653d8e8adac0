"""Places in the queue: taken together, released, and never another tenant's for long."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from veneer_registry.errors import (
    DeadlineTooShort,
    EngineFailed,
    InvalidField,
    QueueFull,
    VeneerError,
)
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


@settings(deadline=None)  # the machine may be busy
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


# ----------------------------------------------------------------------- further samples


class Ended(asyncio.Event):
    """A stream that is ended."""

    def fail(self, error: VeneerError) -> None:
        self.set()


class Call:
    """A request whose samples a test starts and ends, as the engine would."""

    def __init__(self, among: Places, whose: Fairness, samples: int) -> None:
        self.among = among
        self.stack = ExitStack()
        self.place = self.stack.enter_context(among.hold(samples, whose))
        self.seats: list[Seat] = []
        self.left = samples
        self.reads = asyncio.Event()
        self.reads.set()
        self.tasks = [asyncio.create_task(self._sample()) for _ in range(samples)]

    async def _sample(self) -> None:
        seat = self.among.take(self.place)
        while True:
            while seat is None or seat.returned:
                seat = await self.among.turn(self.place, after=seat)
            self.seats.append(seat)
            stream = Ended()
            seat.stream = stream
            await stream.wait()
            self.seats.remove(seat)
            if not seat.returned:
                await self.reads.wait()
                self.among.leave(seat)
                return

    def end(self, seat: Seat) -> None:
        """A sample has had its last token."""
        assert seat.stream is not None
        self.left -= 1
        seat.stream.fail(QueueFull("it ended"))
        self.among.ended(seat)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.stack.close()


async def _settled() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


async def _history(draw: random.Random) -> None:
    running, queue = draw.randint(1, 6), draw.randint(1, 8)
    among = Places(running, queue)
    calls: list[Call] = []
    weights = {"a": 1.0, "b": 1.0, "c": 2.0}

    def engine() -> None:
        """Starts a sample that waits, or ends one that runs."""
        seats = [(call, seat) for call in calls for seat in call.seats]
        runs = [each for each in seats if each[1].started]
        waits = [each for each in seats if not each[1].started]
        if waits and len(runs) < running and draw.random() < 0.7:
            among.started(draw.choice(waits)[1])
        elif runs:
            call, seat = draw.choice(runs)
            call.end(seat)

    for _ in range(150):
        name = draw.choice("abc")
        if draw.random() < 0.3:
            mine = sum(call.place.count for call in calls if call.place.flow.key[0] == name)
            names = {call.place.flow.key[0] for call in calls} | {name}
            share = among.capacity * weights[name] / sum(weights[each] for each in names)
            held = Counter[str]()
            for call in calls:
                held[call.place.flow.key[0]] += call.place.count
            most = (mine + 1) / weights[name]
            waiting = sum(
                call.place.count - sum(seat.started for seat in call.place.seats)
                for call in calls
                if (other := call.place.flow.key[0]) != name
                and held[other] / weights[other] > most
            )
            try:
                whose = Fairness(name, "", weights[name])
                calls.append(Call(among, whose, draw.randint(1, among.capacity)))
            except QueueFull:
                full = among.samples > 7 * among.capacity
                assert mine + 1 > share or not waiting or full, (mine, share)
        else:
            engine()
        if calls and draw.random() < 0.2:
            reader = draw.choice(calls).reads
            (reader.clear if reader.is_set() and draw.random() < 0.5 else reader.set)()
        if calls and draw.random() < 0.05:
            gone = calls.pop(draw.randrange(len(calls)))
            await gone.close()
        await _settled()
        for call in list(calls):
            if call.place.refused or not call.left:
                assert not (call.place.refused and call.place.started), "it had begun"
                calls.remove(call)
                await call.close()
        assert sum(call.place.count for call in calls) == among.taken <= among.capacity
        ahead = [s for call in calls for s in call.place.seats if s.turn and not s.started]
        if among.taken > running:
            assert len(ahead) <= max(1, running // 4) + len(weights) + running
    for call in calls:
        call.reads.set()
    for _ in range(5000):
        if not calls:
            break
        engine()
        await _settled()
        for call in [call for call in calls if not call.left]:
            calls.remove(call)
            await call.close()
    assert not calls, "samples wait for ever"
    assert among.taken == among.samples == 0
    assert among.waiting() == {}


@pytest.mark.parametrize("seed", range(30))
async def test_further_samples_wait_and_all_end(seed: int) -> None:
    """In random histories of three tenants, whose callers read or do not: nothing is refused
    that has begun, and whoever has less than a share gets in unless all that others have is
    running."""
    print(f"seed {seed}")
    await _history(random.Random(seed))


async def test_a_request_holds_what_runs_and_few_places_in_advance() -> None:
    among = Places(8, 56)
    hog = Call(among, HOG, 64)
    await _settled()
    assert among.taken == 8
    for seat in list(hog.seats):
        among.started(seat)
    await _settled()
    assert among.taken == 8 + 2
    light = [Call(among, LIGHT, 1) for _ in range(54)]
    await _settled()
    assert among.taken == 64
    assert among.waiting() == {"hog": 2, "light": 54}
    for call in (hog, *light):
        await call.close()
    assert among.taken == among.samples == 0


async def test_two_calls_of_many_samples_share_what_runs() -> None:
    among = Places(8, 56)
    hog = Call(among, HOG, 40)
    await _settled()
    for seat in list(hog.seats):
        among.started(seat)
    other = Call(among, LIGHT, 40)
    draw = random.Random(1)
    for _ in range(40):
        call, runs = draw.choice([(c, s) for c in (hog, other) for s in c.seats if s.started])
        call.end(runs)
        await _settled()
        waits = {c: [s for s in c.seats if not s.started] for c in (hog, other)}
        assert all(waits.values()), "the engine must have somebody of each to choose"
        least = min(waits, key=lambda c: sum(s.started for s in c.seats))  # fair shares
        among.started(waits[least][0])
        await _settled()
    assert abs(hog.place.count - other.place.count) <= 2
    for call in (hog, other):
        await call.close()
    assert among.taken == among.samples == 0


async def test_when_the_engine_ends_samples_that_wait_are_told() -> None:
    among = Places(1, 3)
    call = Call(among, HOG, 4)
    await _settled()
    among.fail(EngineFailed("the engine ended; retry"))
    await _settled()
    assert sum(isinstance(_error(task), EngineFailed) for task in call.tasks) >= 2
    await call.close()
    assert among.taken == among.samples == 0


def _error(task: asyncio.Task[None]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


async def test_samples_that_wait_for_their_reader_end_with_the_engine() -> None:
    among = Places(1, 3)
    call = Call(among, HOG, 3)
    call.reads.clear()
    for _ in range(2):  # the second had its place in advance
        await _settled()
        among.started(call.seats[0])
        call.end(call.seats[0])
    await _settled()
    assert among.taken == 0
    among.fail(EngineFailed("it ended"))
    await asyncio.wait(call.tasks[2:])
    assert isinstance(call.tasks[2].exception(), EngineFailed)
    await call.close()
    assert among.taken == among.samples == 0


async def test_an_output_after_its_place_was_given_back_begins_nothing() -> None:
    """The engine had it under way: the sample drops it, and waits again."""
    among = Places(4, 0)
    hog = Call(among, HOG, 4)
    await _settled()
    among.started(hog.seats[0])
    late = hog.seats[-1]
    with among.hold(1, LIGHT):
        assert late.returned
        among.started(late)
        assert not late.started
    await hog.close()
    assert among.taken == among.samples == 0
