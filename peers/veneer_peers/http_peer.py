"""A peer that is an HTTP server of its own: started, awaited, and ended whole.

Each peer has a file with what is its own: the command line, the environment, and how
a request names an adapter. Requests are sent elsewhere; here are only processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shlex
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from veneer_loadtest.report import without_folders

from veneer_peers.errors import PeerError

__all__ = ["HttpPeer", "free_port"]

_HOST: Final = "127.0.0.1"
_LOG_TAIL: Final = 12
_POLL_S: Final = 0.1
GRACE_S: Final = 10.0
"""vLLM's front waits for its engine process; two seconds are usual."""


class HttpPeer:
    """A server in a process group of its own; use it in an ``async with``.

    It is ready inside: `url` answers. On leaving the whole group is asked to end,
    and what is left after a few seconds is killed.

    Attributes:
        name: of the system, as results show it.
        url: where it listens, without a path.
        command: how it was started, for a result: what of the environment was set, then
            the command line, shell-quoted, paths without their folders.
        versions: of what it consists of.
    """

    def __init__(
        self,
        *,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        port: int,
        ready_path: str,
        request_fields: Callable[[str], dict[str, object]],
        versions: Mapping[str, str],
        log: Path,
        start_timeout_s: float,
    ) -> None:
        """Nothing is started yet.

        Args:
            arguments: the command line, from the program on; it must name ``port``.
            environment: set in addition to this process's own.
            ready_path: answered with 200 once the server can take requests.
            request_fields: see the method.
            log: file for its output; written anew.
            start_timeout_s: longest wait for that answer.
        """
        self.name = name
        self.url = f"http://{_HOST}:{port}"
        settings = (
            f"{key}={shlex.quote(without_folders(v))}" for key, v in environment.items()
        )
        self.command = " ".join((*settings, shlex.join(map(without_folders, arguments))))
        self.versions = dict(versions)
        self._arguments = tuple(arguments)
        self._environment = dict(environment)
        self._port = port
        self._ready_path = ready_path
        self._request_fields = request_fields
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process

    def request_fields(self, adapter: str) -> dict[str, object]:
        """What of a completion request's JSON body chooses ``adapter``; "" is the base.

        Raises:
            PeerError: it was not started with that adapter and cannot load one later.
        """
        return self._request_fields(adapter)

    async def __aenter__(self) -> Self:
        """Start, and return when it is ready.

        Raises:
            PeerError: it cannot be started, ended, or was not ready in time; shows the
                end of its log.
        """
        try:
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    env={**os.environ, **self._environment},
                    # A group to end as one. Ctrl-C in a terminal goes to the parent only.
                    start_new_session=True,
                )
        except OSError as error:
            raise PeerError(
                f"{self.name} could not be started: {error}",
                metadata={"peer": self.name, "cause": "not_started"},
            ) from error
        try:
            await self._wait_until_ready()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    async def _wait_until_ready(self) -> None:
        ended = asyncio.ensure_future(self._process.wait())
        try:
            async with asyncio.timeout(self._start_timeout_s):
                # Neither server can call back when it is ready, so it is asked.
                while not await self._is_ready():
                    await asyncio.wait((ended,), timeout=_POLL_S)
                    if ended.done():
                        status = ended.result()
                        raise self._failed(
                            f"ended with status {status} before it was ready",
                            {"cause": "ended", "status": str(status)},
                        )
        except TimeoutError:
            raise self._failed(
                f"was not ready within {self._start_timeout_s:g} s", {"cause": "not_ready"}
            ) from None
        finally:
            ended.cancel()

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection(_HOST, self._port)
        except OSError:
            return False
        try:
            writer.write(f"GET {self._ready_path} HTTP/1.0\r\nHost: {_HOST}\r\n\r\n".encode())
            await writer.drain()
            return (await reader.readline()).split()[1:2] == [b"200"]
        except (OSError, ValueError):  # it hung up, or a line without an end
            return False
        finally:
            writer.close()

    async def _end(self) -> None:
        # It holds nothing worth saving, but its children end more cleanly by its hand.
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), GRACE_S)
        finally:  # a second Ctrl-C too
            self._signal(signal.SIGKILL)
        await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        # The group outlives its first process for as long as any child does.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _failed(self, what: str, metadata: Mapping[str, str]) -> PeerError:
        lines = self._log.read_text("utf-8", errors="replace").splitlines()[-_LOG_TAIL:]
        return PeerError(
            f"{self.name} {what}; its log ends:\n" + "\n".join(lines),
            metadata={"peer": self.name, **metadata},
        )


def free_port() -> int:
    """A loopback port that nobody listens on, below those that the system gives away.

    One that the system chose and that was closed again may be the local end of the next
    connection that anyone makes, before the peer binds it.
    """
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return port
