"""Followers' leases, and waiting for followers."""

from __future__ import annotations

import asyncio
import itertools

from veneer_server.replication.replicas import Reached, Replicas, Wait

FOR_ALL = Wait("all", 60)


async def test_a_wait_ends_with_the_last_report() -> None:
    replicas = Replicas()
    for name in ("a", "b", "c"):
        replicas.report(name, 4)
    everybody = asyncio.ensure_future(replicas.reached(5, FOR_ALL))
    most = asyncio.ensure_future(replicas.reached(5, Wait("quorum", 60)))
    replicas.report("a", 5)
    await asyncio.sleep(0)
    assert not most.done()
    replicas.report("b", 7)
    assert await most == Reached(3, 2, True)
    assert not everybody.done()
    replicas.leave("c")
    assert await everybody == Reached(2, 2, True)


async def test_an_expired_lease_is_not_waited_for() -> None:
    replicas = Replicas(lease_s=0.05)
    replicas.report("gone", 1)
    assert len(replicas) == 1
    assert await replicas.reached(2, FOR_ALL) == Reached(0, 0, True)
    assert len(replicas) == 0


async def test_a_wait_has_an_end() -> None:
    replicas = Replicas()
    replicas.report("slow", 1)
    assert await replicas.reached(2, Wait("all", 0.01)) == Reached(1, 0, False)


async def test_nobody_is_waited_for_where_nobody_follows_or_none_is_asked_for() -> None:
    replicas = Replicas()
    assert await replicas.reached(2, FOR_ALL) == Reached(0, 0, True)
    assert await replicas.reached(2, Wait("quorum")) == Reached(0, 0, True)
    replicas.report("a", 1)
    assert await replicas.reached(2, Wait()) is None


async def test_a_lease_that_expires_between_two_looks_at_the_clock() -> None:
    seconds = itertools.count(0.0, 1.0)
    replicas = Replicas(lease_s=2.5, clock=lambda: next(seconds))
    replicas.report("gone", 1)
    assert await replicas.reached(2, FOR_ALL) == Reached(0, 0, True)


async def test_followers_of_an_earlier_run_are_waited_for() -> None:
    """After a restart a registry does not know who follows it: whoever does still answers on
    what it knew, and is back before a lease has passed."""
    replicas = Replicas(lease_s=0.2)
    replicas.begin()
    everybody = asyncio.ensure_future(replicas.reached(1, FOR_ALL))
    soon = await replicas.reached(1, Wait("quorum", 0.01))
    assert soon == Reached(0, 0, False)
    replicas.report("a", 1)
    await asyncio.sleep(0)
    assert not everybody.done()
    assert await everybody == Reached(1, 1, True)
    replicas.report("a", 2)
    assert await replicas.reached(2, FOR_ALL) == Reached(1, 1, True)
