"""A child process and the socket to it: started on first use, and ended cleanly.

Uses neither torch nor numpy, since the front process has such children too.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Mapping
from typing import Final

from veneer_registry.child_python import child_python

from veneer_server.wire.frames import framed

TRIES: Final = 2
"""How many processes try a task: a process that ends, or takes too long, is replaced."""

_STOP_S: Final = 5.0
"""Seconds that a process may take to end before it is killed, and again after the kill."""


class ChildProcess:
    """One process. Not thread-safe.

    Args:
        module: the module that it runs, with the socket's file descriptor as its argument.
        setup: body of the first frame that it gets; None for no such frame.
        environment: its environment variables; None for those of this process.
    """

    def __init__(
        self,
        module: str,
        setup: bytes | None = None,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._environment = environment
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def start(self) -> socket.socket:
        """Return the connection to the process, starting it if it is not running."""
        if self._connection is not None:
            return self._connection
        ours, theirs = socket.socketpair()
        with theirs:
            command = child_python("-m", self._module, str(theirs.fileno()))
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=self._environment,
            )
        self._connection = ours
        if self._setup is not None:
            ours.sendall(framed(self._setup))
        return ours

    @property
    def pid(self) -> int | None:
        """The process id; None if it is not running."""
        return None if self._connection is None or self._process is None else self._process.pid

    def interrupt(self) -> None:
        """Make another thread stop waiting on the connection. The only method that any thread
        may call."""
        if (connection := self._connection) is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def end(self, *, kill: bool = False) -> str:
        """End the process, or clean up after it; return how it ended."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        process, self._process = self._process, None
        return _ended(process, kill=kill)

    def __del__(self) -> None:
        self.end()


def _ended(process: subprocess.Popen[bytes] | None, *, kill: bool) -> str:
    """Wait for a process to end; return how it ended."""
    if process is None:
        return "it could not be started"
    if kill:
        process.kill()
    for last in (False, True):
        try:
            code = process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            # The process is suspended, or blocked on a hanging disk.
            process.kill()
            if last:
                return f"process {process.pid} cannot be killed"
        else:
            break
    return f"signal {-code}" if code < 0 else f"status {code}"
