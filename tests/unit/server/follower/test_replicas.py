"""Followers' leases, and waiting for followers."""

from __future__ import annotations

import asyncio

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
