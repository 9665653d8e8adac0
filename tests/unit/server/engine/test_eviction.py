"""What is evicted, by cost, size, use and waiting requests; loops and changing popularity."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
from veneer_server.engine.residency import eviction
from veneer_server.engine.residency.eviction import EvictionOrder, ReloadCost
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.residency.tiers import MemoryTier

from tests.bench.residency import LeastRecentlyUsed
from tests.planted import planted
from tests.unit.server.engine.test_residency import Memory
from tests.unit.server.engine.world import SIZE

Order = Callable[[MemoryTier], EvictionOrder]


@dataclass
class Server(Memory):
    """A memory whose requests come one after the other.

    Attributes:
        read, copy: seconds that transfers take, by adapter and else.
    """

    order: Order = EvictionOrder
    read: float = 0.0
    copy: float = 0.0

    def __post_init__(self) -> None:
        self.slow: dict[str, float] = {}
        self.residency = Residency(
            self.host, self.device, itemsize=1, shared=self.shared, order=self.order
        )

    def arrive(self, index: int = 0) -> None:
        name, tier = list(self.coming)[index]
        del self.coming[name, tier]
        self.there[name, tier] = None
        if tier == "host":
            self.residency.loaded(name, self.slow.get(name, self.read))
        else:
            self.residency.moved(name, self.copy)

    def serve(self, *names: str, size: int = SIZE) -> list[str]:
        """Requests for these adapters; the tiers they were found in."""
        found = []
        for name in names:
            found.append(self.residency.tier(name))
            self.lease(name, size)
            self.settle()
            self.hold(name)
            assert self.holds == [name]
            self.holds.clear()
            self.residency.unhold(name)
            self.release(0)
            self.check()
        return found

    def names(self, tier: MemoryTier) -> set[str]:
        return {name for name, where in self.there if where == tier}


def hit_rate(server: Server, names: Iterable[str]) -> float:
    found = server.serve(*names)
    return found.count("device") / len(found)


def in_turn(count: int, rounds: int) -> list[str]:
    return [str(i % count) for i in range(count * rounds)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_loop_longer_than_device_finds_most_of_it_there(shared: bool) -> None:
    """LRU, the planted bug, finds nothing."""
    sizes = {"device": 8 * SIZE, "host": 40 * SIZE, "shared": shared}
    server = Server(**sizes)  # type: ignore[arg-type]
    server.serve(*in_turn(32, 2))
    assert hit_rate(server, in_turn(32, 5)) >= 7 / 32
    least_recent = Server(**sizes, order=LeastRecentlyUsed)  # type: ignore[arg-type]
    assert hit_rate(least_recent, in_turn(32, 5)) == 0


def by_zipf(count: int, requests: int, seed: int) -> list[str]:
    weights = [1 / (i + 1) for i in range(count)]
    return [str(n) for n in random.Random(seed).choices(range(count), weights, k=requests)]


@pytest.mark.push
@pytest.mark.parametrize("seed", range(3))
def test_popular_adapters_stay(seed: int) -> None:
    print(f"seed {seed}")
    rates = {}
    for order in (EvictionOrder, LeastRecentlyUsed):
        server = Server(device=8 * SIZE, host=40 * SIZE, order=order)
        rates[order] = hit_rate(server, by_zipf(32, 1500, seed))
    assert rates[EvictionOrder] > rates[LeastRecentlyUsed] + 0.05


@pytest.mark.push
def test_what_was_popular_gives_way_to_what_is() -> None:
    def rate(order: Order) -> float:
        server = Server(device=8 * SIZE, host=40 * SIZE, order=order)
        random_, names = random.Random(1), [str(n) for n in range(32)]
        found = []
        for phase in range(6):
            random_.shuffle(names)
            found += server.serve(*(names[int(n)] for n in by_zipf(32, 400, phase)))
        return found.count("device") / len(found)

    assert rate(EvictionOrder) > rate(LeastRecentlyUsed)
    with planted(eviction, "min(_MOST_USES, standing.uses + 1)", "standing.uses + 1"):
        assert rate(EvictionOrder) < rate(LeastRecentlyUsed), "a bug that this would miss"


def test_a_scan_leaves_what_is_used_again() -> None:
    server = Server(device=4 * SIZE, host=40 * SIZE)
    server.serve(*"abc" * 3)
    server.serve(*(f"once {i}" for i in range(20)))
    assert server.serve(*"abc") == ["device"] * 3


def test_what_takes_longer_to_read_stays_in_host() -> None:
    server = Server(device=SIZE, host=3 * SIZE, read=0.01)
    server.slow["slow"] = 1.0
    server.serve("slow", "slow", size=SIZE // 2)  # of a size class of its own
    server.serve("a", "b", "a", "b", "a", "b", "c", "c", "d")
    assert ("slow", "host") in server.there
    alike = Server(device=SIZE, host=3 * SIZE, read=0.01)
    alike.serve("slow", "slow", size=SIZE // 2)
    alike.serve("a", "b", "a", "b", "a", "b", "c", "c", "d")
    assert ("slow", "host") not in alike.there, "else cost has no say"


def test_of_two_that_take_as_long_to_read_the_larger_goes() -> None:
    server = Server(device=4 * SIZE, host=4 * SIZE, shared=True, read=0.01)
    server.serve("large", "large", size=2 * SIZE)
    server.serve("small", "small", "small", size=SIZE)
    server.serve("large", size=2 * SIZE)
    server.serve("new", "new", size=2 * SIZE)
    assert server.names("host") == {"small", "new"}


def test_a_device_copy_that_host_still_has_goes_before_one_that_would_be_read_again() -> None:
    server = Server(device=2 * SIZE, host=2 * SIZE, read=0.1, copy=0.001)
    server.serve(*"aabbbb")
    server.activate("x", "host")
    server.settle()
    assert server.names("host") == {"b", "x"}
    server.serve("c")
    assert server.names("device") == {"a", "c"}, "b, used later, is had back with a copy"


@pytest.mark.parametrize("shared", [False, True])
def test_what_waits_is_evicted_last_and_the_last_in_the_queue_first(shared: bool) -> None:
    server = Server(device=4 * SIZE, host=4 * SIZE if shared else 30 * SIZE, shared=shared)
    server.serve(*"abc", *["idle"] * 20)
    for name in ("new 1", "new 2", "b", "a", "c"):
        server.lease(name)  # in this order; they wait, and some have what they wait for
    server.plan()
    if not shared:
        while server.coming:
            server.arrive()
        server.plan()
    assert server.names("device") == {"b", "a"}, "what is idle, then the last in the queue"
    assert server.settle().blocked == "c"
    assert server.names("device") == {"new 1", "new 2", "b", "a"}


def test_what_an_operator_activated_outlives_a_request_for_something_new() -> None:
    """It is not on trial, of which the newest goes first."""
    server = Server(device=3 * SIZE, host=30 * SIZE)
    server.serve("x", "y")
    server.activate("warm", "device")
    server.settle()
    server.serve("new", "newer")
    assert server.names("device") == {"x", "warm", "newer"}


def test_requests_that_wait_for_one_load_are_one_use() -> None:
    """Or a loop of bursts would push out all, as with LRU."""
    server = Server(device=8 * SIZE, host=40 * SIZE)
    found = []
    for name in in_turn(32, 6):
        found.append(server.residency.tier(name))
        for _ in range(3):
            server.lease(name)
        server.settle()
        for _ in range(3):
            server.hold(name)
        for _ in range(3):
            server.holds.remove(name)
            server.residency.unhold(name)
            server.release(0)
    assert found[64:].count("device") >= 4 * 7


def test_notes_of_uses_do_not_pile_up_where_nothing_is_ever_evicted() -> None:
    server = Server()
    server.serve(*"abc" * 200)
    orders = server.residency.ledger.orders.values()
    assert max(order.notes for order in orders) < 100


def test_costs_are_averages_by_size_class() -> None:
    cost = ReloadCost()
    guess = cost.per_byte("host", 1000)
    for _ in range(50):
        cost.observe("host", 1000, 1e-3)
        cost.observe("host", 1_000_000, 0.5)
    assert cost.per_byte("host", 1000) == pytest.approx(1e-6)
    assert cost.per_byte("host", 900) == pytest.approx(1e-6), "the same class"
    assert cost.per_byte("host", 1_000_000) == pytest.approx(5e-7)
    assert 5e-7 < cost.per_byte("host", 30_000) < 1e-6, "never seen: the average of all"
    assert cost.per_byte("device", 1000) < guess, "a copy is not a read"
    before = cost.per_byte("host", 1000)
    cost.observe("host", 1000, 0.0)  # not measured
    assert cost.per_byte("host", 1000) == before
    for seconds in itertools.repeat(2e-3, 5):
        cost.observe("host", 1000, seconds)
    assert 1.5e-6 < cost.per_byte("host", 1000) < 2e-6, "it follows"
