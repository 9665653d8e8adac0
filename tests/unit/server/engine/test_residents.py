"""After a restart, adapters are restored: pinned ones first, then the most recently used,
within budgets, and without delaying a request. The test plays the engine and answers
activations."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterInUse,
    AdapterNotFound,
    AdapterPinned,
    EngineFailed,
    ModelLoading,
)
from veneer_server.engine_client import resident_set as residents
from veneer_server.engine_client.client import EngineClient
from veneer_server.engine_client.resident_set import MemoryTier, ResidentSet
from veneer_server.progress import SINK, StartPart
from veneer_server.wire.messages import AdapterSource, EngineConfig, Occupancy, ResidencyChanged

from tests.refused import refused

SIZE = 10


def source(digest: str) -> AdapterSource:
    return AdapterSource(digest, f"/store/{digest}", SIZE, digest)


class Engine:
    """FAKE: puts adapters into tiers when asked to, and tells the set of residents."""

    def __init__(self, *, device_budget: int = 1000, gone: frozenset[str] = frozenset()):
        self.residents = ResidentSet(
            host_budget=1000,
            device_budget=device_budget,
            activate=self.activate,
            hold=self.hold,
        )
        self.asked: list[tuple[str, str, bool]] = []
        self.held: list[str] = []
        self.there: dict[str, bool] = {}
        self.dies_of: str | None = None
        self._gone = gone

    async def activate(self, adapter: AdapterSource, tier: MemoryTier, pin: bool) -> None:
        assert self.held == [adapter.name], "files are kept while they are read"
        self.asked.append((adapter.name, tier, pin))
        await asyncio.sleep(0)
        if adapter.name == self.dies_of:
            self.residents.lose()
            raise EngineFailed("gone")
        self.loaded(adapter.name, pinned=pin or self.there.get(adapter.name, False))

    @contextmanager
    def hold(self, adapter: AdapterSource) -> Iterator[None]:
        if adapter.name in self._gone:
            raise AdapterNotFound("deleted meanwhile")
        self.held.append(adapter.name)
        try:
            yield
        finally:
            self.held.remove(adapter.name)

    def loaded(self, name: str, *, pinned: bool = False) -> None:
        """Adapter ``name`` is on DEVICE now."""
        self.there[name] = pinned
        used = SIZE * len(self.there)
        self.residents.update(
            ResidencyChanged(name, "device", pinned, SIZE, used, used, len(self.there), used)
        )

    def request(self, name: str) -> None:
        self.residents.used(source(name))
        self.loaded(name, pinned=self.there.get(name, False))

    def die(self) -> list[ResidencyChanged]:
        self.there.clear()
        return self.residents.lose()

    async def restart(self) -> list[str]:
        """A new engine; the names of adapters that were brought back, in order."""
        self.asked.clear()
        self.residents.restore(itemsize=1)
        if (task := self.residents.restoring) is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return [name for name, _, _ in self.asked]


async def test_it_is_told_how_many_are_back() -> None:
    engine = Engine(gone=frozenset("b"))
    for name in "abc":
        engine.request(name)
    engine.die()
    told: list[StartPart] = []
    before = SINK.set(told.append)
    await engine.restart()
    engine.die()
    engine.dies_of = "c"
    await engine.restart()
    SINK.reset(before)
    whole = [(part.done, part.state) for part in told if part.total == 3]
    assert whole[0] == (0, "running")
    assert whole[-1] == (2, "done"), "one of them is gone"
    assert {part.name for part in told} == {"restoring adapters"}
    assert told[-1].state == "failed", "the engine that was to hold them has died"


async def test_pins_come_first_then_the_most_recently_used() -> None:
    engine = Engine()
    for name in "abcd":
        engine.request(name)
    engine.request("b")
    engine.residents.pinned(source("a"), "device")
    engine.loaded("a", pinned=True)
    changes = engine.die()
    assert {c.weights_digest for c in changes} == set("abcd")
    assert all((c.tier, c.pinned, c.device_bytes) == ("disk", False, 0) for c in changes)
    assert engine.residents.tier("a") is None
    assert await engine.restart() == ["a", "b", "d", "c"]
    assert engine.asked[0] == ("a", "device", True)
    assert engine.asked[1] == ("b", "device", False)
    engine.die()
    assert (await engine.restart())[0] == "a", "the pin outlives a second death"


async def test_what_was_in_host_is_brought_back_there() -> None:
    engine = Engine()
    for name in "ab":
        engine.request(name)
    engine.residents.used(source("c"))
    engine.residents.update(
        ResidencyChanged("c", "host", False, SIZE, 3 * SIZE, 2 * SIZE, 3, 2)
    )
    engine.die()
    await engine.restart()
    assert engine.asked == [
        ("c", "host", False),
        ("b", "device", False),
        ("a", "device", False),
    ]


async def test_what_a_request_brought_back_is_not_asked_for_again() -> None:
    engine = Engine()
    for name in "abc":
        engine.request(name)
    engine.die()
    engine.request("b")
    assert await engine.restart() == ["c", "a"]


async def test_nothing_is_pushed_out_for_it() -> None:
    engine = Engine(device_budget=3 * SIZE)
    for name in "abc":
        engine.request(name)
    engine.die()
    engine.request("new")
    assert await engine.restart() == ["c", "b"]


async def test_requests_that_wait_for_an_adapter_go_first() -> None:
    engine = Engine()
    engine.request("a")
    engine.die()
    engine.residents.occupancy(Occupancy(0, 1, 1, 0, 1))
    engine.residents.restore(itemsize=1)
    task = engine.residents.restoring
    assert task is not None
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.asked == []
    assert not task.done()
    engine.residents.occupancy(Occupancy(1, 0, 0, 0, 1))
    await task
    assert engine.asked == [("a", "device", False)]


async def test_an_adapter_that_is_gone_is_skipped() -> None:
    engine = Engine(gone=frozenset("b"))
    for name in "abc":
        engine.request(name)
    engine.die()
    assert await engine.restart() == ["c", "a"]


async def test_an_evicted_or_unpinned_one_is_left_as_the_operator_wants_it() -> None:
    engine = Engine()
    for name in "ab":
        engine.request(name)
        engine.residents.pinned(source(name), "device")
        engine.loaded(name, pinned=True)
    engine.die()
    with engine.residents.giving_up("a", unpin=True):
        pass
    engine.residents.unpinned("b")
    await engine.restart()
    assert engine.asked == [("b", "device", False)]


def pinned_and_lost(*names: str) -> Engine:
    engine = Engine()
    for name in names:
        engine.request(name)
        engine.residents.pinned(source(name), "device")
        engine.loaded(name, pinned=True)
    engine.die()
    return engine


async def test_a_pin_outlives_evictions_that_are_refused_while_there_is_no_engine() -> None:
    engine = pinned_and_lost("a")
    with pytest.raises(AdapterPinned), engine.residents.giving_up("a", unpin=False):
        pytest.fail("a running engine refuses it")
    with pytest.raises(EngineFailed), engine.residents.giving_up("a", unpin=True):
        raise EngineFailed("there is none")
    await engine.restart()
    assert engine.asked == [("a", "device", True)]


async def test_what_an_operator_evicts_meanwhile_is_restored_only_if_that_is_refused() -> None:
    engine = pinned_and_lost("a", "b")

    async def evict() -> None:
        with engine.residents.giving_up("a", unpin=True):
            assert await engine.restart() == ["b"]
            raise AdapterInUse("a request is faster than the eviction")

    with pytest.raises(AdapterInUse):
        await evict()
    task = engine.residents.restoring
    assert task is not None
    await task
    assert engine.asked == [("b", "device", True), ("a", "device", True)]
    with engine.residents.giving_up("a", unpin=False):
        pass  # it is there: the engine says whether it may go


async def test_the_client_asks_about_lost_pins_before_it_asks_the_engine() -> None:
    client = EngineClient(EngineConfig("", "", "", ""), max_queue=1)
    client.expect_residents([residents.Resident(source("a"), "device", "device")])
    with pytest.raises(AdapterPinned):
        await client.evict("a", mode="drain", unpin=False)
    with pytest.raises(ModelLoading):
        await client.evict("a", mode="drain", unpin=True)
    with pytest.raises(AdapterPinned):
        await client.evict("a", mode="drain", unpin=False)


async def test_one_that_kills_the_engine_is_left_after_two_tries() -> None:
    engine = Engine()
    for name in "ab":
        engine.request(name)
    engine.die()
    engine.dies_of = "b"
    asked = []
    for _ in range(4):
        asked.append(await engine.restart())
        engine.there.clear()
    assert asked == [["b"], ["b"], ["a"], []], "a is there: nothing is lost in the fourth"


async def test_what_was_used_once_is_forgotten_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residents, "MOST_KNOWN", 3)
    engine = Engine()
    engine.request("kept")
    for name in "abcdef":
        engine.residents.used(source(name))
    assert engine.residents.known == 3
    assert engine.residents.tier("kept") is not None


async def test_a_pin_that_is_not_back_yet_outlives_another_death() -> None:
    """A request was faster than the restoring of the pin, so the copy there has none."""
    engine = pinned_and_lost("a")
    engine.request("a")
    engine.die()
    await engine.restart()
    assert engine.asked == [("a", "device", True)]


# ------------------------------------------------------------- restarts of the server


def held(engine: Engine) -> list[tuple[str, str, str | None]]:
    return [(r.source.name, r.tier, r.pin) for r in engine.residents.snapshot()]


async def test_what_the_server_held_is_brought_back_by_the_next_one() -> None:
    before = Engine()
    for name in "abcd":
        before.request(name)
    before.request("b")
    before.residents.pinned(source("a"), "device")
    before.loaded("a", pinned=True)
    before.residents.pinned(source("h"), "host")
    before.residents.update(ResidencyChanged("h", "host", True, SIZE, 50, 40, 5, 4))
    assert held(before) == [
        ("h", "host", "host"),
        ("a", "device", "device"),
        ("b", "device", None),
        ("d", "device", None),
        ("c", "device", None),
    ]
    after = Engine(gone=frozenset("d"))
    after.residents.expect(before.residents.snapshot())
    assert held(after) == held(before), "a server that dies before it has them forgets none"
    assert await after.restart() == ["h", "a", "b", "c"], "pins, then by last use"
    assert after.asked[:2] == [("h", "host", True), ("a", "device", True)]
    assert [name for name, _, _ in held(after)] == ["h", "a", "b", "c"], "in the same order"


async def test_what_is_expected_is_brought_back_within_the_budgets_of_this_start() -> None:
    after = Engine(device_budget=2 * SIZE)
    after.residents.expect(
        [residents.Resident(source(name), "device", None) for name in "abcd"]
    )
    assert await after.restart() == ["a", "b"]
    assert [name for name, _, _ in held(after)] == ["a", "b"]
    other = Engine(device_budget=4 * SIZE - 1)
    other.residents.expect(after.residents.snapshot())
    other.residents.restore(itemsize=3)  # another dtype: each takes three times as much
    task = other.residents.restoring
    assert task is not None
    await task
    assert [name for name, _, _ in other.asked] == ["a"]


async def test_the_version_tells_when_there_is_something_to_write_down() -> None:
    engine = Engine()
    versions = [engine.residents.version]

    def changed() -> bool:
        versions.append(engine.residents.version)
        return versions[-1] != versions[-2]

    engine.residents.used(source("a"))
    assert not changed(), "asked for, not in memory"
    engine.loaded("a")
    assert changed()
    engine.request("a")
    assert not changed(), "the order alone"
    engine.residents.pinned(source("a"), "device")
    assert changed()
    engine.loaded("a", pinned=True)
    assert changed()
    engine.loaded("a", pinned=False)
    assert changed()
    assert held(engine) == [("a", "device", None)]
    engine.die()
    assert held(engine) == [("a", "device", None)], "it is going to be back"
    with engine.residents.giving_up("a", unpin=False):
        assert changed()
    assert held(engine) == []


async def test_a_lower_budget_is_refused_while_pins_that_need_it_are_not_back() -> None:
    engine = pinned_and_lost("a", "b")
    engine.residents.restore(itemsize=1)
    with refused(AdapterBudgetExceeded, tier="device", cause="restoring"):
        engine.residents.check_budgets(host=None, device=2 * SIZE - 1)
    engine.residents.check_budgets(host=None, device=2 * SIZE)
    task = engine.residents.restoring
    assert task is not None
    await task
    engine.residents.check_budgets(host=None, device=1)  # the engine knows, and will say


async def test_what_is_not_back_yet_is_not_forgotten_for_what_is_used_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residents, "MOST_KNOWN", 3)
    engine = pinned_and_lost("a", "b")
    for name in "cdefg":
        engine.residents.used(source(name))
    assert await engine.restart() == ["b", "a"]
    assert {name: pinned for name, _, pinned in engine.asked} == {"a": True, "b": True}
