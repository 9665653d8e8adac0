"""A peer that is an HTTP server: start its processes, wait for it to be ready, end them all.

Each peer's own module defines its command line, its environment, and how a request names an
adapter. This module only manages processes; requests of a load are sent elsewhere.
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

from veneer_loadtest.errors import PeerError
from veneer_loadtest.report import without_folders

_HOST: Final = "127.0.0.1"
_LOG_TAIL: Final = 12
_POLL_S: Final = 0.1
GRACE_S: Final = 10.0
"""vLLM's front end waits for its engine process, usually for two seconds."""


def _inherited() -> dict[str, str]:
    """Return this process's environment without OpenMP's variables, which may help Veneer and
    slow a peer: with ``OMP_WAIT_POLICY=passive`` llama.cpp decodes at a half or a third of its
    speed."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}


class HttpPeer:
    """A server in its own process group; use it in an ``async with``.

    Inside, the server is ready and answers at `url`. On exit the whole group gets SIGTERM,
    and processes left after `GRACE_S` get SIGKILL.

    Attributes:
        name: the system's name in results.
        url: URL at which it listens, without a path.
        command: how it was started, for a result: the variables that were set, then the
            command line, shell-quoted, with paths cut to their last names.
        versions: versions of its packages or its program.
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
        """Store the settings; the server is not started yet.

        Args:
            arguments: the command line, from the program on; it must name ``port``.
            environment: variables to set in addition to this process's own. OpenMP's variables
                are not inherited: how threads wait is the peer's choice.
            ready_path: path that the server answers with 200 once it can take requests.
            request_fields: see the method of that name.
            log: file for its output; overwritten.
            start_timeout_s: longest wait for the server to be ready.
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
        """Return the fields of a completion request's JSON body that choose ``adapter``; "" is
        the base.

        Raises:
            PeerError: the peer was not started with that adapter and cannot load one later.
        """
        return self._request_fields(adapter)

    async def __aenter__(self) -> Self:
        """Start the server; return when it is ready.

        Raises:
            PeerError: it could not be started, exited, or was not ready in time; the message
                shows the end of its log.
        """
        try:
            with self._log.open("wb") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    env={**_inherited(), **self._environment},
                    # Its own group, which can be signalled as one. Ctrl-C in a terminal then
                    # reaches only the parent.
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
                # Neither vLLM nor llama-server can report that it is ready, so poll it.
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
        except (OSError, ValueError):  # it closed the connection, or its line is too long
            return False
        finally:
            writer.close()

    async def _end(self) -> None:
        # It has no state to save, but on SIGTERM it ends its children more cleanly.
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), GRACE_S)
        finally:  # also after a second Ctrl-C
            self._signal(signal.SIGKILL)
        await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        # The group exists for as long as any of its processes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _failed(self, what: str, metadata: Mapping[str, str]) -> PeerError:
        lines = self._log.read_text("utf-8", errors="replace").splitlines()[-_LOG_TAIL:]
        return PeerError(
            f"{self.name} {what}; its log ends:\n" + "\n".join(lines),
            metadata={"peer": self.name, **metadata},
        )


def free_port() -> int:
    """Return a free loopback port, below the system's ephemeral ports.

    An ephemeral port that was bound and closed again may become the local end of any new
    connection before the peer binds it.
    """
    while True:
        port = random.randrange(15_000, 30_000)  # nosec B311
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return port
