"""A process that reads adapters for the engine, at low priority.

In the engine itself a worker would hold Python's lock now and then, at low priority:
the step would wait for a thread that gets no processor. It would also share the step's
fate: a file that is cut short while it is mapped ends the process that reads it.

Frames on a socket, as `engine.process` has them: a 4-byte length, then MessagePack. A
`Loaded` without an error is followed by a file descriptor, of memory that holds the run.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import sys
import tempfile
from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.adapter import Projection
from veneer_registry.errors import AdapterBudgetExceeded, InternalError, VeneerError

from veneer_server.lora.reading import Dtype, read_run
from veneer_server.priority import lower_priority

__all__ = ["NO_MEMORY", "Load", "Loaded", "Setup", "main", "read_frame", "write_frame"]

NO_MEMORY: Final = (
    "there is no memory to load the adapter; lower the adapter budgets, or stop what else "
    "takes memory, and retry"
)
_MOST_SPARE: Final = 32 << 20
"""Bytes that a loader keeps ready for the next load."""
_LENGTH: Final = struct.Struct(">I")


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """The first frame: what all loads have in common."""

    shapes: dict[Projection, tuple[int, int]]
    num_layers: int
    dtype: Dtype


class Load(msgspec.Struct, frozen=True, array_like=True):
    """Read this folder's weights, of that digest."""

    folder: str
    digest: str


class Loaded(msgspec.Struct, frozen=True, array_like=True):
    """The answer.

    Attributes:
        modules: (layer, projection, rank, scaling) of each.
        size: bytes of the run.
        error: reason, message and metadata of a `VeneerError`, or None.
    """

    modules: list[tuple[int, Projection, int, float]]
    stages: dict[str, float]
    size: int
    error: tuple[str, str, dict[str, str]] | None = None


def write_frame(connection: socket.socket, body: bytes) -> None:
    """Send one frame."""
    connection.sendall(_LENGTH.pack(len(body)) + body)


def read_frame(connection: socket.socket) -> bytes | None:
    """The body of the next frame; None where the other side has ended."""
    head = _exactly(connection, _LENGTH.size)
    return None if head is None else _exactly(connection, _LENGTH.unpack(head)[0])


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    body = bytearray()
    while len(body) < size:
        part = connection.recv(size - len(body))
        if not part:
            return None
        body += part
    return bytes(body)


def _memory(size: int) -> int:
    """A file descriptor of so many bytes of memory."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("veneer-adapter")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _mapped(fd: int, size: int) -> mmap.mmap:
    """All its pages at once, where the system can."""
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


class _Spare:
    """Memory for the next load, made ready after the last one: to find and zero pages takes
    as long as to fill them."""

    def __init__(self) -> None:
        self._fd = -1
        self._size = 0

    def take(self, size: int) -> int:
        """A file descriptor of so many zeroed bytes."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._size >= size:
            os.ftruncate(fd, size)
            return fd
        if fd >= 0:
            os.close(fd)
        return _memory(size)

    def prepare(self, size: int) -> None:
        """Have so many bytes ready, if they are not too many to keep idle."""
        if self._fd >= 0 or not 0 < size <= _MOST_SPARE:
            return
        self._fd, self._size = _memory(size), size
        _mapped(self._fd, size).close()


class _Job:
    """One load; owns the memory until it is handed over."""

    def __init__(self, spare: _Spare) -> None:
        self.fd = -1
        self.size = 0
        self._spare = spare

    def allocate(self, size: int) -> memoryview:
        self.fd, self.size = self._spare.take(size), size
        return memoryview(_mapped(self.fd, size))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _load(setup: Setup, load: Load, job: _Job) -> Loaded:
    try:
        modules, stages = read_run(
            Path(load.folder),
            load.digest,
            setup.shapes,
            setup.num_layers,
            setup.dtype,
            job.allocate,
        )
    except VeneerError as error:
        return Loaded([], {}, 0, (error.reason, error.message, error.metadata))
    except MemoryError:
        return Loaded([], {}, 0, (AdapterBudgetExceeded.reason, NO_MEMORY, {}))
    except Exception as error:
        why = f"the adapter could not be loaded ({type(error).__name__}: {error}); retry"
        return Loaded([], {}, 0, (InternalError.reason, why, {}))
    kept = [(m.layer, m.projection, m.rank, m.scaling) for m in modules]
    return Loaded(kept, stages, job.size)


def main() -> None:
    """Serve loads until the engine ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority()
    connection = socket.socket(fileno=int(sys.argv[1]))
    first = read_frame(connection)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    spare = _Spare()
    while (body := read_frame(connection)) is not None:
        job = _Job(spare)
        try:
            loaded = _load(setup, msgspec.msgpack.decode(body, type=Load), job)
            write_frame(connection, msgspec.msgpack.encode(loaded))
            if loaded.error is None:
                socket.send_fds(connection, [b"\0"], [job.fd])
        except BrokenPipeError:
            return
        finally:
            job.close()
        spare.prepare(job.size)


if __name__ == "__main__":
    main()
