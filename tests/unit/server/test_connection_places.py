"""Which connection gives up its place when more are open than may be."""

from __future__ import annotations

import random

import pytest
from veneer_server.queues.connection_places import (
    NEWCOMERS,
    PROGRESS,
    STALLED_S,
    OpenConnection,
    OpenConnections,
    host_of,
)

MOST = 64


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def filled(keyless: bool) -> tuple[Clock, OpenConnections]:
    clock = Clock()
    return clock, OpenConnections(MOST, keyless=keyless, clock=clock)


@pytest.mark.parametrize("keyless", [True, False])
def test_the_stalled_go_first_and_a_byte_now_and_then_is_no_progress(keyless: bool) -> None:
    clock, places = filled(keyless)
    dripping, sending = places.join("a"), places.join("a")
    for _ in range(10):
        clock.now += STALLED_S / 4
        places.progressed(dripping, 1)
        places.progressed(sending, PROGRESS // 3)
    fresh = [places.join("b") for _ in range(3)]
    assert places.victim() is dripping
    places.leave(dripping)
    assert places.victim() is fresh[0], "of the host that has most"
    assert places.victim([sending]) is sending, "its refusal is being delayed"


def test_a_request_that_begins_after_an_hour_of_rest_has_not_stalled() -> None:
    clock, places = filled(keyless=True)
    caller = places.join("a")
    places.earns(caller, "a")
    places.waits(caller, asking=False)
    clock.now = 3600.0
    half = [places.join("b") for _ in range(3)]
    places.waits(caller, asking=True)
    assert places.victim() is half[0]
    clock.now += STALLED_S + 1
    places.progressed(half[0])
    places.progressed(half[1])
    assert places.victim() is half[2], "of the host that has most of the stalled"


def test_what_has_just_come_can_stay_for_a_while_and_nobody_is_closed_for_it() -> None:
    clock, places = filled(keyless=True)
    caller = places.join("a")
    places.earns(caller, "a")
    places.waits(caller, asking=False)
    clock.now = 1.0
    begun = places.join("a")
    clock.now = 1.1
    silent = [places.join("a", 0.9) for _ in range(3)]
    assert places.victim(before=0.9) is None
    for place in (*silent, begun):
        assert places.victim(before=1.1) is place
        places.leave(place)
    assert places.victim(before=1.1) is caller


def test_callers_that_have_left_make_room_for_callers() -> None:
    _, places = filled(keyless=False)
    joined = [places.join("a") for _ in range(MOST)]
    share = MOST - MOST // NEWCOMERS
    for place in joined[:share]:
        assert places.earns(place, "a") is None
    for place in joined[share:]:
        assert places.earns(place, "a") in joined[:share]
    assert places.crowded
    for place in joined[: MOST // NEWCOMERS]:
        places.leave(place)
    assert not places.crowded
    late = places.join("b")
    assert places.earns(late, "b") in joined


@pytest.mark.parametrize("keyless", [True, False])
@pytest.mark.parametrize("afterwards", ["rest", "send", "watch"])
def test_callers_who_were_all_answered_at_once_give_up_what_is_not_theirs(
    keyless: bool, afterwards: str
) -> None:
    """While they are answered nobody can be closed; later a newcomer can."""
    _, places = filled(keyless)
    callers = [places.join("a") for _ in range(MOST)]
    for place in callers:
        places.busy(place)
    for place in callers:
        assert places.earns(place, "team-a") is None
    busy = places.join("b")
    assert places.alone(busy)
    places.leave(busy)
    for place in callers:
        if afterwards == "watch":
            places.watches(place)
        else:
            places.waits(place, asking=afterwards == "send")
    for n in range(MOST // NEWCOMERS):
        new = places.join(f"10.0.0.{n}")
        assert not places.alone(new)
        victim = places.victim()
        assert victim in callers
        places.leave(victim)
        callers.remove(victim)
    assert not places.crowded


def test_strangers_never_take_the_place_of_a_caller() -> None:
    clock, places = filled(keyless=False)
    callers = [places.join("a") for _ in range(MOST - MOST // NEWCOMERS)]
    for place in callers:
        assert places.earns(place, "team-a") is None
        places.waits(place, asking=False)
    clock.now = 60.0
    for n in range(1000):
        places.join(f"10.0.{n % 7}.1")
        while len(places) > MOST:
            victim = places.victim()
            assert victim is not None
            assert victim.owner is None
            places.leave(victim)
    assert len(places) == MOST


def test_a_caller_takes_the_place_of_the_tenant_that_has_most() -> None:
    _, places = filled(keyless=False)
    share = MOST - MOST // NEWCOMERS
    mine = [places.join("a") for _ in range(3)]
    for place in mine:
        places.earns(place, "team-a")
        places.waits(place, asking=False)
    others = [places.join("a") for _ in range(share - 3)]
    for place in others:
        places.earns(place, "team-b")
        places.waits(place, asking=False)
    new = places.join("a")
    assert places.earns(new, "team-a") is others[0]


def test_what_is_being_answered_never_goes() -> None:
    _, places = filled(keyless=True)
    busy = [places.join("a") for _ in range(3)]
    for place in busy:
        places.busy(place)
    assert places.victim() is None
    places.waits(busy[1], asking=True)
    assert places.victim() is busy[1]


def test_calls_that_only_watch_go_after_all_others() -> None:
    _, places = filled(keyless=False)
    watching, quiet = places.join("a"), places.join("a")
    places.watches(watching)
    assert places.victim() is quiet
    places.leave(quiet)
    assert places.victim() is watching


@pytest.mark.parametrize("keyless", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_whatever_happens(keyless: bool, seed: int) -> None:
    rng = random.Random(seed)
    clock, places = filled(keyless)
    mine: list[OpenConnection] = []
    busy: set[OpenConnection] = set()
    for _ in range(3000):
        clock.now += rng.choice((0, 0.1, STALLED_S))
        what = rng.randrange(8)
        if what < 2 or not mine:
            mine.append(places.join(f"h{rng.randrange(5)}"))
        place = rng.choice(mine)
        if what == 2:
            places.busy(place)
            busy.add(place)
        elif what == 3:
            places.waits(place, asking=rng.random() < 0.5)
            busy.discard(place)
        elif what == 4:
            places.watches(place)
            busy.discard(place)
        elif what == 5:
            given = places.earns(place, rng.choice(("x", "y")))
            if given is not None:
                assert given in mine
                assert given not in busy
                assert given.owner is not None
                mine.remove(given)
                places.leave(given)
        elif what == 6:
            places.progressed(place, rng.randrange(2 * PROGRESS))
        while len(places) > MOST and (victim := places.victim()) is not None:
            assert victim not in busy
            mine.remove(victim)
            places.leave(victim)
        assert len(places) == len(mine)
    for place in mine:
        places.leave(place)
    assert len(places) == 0
    assert places.victim() is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1:5", "10.0.0.1:6", True),
        ("10.0.0.1:5", "10.0.0.2:5", False),
        ("::ffff:10.0.0.1:5", "10.0.0.1:6", True),
        ("2001:db8::1:5", "2001:db8::2:5", True),
        ("[2001:db8::1]:5", "2001:db8::ffff:1:5", True),
        ("2001:db8:0:1::1:5", "2001:db8:0:2::1:5", False),
        ("fe80::1%eth0:5", "fe80::2%eth1:5", True),
    ],
)
def test_a_host_is_an_address_or_a_network_that_one_machine_has(
    one: str, other: str, same: bool
) -> None:
    assert (host_of(one) == host_of(other)) is same
