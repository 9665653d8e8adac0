"""Which engine a call goes to, from what Serve and the engines report. No Ray is needed; all
engines here are one gRPC server without services, which is enough to connect to."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from veneer_ray.replicas import EngineReplicas, RunningEngine, report_of
from veneer_server.routing.records import Wanted


class Engines:
    """Engines that report, and the clock of all."""

    def __init__(self, address: str) -> None:
        self.now = 1000.0
        self.address = address
        self.replicas = EngineReplicas(0.05, lambda: self.now, lambda: self.now)

    def report(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Tell what runs, as Serve does."""
        self.replicas.update(
            {
                name: RunningEngine(self.address, "", {"at": self.now, **report})
                for name, report in reports.items()
            }
        )

    async def send(self, *digests: str) -> list[str]:
        """The engines of calls that end at once."""
        found = []
        for digest in digests:
            async with self.replicas.chosen(Wanted(digest)) as engine:
                found.append(engine.replica)
        return found


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made = Engines(f"127.0.0.1:{port}")
    yield made
    await made.replicas.close()
    await server.stop(None)


def many(count: int) -> Iterable[str]:
    return map(str, range(count))


async def test_an_adapter_s_calls_go_to_one_engine_while_that_has_no_more_to_do(
    engines: Engines,
) -> None:
    engines.report({"a": {}, "b": {}, "c": {}})
    assert len(set(await engines.send(*["digest"] * 6))) == 1


async def test_calls_under_way_count_until_they_end(engines: Engines) -> None:
    engines.report({"a": {}, "b": {}})
    async with AsyncExitStack() as stack:
        counts: Counter[str] = Counter()
        for _ in range(40):
            chosen = await stack.enter_async_context(engines.replicas.chosen(Wanted("digest")))
            counts[chosen.replica] += 1
        assert max(counts.values()) <= 0.5 * 1.25 * 40 + 1, "more than the bound at one"
    engines.now += 300.0  # what was sent is no longer recent
    engines.report({"a": {}, "b": {}, "c": {}})
    assert set(await engines.send(*many(30))) == {"a", "b", "c"}, "those that ended count"


async def test_a_call_goes_where_an_engine_reports_its_adapter(engines: Engines) -> None:
    for digest in many(20):
        for holder, other in (("a", "b"), ("b", "a")):
            engines.now += 1
            engines.report({holder: {"resident": [digest]}, other: {}})
            assert await engines.send(digest) == [holder]


async def test_engines_that_are_gone_get_nothing_and_may_come_back(engines: Engines) -> None:
    engines.report({"a": {}, "b": {}})
    engines.report({"b": {}})
    assert set(await engines.send(*many(10))) == {"b"}
    engines.report({"a": {}, "b": {}})
    assert set(await engines.send(*many(16))) == {"a", "b"}


async def test_an_engine_that_reports_to_be_unhealthy_gets_nothing(engines: Engines) -> None:
    engines.report({"a": {}, "b": {"healthy": False}})
    assert set(await engines.send(*many(10))) == {"a"}
    engines.now += 1
    engines.report({"a": {}, "b": {"healthy": True}})
    assert set(await engines.send(*many(16))) == {"a", "b"}


async def test_an_engine_that_is_silent_while_others_report_gets_nothing(
    engines: Engines,
) -> None:
    engines.report({"a": {}, "b": {}})
    old = {"at": engines.now}
    engines.now += 60
    engines.report({"a": old, "b": old})  # nobody reports: it is Serve that is silent
    assert set(await engines.send(*many(16))) == {"a", "b"}
    engines.report({"a": {}, "b": old})
    assert set(await engines.send(*many(10))) == {"a"}


async def test_an_engine_that_cannot_be_reached_is_tried_once_for_each_report(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: Counter[grpc.aio.Channel] = Counter()

    async def connected(channel: grpc.aio.Channel) -> bool:
        tried[channel] += 1
        return tried.total() > 1  # the first one that is tried cannot be reached

    monkeypatch.setattr("veneer_ray.replicas._connected", connected)
    engines.report({"a": {}, "b": {}})
    old = {"at": engines.now}
    (alive,) = set(await engines.send(*many(10)))
    dead = "b" if alive == "a" else "a"
    engines.now += 1
    engines.report({alive: {}, dead: old})
    assert set(await engines.send(*many(10))) == {alive}
    assert sorted(tried.values()) == [1, 20]
    engines.report({alive: {}, dead: {}})
    assert dead in await engines.send(*(f"new-{number}" for number in range(16)))


async def test_an_old_report_told_again_changes_nothing(engines: Engines) -> None:
    old = {"a": {"at": engines.now, "requests": 50}, "b": {"at": engines.now}}
    engines.report(old)
    engines.now += 1
    engines.report({"a": {}, "b": {}})
    engines.report(old)
    assert set(await engines.send(*many(16))) == {"a", "b"}, "the 50 requests still count"


def test_a_report_from_a_clock_that_is_ahead_is_as_of_now() -> None:
    assert report_of({"at": 2000.0, "requests": 3}, 1000.0).age_s == 0.0
    assert report_of({"at": 990.0}, 1000.0).age_s == 10.0
    assert report_of({}, 1000.0).requests == 0, "a replica that has not reported yet"
