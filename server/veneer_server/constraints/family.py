"""The engine's side of the constraint processes: starts the parent and requests forks."""

from __future__ import annotations

import contextlib
import mmap
import os
import selectors
import socket
import subprocess
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
from veneer_registry.child_python import child_python

from veneer_server.constraints.frames import (
    LONGEST,
    BeginMatching,
    FromControl,
    Kill,
    MatchingSetup,
    Renice,
    Reply,
    Role,
    ToControl,
    pair,
    receive,
)

MARKER_BYTES: Final = 8

_MODULE: Final = "veneer_server.constraints.process"
_NOTES_READ: Final = 2000


class MatcherChild:
    """A forked process, from the request for it to its end.

    Args:
        tell_parent: sends the parent a message. Only the parent signals the child, because
            its process id could have been reused by the time we did.

    Attributes:
        connection: non-blocking socket to the child.
        killed_for: why we ended it; empty if we did not.
    """

    def __init__(
        self,
        number: int,
        role: Role,
        connection: socket.socket,
        tell_parent: Callable[[ToControl], None],
    ) -> None:
        self.number = number
        self.role = role
        self.connection = connection
        self._tell_parent = tell_parent
        self.killed_for = ""
        self.backlog: deque[bytes] = deque()
        """Packets that the socket had no room for."""
        self._notes = os.memfd_create("veneer-notes")
        self._marker = os.memfd_create("veneer-marker")
        os.ftruncate(self._marker, MARKER_BYTES)
        self._shared = mmap.mmap(self._marker, MARKER_BYTES)

    @property
    def descriptors(self) -> tuple[int, int]:
        """Descriptors for the child: the file for its standard error, and its marker."""
        return self._notes, self._marker

    def send(self, message: Reply) -> None:
        """Never blocks; if the socket is full, the message waits for `flush`."""
        self.backlog.append(msgspec.msgpack.encode(message))
        self.flush()

    def flush(self) -> None:
        """Send waiting messages. Does nothing if the child has ended."""
        try:
            while self.backlog:
                self.connection.send(self.backlog[0])
                self.backlog.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.backlog.clear()  # its end is about to be reported

    def kill(self, reason: str) -> None:
        """Have the parent end it."""
        if not self.killed_for:
            self.killed_for = reason
            self._tell_parent(Kill(self.number))

    def yield_to_others(self) -> None:
        """Lower its priority."""
        self._tell_parent(Renice(self.number))

    @property
    def job(self) -> int:
        """The sequence that it last worked for; 0 if none."""
        return int.from_bytes(self._shared[:MARKER_BYTES], "little", signed=True)

    @property
    def notes(self) -> str:
        """The beginning of its standard error."""
        return os.pread(self._notes, _NOTES_READ, 0).decode(errors="replace")

    @property
    def out_of_memory(self) -> bool:
        """Whether the library or Python reported that memory ran out. The process may then
        hang: a library that fails while reporting a panic deadlocks."""
        return "memory allocation" in self.notes or "MemoryError" in self.notes

    def close(self) -> None:
        """Release our resources for it."""
        self.connection.close()
        self._shared.close()
        os.close(self._notes)
        os.close(self._marker)


class MatcherFamily:
    """The parent process. Its children end with it."""

    def __init__(self, setup: MatchingSetup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray(LONGEST)
        self._count = 0
        self._control: socket.socket | None = None

    @property
    def control(self) -> socket.socket:
        """The connection to the parent process, which must have been started."""
        assert self._control is not None, "started first"
        return self._control

    def start(self) -> None:
        """Start the process without waiting for it. Raises OSError."""
        ours, theirs = pair()
        with theirs:
            self._process = subprocess.Popen(
                child_python("-m", _MODULE, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.send(msgspec.msgpack.encode(self._setup))
        self._control = ours

    def fork(self, role: Role) -> MatcherChild:
        """Request a child. The parent forks it later, or never if the parent has ended."""
        self._count += 1
        ours, theirs = pair()
        ours.setblocking(False)
        child = MatcherChild(self._count, role, ours, self._tell)
        with theirs:
            self._tell(BeginMatching(child.number, role), theirs.fileno(), *child.descriptors)
        return child

    def _tell(self, message: ToControl, *descriptors: int) -> None:
        """Never blocks. Few messages are in flight at once, so there is room for each."""
        if self._control is not None:
            with contextlib.suppress(OSError):  # its end is about to be noticed
                body = msgspec.msgpack.encode(message)
                socket.send_fds(self._control, [body], descriptors)

    def receive(self) -> FromControl | None:
        """Its next message; None once it has ended. Raises BlockingIOError if none is there."""
        return receive(self.control, self._buffer)  # type: ignore[return-value]

    def end(self) -> None:
        """End the process and its children."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Sockets:
    """The sockets that the watching thread waits on: each child, the parent, and `poke`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def poke(self) -> None:
        """Make `wait` return at once. Any thread may call this."""
        os.eventfd_write(self._wake, 1)

    def wait(self, timeout: float | None) -> list[tuple[MatcherChild | None, int]]:
        """The children that can be read or written, with the selector's mask; None is the
        parent."""
        found: list[tuple[MatcherChild | None, int]] = []
        for key, mask in self._selector.select(timeout):
            if key.fileobj == self._wake:
                os.eventfd_read(self._wake)
            else:
                found.append((key.data, mask))
        return found

    def add_child(self, child: MatcherChild) -> None:
        self._selector.register(child.connection, selectors.EVENT_READ, child)

    def add_parent(self, family: MatcherFamily) -> None:
        """Watch the parent; from now on `MatcherFamily.receive` does not block."""
        family.control.setblocking(False)
        self._selector.register(family.control, selectors.EVENT_READ)

    def has(self, child: MatcherChild) -> bool:
        return child.connection in self._selector.get_map()

    def remove(self, of: MatcherChild | MatcherFamily) -> None:
        """Does nothing if it was not added."""
        connection = of.connection if isinstance(of, MatcherChild) else of.control
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)

    def write_too(self, child: MatcherChild) -> None:
        """Also wait for a child's full socket to become writable."""
        try:
            key = self._selector.get_key(child.connection)
        except KeyError:
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.backlog else 0)
        if key.events != wanted:
            self._selector.modify(child.connection, wanted, child)

    def close(self) -> None:
        os.close(self._wake)
        self._selector.close()
