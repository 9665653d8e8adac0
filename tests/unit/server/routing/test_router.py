"""Which replica a request goes to: bounds, movement, affinity, draining and lost replicas."""

from __future__ import annotations

import random
from collections import Counter, deque
from types import ModuleType

import numpy as np
import pytest
from veneer_registry.errors import Unavailable
from veneer_server.routing import adapter_router, fleet
from veneer_server.routing.adapter_router import BOUND, AdapterRouter
from veneer_server.routing.baselines import LeastLoaded, RandomChoice, RoundRobin
from veneer_server.routing.holders import Holders
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted
from veneer_server.routing.router import Router

from tests.planted import planted
from tests.refused import refused
from tests.unit.server.routing.histories import (
    bounded_router,
    check_histories,
    check_history,
    check_movement,
)


def router_of(count: int) -> AdapterRouter:
    router = AdapterRouter()
    for number in range(count):
        router.join(f"replica-{number}")
    return router


def homes(names: list[str], digests: list[str]) -> list[str]:
    router = AdapterRouter()
    for name in names:
        router.join(name)
    return [router.homes(digest)[0] for digest in digests]


def serve(router: Router, wanted: Wanted, now: float) -> str:
    """Route a request that ends at once."""
    choice = router.choose(wanted, now)
    router.finished(choice, now)
    return choice.replica


@pytest.mark.parametrize("seed", range(40))
def test_no_replica_gets_a_request_beyond_the_bound_or_while_it_takes_none(seed: int) -> None:
    assert check_history(seed) > 100, f"seed {seed}"


@pytest.mark.parametrize("replicas", [1, 2, 5, 40])
def test_a_replica_that_joins_or_leaves_moves_its_own_adapters_only(replicas: int) -> None:
    check_movement(homes, replicas, 4000)


def test_a_home_by_the_remainder_of_a_number_moves_too_many() -> None:
    def by_remainder(names: list[str], digests: list[str]) -> list[str]:
        return [names[int(digest.split()[1]) % len(names)] for digest in digests]

    with pytest.raises(AssertionError):
        check_movement(by_remainder, 5, 4000)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (adapter_router, "return bool(self.fleet.load[slot] <= most and", "return bool("),
        (
            adapter_router,
            "below = fleet.load[order] <= most ",
            "below = fleet.load[order] >= 0 ",
        ),
        (adapter_router, "self._orders.clear()", "pass"),
        (fleet, "if not known.draining)", ")"),
        (fleet, "del self._known[replica]", "pass"),
        (fleet, "self._changed(known, known.own - 1, now)", "return"),
        (fleet, "self.load[slot] += 1", "pass"),
    ],
)
def test_planted_bugs_are_caught(module: ModuleType, old: str, new: str) -> None:
    with planted(module, old, new), pytest.raises((AssertionError, IndexError)):
        check_histories(range(40))


def test_the_order_depends_on_names_only_so_that_all_routers_agree() -> None:
    names = [f"replica-{number}" for number in range(9)]
    digests = [f"digest {number}" for number in range(50)]
    assert homes(names, digests) == homes(names[::-1], digests)
    # As computed on another day: another hash would move every adapter at an upgrade.
    assert homes(names, digests[:6]) == GOLDEN


GOLDEN = [f"replica-{number}" for number in (1, 5, 6, 4, 7, 4)]


def test_an_adapters_requests_go_to_one_replica_and_a_popular_ones_to_as_many_as_it_needs() -> (
    None
):
    router, random_ = router_of(20), random.Random(5)
    digests = [f"digest {number}" for number in range(300)]
    weights = [1 / (number + 1) for number in range(300)]
    used: dict[str, Counter[str]] = {digest: Counter() for digest in digests}
    total: Counter[str] = Counter()
    open_ = []
    for number in range(12_000):
        now = number / 200
        digest = random_.choices(digests, weights)[0]
        choice = router.choose(Wanted(digest), now)
        open_.append(choice)
        if len(open_) > 60:
            router.finished(open_.pop(random_.randrange(60)), now)
        if number >= 4000:
            used[digest][choice.replica] += 1
            total[choice.replica] += 1
    share = 1 / sum(weights)  # of the most popular one: 3 replicas' fair share
    assert len(used[digests[0]]) >= 2 * share * 20 * 0.8
    rare = [len(used[digest]) for digest in digests[60:] if used[digest]]
    assert sum(rare) / len(rare) < 2  # 13 with random routing
    assert max(total.values()) <= 1.25 * sum(total.values()) / 20


def test_a_sessions_requests_stay_together_where_an_adapter_has_several_replicas() -> None:
    router = router_of(4)
    for number in range(200):  # all requests are for one adapter: it has all replicas
        serve(router, Wanted("popular"), number / 10)
    sessions = [f"session {number}" for number in range(40)]
    chosen = {
        session: {serve(router, Wanted("popular", session), 20 + turn) for turn in range(5)}
        for session in sessions
    }
    assert sum(len(replicas) == 1 for replicas in chosen.values()) >= 30
    assert len(set().union(*chosen.values())) == 4
    alone = {serve(router, Wanted(session="one"), 30.0) for _ in range(5)}
    assert len(alone) == 1  # of the base as well


def test_a_request_for_the_base_goes_where_the_least_is_under_way() -> None:
    router = router_of(3)
    chosen = [router.choose(Wanted(), 0.0).replica for _ in range(6)]
    assert Counter(chosen) == {"replica-0": 2, "replica-1": 2, "replica-2": 2}


def test_beyond_the_bound_a_copy_elsewhere_goes_before_a_new_one() -> None:
    router = router_of(10)
    first, second, third, fourth = router.homes("adapter", 4)
    for name in (first, second):
        router.report(name, ReplicaReport(frozenset(), 50), 0.0)
    assert serve(router, Wanted("adapter"), 0.0) == third
    router.report(third, ReplicaReport(frozenset(), 0), 1.0)  # it did not keep it
    router.report(fourth, ReplicaReport(frozenset({"adapter"}), 0), 1.0)
    assert serve(router, Wanted("adapter"), 1.0) == fourth


def test_an_adapter_stays_where_it_was_loaded_until_that_replica_has_much_more_to_do() -> None:
    router = router_of(10)
    first, second = router.homes("adapter", 2)
    router.report(first, ReplicaReport(frozenset(), 1), 0.0)
    assert serve(router, Wanted("adapter"), 0.0) == second  # it has less to do
    router.report(second, ReplicaReport(frozenset({"adapter"}), 2), 1.0)
    assert serve(router, Wanted("adapter"), 1.0) == second  # 2 there, 1 at the first
    router.report(first, ReplicaReport(frozenset(), 0), 2.0)
    router.report(second, ReplicaReport(frozenset({"adapter"}), 6), 2.0)
    assert serve(router, Wanted("adapter"), 2.0) == first


def test_a_report_says_nothing_of_what_was_sent_after_it() -> None:
    holders = Holders()
    holders.expect("one", "sent", 1.0)
    # Older than the request that makes it load the adapter.
    holders.report("one", ReplicaReport(frozenset({"other"}), 0, age_s=2.0), 2.0)
    assert set(holders.of("sent")) == set(holders.of("other")) == {"one"}
    holders.report("one", ReplicaReport(frozenset(), 0, age_s=0.5), 2.0)
    assert not holders.of("sent")
    assert not holders.of("other")
    holders.expect("one", "sent", 3.0)
    holders.leave("one")
    assert not holders.of("sent")


def test_what_other_routers_send_counts_and_ones_own_counts_once() -> None:
    router = router_of(2)
    choices = [router.choose(Wanted(), 0.0) for _ in range(10)]
    router.finished(choices.pop(), 1.0)
    # Taken before one had ended: nine or ten of its five requests there are not others'.
    router.report("replica-0", ReplicaReport(frozenset(), 5, age_s=0.5), 1.2)
    router.report("replica-1", ReplicaReport(frozenset(), 25, age_s=0.5), 1.2)
    assert router.fleet.load.tolist() in ([5, 24], [4, 25])
    for choice in choices:
        router.finished(choice, 2.0)
    assert router.fleet.load.tolist() == [0, 20]
    router.report("replica-1", ReplicaReport(frozenset(), 0), 3.0)
    assert router.fleet.load.tolist() == [0, 0]


def test_a_request_of_a_replica_that_was_lost_does_not_end_one_of_its_successor() -> None:
    router = router_of(1)
    before = router.choose(Wanted("adapter"), 0.0)
    router.leave("replica-0")
    router.join("replica-0")
    router.choose(Wanted("adapter"), 1.0)
    router.finished(before, 2.0)
    assert router.fleet.load.tolist() == [1]


def test_a_draining_replica_gets_nothing_new_and_counts_its_own_until_they_end() -> None:
    router = router_of(2)
    choices = [router.choose(Wanted(), 0.0) for _ in range(4)]
    router.drain("replica-0")
    assert {router.choose(Wanted(f"a{number}"), 1.0).replica for number in range(20)} == {
        "replica-1"
    }
    router.finished(next(c for c in choices if c.replica == "replica-0"), 2.0)
    router.join("replica-0")  # it was not stopped after all
    assert router.fleet.load.tolist() == [1, 22]


def test_a_replica_that_joins_is_not_sent_all_requests_until_it_has_had_as_many() -> None:
    router = router_of(4)
    for number in range(2000):
        serve(router, Wanted(f"adapter {number % 97}"), number / 100)
    router.join("new")
    got = Counter(serve(router, Wanted(f"adapter {n % 97}"), 20 + n / 100) for n in range(97))
    assert got["new"] <= 2 * 97 / 5


@pytest.mark.parametrize("seed", [1, 2])
def test_a_popular_adapter_that_is_replaced_leaves_every_period_within_the_bound(
    seed: int,
) -> None:
    """A new revision is another digest, so its share is learnt anew, from two homes on."""
    drawn = np.random.default_rng(seed)
    replicas, rate, seconds = 40, 240.0, 60.0
    shares = 1 / np.arange(1, 2001)
    asked = drawn.choice(2000, int(rate * seconds), p=shares / shares.sum())
    router, sent, open_ = AdapterRouter(), Counter[str](), deque[tuple[float, RoutedTo]]()
    for number in range(replicas):
        router.join(f"r{number}")
    for number, adapter in enumerate(asked.tolist()):
        now = number / rate
        while open_ and open_[0][0] <= now:
            router.finished(open_.popleft()[1], now)
        new = adapter == 0 and now >= seconds / 2
        choice = router.choose(Wanted("replaced" if new else f"{seed}-{adapter}"), now)
        open_.append((now + 0.05, choice))
        if now >= 0.3 * seconds:
            sent[choice.replica] += 1
    assert max(sent.values()) <= BOUND * sum(sent.values()) / replicas


@pytest.mark.parametrize(
    "router", [bounded_router(), RandomChoice(1), RoundRobin(), LeastLoaded(1)]
)
def test_without_a_replica_a_request_is_refused_and_told_when_to_retry(router: Router) -> None:
    with refused(Unavailable, cause="no_replica") as caught:
        router.choose(Wanted("adapter"), 0.0)
    assert caught.value.retry_after_s
    router.join("one")
    assert router.choose(Wanted("adapter"), 0.0).replica == "one"
    router.drain("one")
    with refused(Unavailable, cause="no_replica"):
        router.choose(Wanted("adapter"), 0.0)


def test_baselines_spread_requests_evenly() -> None:
    for router in (RandomChoice(1), RoundRobin(), LeastLoaded(1)):
        for number in range(4):
            router.join(f"replica-{number}")
        got = Counter(router.choose(Wanted("one"), 0.0).replica for _ in range(400))
        assert min(got.values()) > 70


def test_an_hour_of_silence_and_a_year_of_requests_leave_the_sums_finite() -> None:
    router = router_of(3)
    for number in range(300):
        replica = serve(router, Wanted(f"adapter {number % 7}"), number * 36_000.0)
        assert replica in router.fleet.names
    assert 0 < router.fleet.mean_recent < 1e70
