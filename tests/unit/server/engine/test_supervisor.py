"""Restarts: each death in a row doubles the pause, a steady run resets it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator

import pytest
from veneer_registry.errors import EngineFailed, VeneerError
from veneer_server.engine import supervisor
from veneer_server.engine.connection import Connection
from veneer_server.engine.messages import (
    EngineConfig,
    EngineInfo,
    FromEngine,
    Occupancy,
    ToEngine,
)
from veneer_server.engine.supervisor import Supervisor

INFO = EngineInfo("cpu", "fake", "Fake", 1, 1, 64, 10, 100, 4, 0.0)


class FakeConnection:
    """FAKE: an engine process that says one thing and dies when it is told to."""

    opened = 0
    fails_to_load: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.info = INFO
        self.pid = 1
        self.closed = False
        self.dies = asyncio.Event()

    @classmethod
    async def open(cls, config: EngineConfig) -> FakeConnection:
        cls.opened += 1
        if cls.opened in cls.fails_to_load:
            raise EngineFailed("it ended while loading")
        return cls()

    def write(self, message: ToEngine) -> None:
        pass

    async def messages(self) -> AsyncIterator[FromEngine]:
        yield Occupancy(0, 0, 0, 0, 1)
        await self.dies.wait()

    def kill(self) -> None:
        self.dies.set()

    async def close(self) -> None:
        self.closed = True


class Watched:
    """A supervisor over fakes, and what it said."""

    def __init__(self) -> None:
        self.heard: list[FromEngine] = []
        self.up: asyncio.Queue[EngineInfo] = asyncio.Queue()
        self.down: list[VeneerError] = []
        self.health: list[bool] = []
        self.supervisor = Supervisor(
            EngineConfig("", "", "", ""),
            on_message=self.heard.append,
            on_up=self.up.put_nowait,
            on_down=self.down.append,
            on_health=self.health.append,
        )

    async def die(self) -> None:
        """Kill the engine and wait for the next one."""
        connection = self.supervisor.connection
        assert connection is not None
        connection.kill()
        await self.up.get()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    FakeConnection.opened, FakeConnection.fails_to_load = 0, frozenset()
    monkeypatch.setattr(supervisor, "Connection", FakeConnection)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(supervisor, "LAST_BACKOFF", 0.008)
    return Watched()


def pauses(caplog: pytest.LogCaptureFixture) -> list[float]:
    return [r.args[0] for r in caplog.records if "starting it again" in r.msg]  # type: ignore[index,misc]


async def test_repeated_deaths_wait_longer_up_to_a_limit(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    await watched.supervisor.start()
    await watched.up.get()
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            await watched.die()
    assert pauses(caplog) == [0.001, 0.002, 0.004, 0.008, 0.008]
    assert watched.supervisor.starts == 6
    assert watched.health == [True, *[False, True] * 5]
    assert all(isinstance(e, EngineFailed) and e.retry_after_s for e in watched.down)
    await watched.supervisor.stop()
    assert watched.health[-1] is False


async def test_a_steady_run_forgets_earlier_deaths(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.0)
    await watched.supervisor.start()
    await watched.up.get()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await watched.die()
    assert pauses(caplog) == [0.001, 0.001, 0.001]
    await watched.supervisor.stop()


async def test_a_start_that_fails_is_tried_again(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    FakeConnection.fails_to_load = frozenset({2, 3})
    await watched.supervisor.start()
    await watched.up.get()
    with caplog.at_level(logging.ERROR):
        await watched.die()
    assert pauses(caplog) == [0.001, 0.002, 0.004]
    assert len(watched.down) == 1
    await watched.supervisor.stop()


async def test_a_first_start_that_fails_is_an_error(watched: Watched) -> None:
    FakeConnection.fails_to_load = frozenset({1})
    with pytest.raises(EngineFailed):
        await watched.supervisor.start()
    assert not watched.supervisor.started
    await watched.supervisor.stop()


def test_the_fake_has_what_the_real_one_has() -> None:
    public = {n for n in dir(Connection) if re.match("[a-z]", n)}
    assert public <= {*dir(FakeConnection), "pid", "info"}
