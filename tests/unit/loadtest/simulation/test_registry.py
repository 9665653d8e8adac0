"""Names and bytes from the registry: delays, partitions, replicas that come and go."""

from __future__ import annotations

import random

import pytest
from veneer_loadtest.simulation import registry
from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.events import Events
from veneer_loadtest.simulation.registry import Followers, SimulatedLink
from veneer_server.follower import view
from veneer_server.replication import feed

from tests.planted import planted

NAMES = ("a", "b", "c")


def check_history(seed: int) -> None:
    """Raises AssertionError if a follower goes back, has what was never published, or does not
    have everything after a quiet time."""
    random_, events, costs = random.Random(seed), Events(), Costs(follow_s=0.3, notify_s=0.2)
    link = SimulatedLink(costs, events)
    followers = Followers(NAMES, link, costs, events)
    published = dict.fromkeys(range(3), 0)
    seen = {(name, adapter): 0 for name in NAMES for adapter in published}
    lost: set[str] = set()

    def look() -> None:
        for (name, adapter), before in seen.items():
            now = followers.revision(name, adapter)
            assert before <= now <= published[adapter], f"seed {seed}: {before} then {now}"
            seen[name, adapter] = now

    for _ in range(60):
        action, name = random_.random(), random_.choice(NAMES)
        if action < 0.4:
            adapter = random_.randrange(3)
            published[adapter] += 1
            followers.published(adapter)
        elif action < 0.55:
            link.up = not link.up
            if link.up:
                followers.reconnect()
        elif action < 0.7:
            if name in lost:
                lost.remove(name)
                followers.come(name)
            else:
                lost.add(name)
                followers.leave(name)
        until = events.now + random_.expovariate(2)
        while (due := events.next) is not None and due <= until:
            events.step()
            look()
        events.now = max(events.now, until)
    for name in sorted(lost):
        followers.come(name)
    link.up = True
    followers.reconnect()
    while len(events):
        events.step()
        look()
    for (name, adapter), now in seen.items():
        assert now == published[adapter], f"seed {seed}: {name} lacks adapter {adapter}"
    assert all(p.everywhere_s is not None for p in followers.publications), f"seed {seed}"
    assert followers.out_of_step == 0, (
        f"seed {seed}: changes were lost or came in another order"
    )


@pytest.mark.parametrize("seed", range(30))
def test_a_follower_never_goes_back_and_has_everything_after_a_quiet_time(seed: int) -> None:
    check_history(seed)


def test_planted_bugs_are_caught() -> None:
    def histories() -> None:
        for seed in range(30):
            check_history(seed)

    for module, old, new in (
        (registry, "self._connect(name, number)\n\n", "pass\n\n"),
        (view, "        self.sequence = told.sequence\n", ""),
        (view, "self._put(state)\n        return", "return"),
        (feed, "sequence - oldest, None)", "sequence - oldest + 1, None)"),
    ):
        with planted(module, old, new), pytest.raises(AssertionError):
            histories()


def test_fetches_share_the_registrys_connection() -> None:
    costs, events = Costs(registry_byte_s=1e-9, fetch_byte_s=4e-9, fetch_s=0.0), Events()
    link = SimulatedLink(costs, events)
    ends = [link.fetch(10**9) for _ in range(8)]
    # One alone is as slow as a replica's own connection; many, as the registry's.
    assert ends[0] == pytest.approx(4.0)
    assert ends[7] == pytest.approx(11.0)
    assert link.bytes == 8 * 10**9
