"""Keeps one engine process running: start, heartbeat, restart with backoff, stop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec
from veneer_registry.errors import EngineFailed, VeneerError

from veneer_server.engine_client.connection import EngineConnection
from veneer_server.wire.messages import (
    EngineConfig,
    EngineInfo,
    FromEngine,
    Ping,
    Pong,
    StepDone,
    Stop,
    ToEngine,
)

log = logging.getLogger(__name__)

_News = TypeVar("_News")

PING_SECONDS = 1.0
SILENCE_SECONDS = 5.0
"""An engine that does not answer a ping for this long counts as unhealthy; see
`Supervisor.silence_limit` for a slow machine."""
HANG_FACTOR = 12
"""A silent engine is killed after this many times the silence limit. The factor is large
because the measurements before serving do not cover a machine that gets much busier later, or
many large adapters."""
FIRST_BACKOFF, LAST_BACKOFF = 0.2, 30.0
STEADY_SECONDS = 60.0
"""An engine that ran this long was healthy: its failure resets the backoff."""


class Supervisor:
    """Owns the engine process. All methods belong to one asyncio event loop.

    Args:
        on_message: called with each message of the engine except pongs, in order.
        on_up: called when the engine has been started or restarted.
        on_down: called when the engine has ended, with the error for everything it was running.
        on_health: called when `healthy` has changed.

    Attributes:
        starts: how often the engine process was started.
        healthy: whether the process is up and its step loop answered the last ping in time.
        connection: connection to the running process, if any.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_message: Callable[[FromEngine], None],
        on_up: Callable[[EngineInfo], None],
        on_down: Callable[[VeneerError], None],
        on_health: Callable[[bool], None],
    ) -> None:
        self.config = config
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._on_health = on_health
        self.starts = 0
        self.healthy = False
        self.connection: EngineConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._pings = itertools.count(1)
        self._heard = 0.0
        self._longest_step = 0.0

    @property
    def started(self) -> bool:
        """Whether the first start succeeded. If so and there is no process, the engine is
        restarting or stopped."""
        return self._task is not None

    @property
    def silence_limit(self) -> float:
        """Seconds without an answer after which the engine counts as unhealthy: more than
        `SILENCE_SECONDS` if one step may take longer, judging by its measurements before
        serving or by recent steps."""
        connection = self.connection
        planned = 0.0 if connection is None else connection.info.longest_step_seconds
        return max(SILENCE_SECONDS, 4 * self._longest_step, planned)

    async def start(self) -> None:
        """Start the process and wait until it has loaded the base model.

        Raises:
            EngineFailed: the process ended before it was ready; its log on stderr says why.
        """
        connection = await self._launch()
        self._task = asyncio.create_task(self._supervise(connection), name="engine")

    async def stop(self) -> None:
        """End the process for good. Idempotent."""
        self._set_health(False)
        self.write(Stop())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        _tell(self._on_down, EngineFailed("the server is stopping"))
        await self._bury()

    def reconfigure(self, **changes: int) -> None:
        """Change fields of the `EngineConfig`, from the next start of the process on."""
        self.config = msgspec.structs.replace(self.config, **changes)

    def write(self, message: ToEngine) -> None:
        """Send a message, or drop it if there is no process."""
        if self.connection is not None:
            self.connection.write(message)

    # ------------------------------------------------------------------- internals

    async def _launch(self) -> EngineConnection:
        self.starts += 1
        connection = await EngineConnection.open(self.config)
        self.connection = connection
        self._heard = asyncio.get_running_loop().time()
        self._longest_step = 0.0
        self._on_up(connection.info)
        self._set_health(True)
        return connection

    async def _supervise(self, connection: EngineConnection) -> None:
        """Serve the process; whenever it dies, report that and start another."""
        loop = asyncio.get_running_loop()
        backoff = FIRST_BACKOFF
        while True:
            began = loop.time()
            await self._serve(connection)
            if loop.time() - began > STEADY_SECONDS:
                backoff = FIRST_BACKOFF
            self._set_health(False)
            await self._bury()
            _tell(
                self._on_down,
                EngineFailed(
                    "the engine process ended and is restarting: retry",
                    retry_after_s=max(2.0, backoff),
                ),
            )
            connection, backoff = await self._restart(backoff)

    async def _restart(self, backoff: float) -> tuple[EngineConnection, float]:
        """Start a new process, after one or more backoffs, each twice as long as the last.
        Also return the next backoff, in case this process fails soon."""
        while True:
            log.error("engine process ended; restarting in %.1f s", backoff)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, LAST_BACKOFF)
            try:
                return await self._launch(), backoff
            except EngineFailed as failure:
                log.error("%s", failure)
            except Exception:
                # Catch everything: whatever the cause, the next attempt may succeed.
                log.exception("the engine could not be started")
                await self._bury()

    async def _serve(self, connection: EngineConnection) -> None:
        pinger = asyncio.create_task(self._ping(connection), name="engine-ping")
        try:
            async for message in connection.messages():
                if isinstance(message, Pong):
                    self._heard = asyncio.get_running_loop().time()
                    continue
                if isinstance(message, StepDone):
                    self._longest_step = max(message.seconds, 0.9 * self._longest_step)
                _tell(self._on_message, message)
        except EngineFailed as failure:
            log.error("%s: killing the engine", failure)
            connection.kill()
        finally:
            pinger.cancel()

    async def _ping(self, connection: EngineConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection.write(Ping(next(self._pings)))
            await asyncio.sleep(PING_SECONDS)
            silence = loop.time() - self._heard
            limit = self.silence_limit
            self._set_health(silence < limit)
            if silence > HANG_FACTOR * limit:
                log.error("engine unresponsive for %.0f s: killing it", silence)
                connection.kill()

    async def _bury(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.close()

    def _set_health(self, healthy: bool) -> None:
        if healthy != self.healthy:
            self.healthy = healthy
            _tell(self._on_health, healthy)


def _tell(listener: Callable[[_News], None], news: _News) -> None:
    """Call a listener. Its failure is only logged, so that the supervisor keeps running."""
    try:
        listener(news)
    except Exception:
        log.exception("a listener failed; the engine keeps running")
