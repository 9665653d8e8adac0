"""Restarts: each consecutive crash doubles the backoff, a stable run resets it."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable
from typing import ClassVar, TypeVar

import pytest
from veneer_registry.errors import EngineFailed, VeneerError
from veneer_server.engine_client import supervisor
from veneer_server.engine_client.connection import EngineConnection, next_frame
from veneer_server.engine_client.supervisor import Supervisor
from veneer_server.wire.frames import LENGTH
from veneer_server.wire.messages import (
    EngineConfig,
    EngineInfo,
    FromEngine,
    Occupancy,
    ToEngine,
)

from tests.refused import refused

T = TypeVar("T")
INFO = EngineInfo("cpu", "fake", "Fake", 1, 1, 64, 10, 100, 4, 0.0, 64)


class FakeConnection:
    """FAKE: an engine process that says one thing and dies when it is told to."""

    opened = 0
    fails_to_load: frozenset[int] = frozenset()
    failure: Exception = EngineFailed("it ended while loading")
    talks_nonsense: frozenset[int] = frozenset()
    made: ClassVar[list[FakeConnection]] = []

    def __init__(self) -> None:
        self.info = INFO
        self.pid = 1
        self.closed = False
        self.number = self.opened
        self.made.append(self)
        self.dies = asyncio.Event()

    @classmethod
    async def open(cls, config: EngineConfig) -> FakeConnection:
        cls.opened += 1
        if cls.opened in cls.fails_to_load:
            raise cls.failure
        return cls()

    def write(self, message: ToEngine) -> None:
        pass

    async def messages(self) -> AsyncIterator[FromEngine]:
        yield Occupancy(0, 0, 0, 0, 1)
        if self.number in self.talks_nonsense:
            raise EngineFailed("a frame that cannot be read")
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
        self.deaf: set[str] = set()
        """Listeners that fail, by name."""
        self.supervisor = Supervisor(
            EngineConfig("", "", "", ""),
            on_message=lambda message: self._note("message", self.heard.append, message),
            on_up=lambda info: self._note("up", self.up.put_nowait, info),
            on_down=lambda error: self._note("down", self.down.append, error),
            on_health=lambda healthy: self._note("health", self.health.append, healthy),
        )

    def _note(self, listener: str, note: Callable[[T], None], news: T) -> None:
        note(news)
        if listener in self.deaf:
            raise RuntimeError(f"the listener of {listener} failed")

    async def die(self) -> None:
        """Kill the engine and wait for the next one."""
        connection = self.supervisor.connection
        assert connection is not None
        connection.kill()
        await self.up.get()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    for name in ("opened", "fails_to_load", "failure", "talks_nonsense"):
        monkeypatch.setattr(FakeConnection, name, getattr(FakeConnection, name))
    monkeypatch.setattr(FakeConnection, "made", [])
    monkeypatch.setattr(supervisor, "EngineConnection", FakeConnection)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(supervisor, "LAST_BACKOFF", 0.008)
    return Watched()


def pauses(caplog: pytest.LogCaptureFixture) -> list[float]:
    return [r.args[0] for r in caplog.records if "restarting in" in r.msg]  # type: ignore[index,misc]


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


@pytest.mark.parametrize(
    "failure", [EngineFailed("it ended while loading"), OSError(errno.ENOMEM, "no memory")]
)
async def test_a_start_that_fails_is_tried_again(
    watched: Watched, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    FakeConnection.fails_to_load, FakeConnection.failure = frozenset({2, 3}), failure
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


@pytest.mark.parametrize("listener", ["message", "down", "health"])
async def test_a_listener_that_fails_takes_no_engine_down(
    watched: Watched, caplog: pytest.LogCaptureFixture, listener: str
) -> None:
    watched.deaf = {listener}
    await watched.supervisor.start()
    await watched.up.get()
    for starts in (2, 3):
        await watched.die()
        assert watched.supervisor.starts == starts
        assert watched.supervisor.healthy
    await watched.supervisor.stop()
    assert all(c.closed for c in FakeConnection.made)
    assert len(watched.down) == 3
    assert "listener" in caplog.text


async def test_an_engine_that_cannot_be_taken_up_again_is_closed_and_the_next_is_tried(
    watched: Watched,
) -> None:
    await watched.supervisor.start()
    await watched.up.get()
    watched.deaf = {"up"}
    await watched.die()
    watched.deaf = set()
    await watched.up.get()
    assert [c.closed for c in FakeConnection.made] == [True, True, False]
    await watched.supervisor.stop()


async def test_an_engine_that_talks_nonsense_is_replaced(watched: Watched) -> None:
    FakeConnection.talks_nonsense = frozenset({1})
    await watched.supervisor.start()
    await watched.up.get()
    await watched.up.get()
    assert [c.dies.is_set() for c in FakeConnection.made] == [True, False]
    assert [c.closed for c in FakeConnection.made] == [True, False]
    assert watched.supervisor.healthy
    await watched.supervisor.stop()


async def test_a_process_that_cannot_be_started_is_an_engine_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs: list[tuple[socket.socket, socket.socket]] = []
    right = socket.socketpair

    def noted() -> tuple[socket.socket, socket.socket]:
        pairs.append(right())
        return pairs[-1]

    async def no_memory(*command: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", noted)
        patch.setattr(asyncio, "create_subprocess_exec", no_memory)
        with refused(EngineFailed, cause="not_started", errno="ENOMEM"):
            await EngineConnection.open(EngineConfig("", "", "", ""))
    assert [s.fileno() for s in pairs[0]] == [-1, -1], "a file left open at each try"

    def no_files() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", no_files)
        with refused(EngineFailed, cause="not_started", errno="EMFILE"):
            await EngineConnection.open(EngineConfig("", "", "", ""))


async def test_a_frame_that_cannot_be_read_is_an_engine_that_failed() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(LENGTH.pack(3) + b"\xc1\xc1\xc1")
    with refused(EngineFailed, cause="bad_frame"):
        await next_frame(reader)


def test_the_fake_has_what_the_real_one_has() -> None:
    public = {n for n in dir(EngineConnection) if re.match("[a-z]", n)}
    assert public <= {*dir(FakeConnection), "pid", "info"}
