"""A process that reads adapters for the engine, at low priority.

A worker thread in the engine would sometimes hold the GIL at low priority, and the step
would wait for a thread that gets no CPU time. It could also end the engine: truncating a
file while it is mapped kills the process that reads it.

They exchange frames on a socket (`wire.frames`). The answer to a `Load` is `Begun`,
followed by the file descriptor of the memory for the run, and then `Loaded`; or only
`Loaded` with an error. So the engine can prepare its side while the run is being filled,
but must not use any of the run before `Loaded`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.adapter import LoraModule, Projection
from veneer_registry.errors import AdapterBudgetExceeded, InternalError, VeneerError

from veneer_server.adapters.pages import make_ready, map_pages, memory
from veneer_server.adapters.reading import Dtype, read_run
from veneer_server.system.priority import lower_priority
from veneer_server.wire.frames import framed, read_frame

__all__ = [
    "NO_MEMORY",
    "Begun",
    "Load",
    "Loaded",
    "Setup",
    "main",
]

NO_MEMORY: Final = (
    "there is not enough memory to load the adapter; lower the adapter budgets, or stop "
    "other processes that use memory, and retry"
)
_MOST_SPARE: Final = 32 << 20
"""Most bytes that a loader keeps ready for the next load."""
_PAUSE_S: Final = 0.0025
"""Pause before making each piece ready."""


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """The first frame: what all loads have in common."""

    shapes: dict[Projection, tuple[int, int]]
    num_layers: int
    dtype: Dtype


class Load(msgspec.Struct, frozen=True, array_like=True):
    """Read the weights in ``folder``, which must have ``digest``."""

    folder: str
    digest: str


class Begun(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What is being read.

    Attributes:
        modules: (layer, projection, rank, scaling) of each.
        size: bytes of the run.
    """

    modules: list[tuple[int, Projection, int, float]]
    size: int


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The end of a load: the run is complete and matches its digest, unless there is an error.

    Attributes:
        stages: seconds of each stage.
        error: reason, message and metadata of a `VeneerError`, or None.
    """

    stages: dict[str, float]
    error: tuple[str, str, dict[str, str]] | None = None


class _Spare:
    """Memory for the next load, made ready after the last one, since allocating and zeroing
    pages takes as long as filling them.

    This is done piece by piece, each after a pause, because a load is immediately followed
    by the prompt that waited for it: all pages in one go make that 12 ms slower.
    """

    def __init__(self) -> None:
        self._fd = -1
        self._size = 0
        self._ready = 0

    def take(self, size: int) -> tuple[int, int]:
        """A file descriptor of ``size`` zeroed bytes, and how many of them are ready."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return memory(size), 0
        os.ftruncate(fd, size)
        return fd, min(self._ready, size)

    def want(self, size: int) -> None:
        """Have ``size`` bytes ready soon, unless that is too much to keep idle."""
        if self._fd < 0 and 0 < size <= _MOST_SPARE:
            self._fd, self._size, self._ready = memory(size), size, 0

    @property
    def complete(self) -> bool:
        return self._fd < 0 or self._ready >= self._size

    def prepare(self) -> None:
        """Make one more piece ready."""
        self._ready = make_ready(self._fd, self._size, self._ready)


class _Job:
    """One load; owns the memory until it is handed over."""

    def __init__(self, spare: _Spare, connection: socket.socket) -> None:
        self.size = 0
        self._spare = spare
        self._connection = connection

    def begin(self, modules: Sequence[LoraModule], size: int) -> memoryview:
        """Memory of ``size`` bytes, which the engine has received too."""
        self.size = size
        fd, ready = self._spare.take(size)
        try:
            while ready < size:
                ready = make_ready(fd, size, ready)
            facts = [(m.layer, m.projection, m.rank, m.scaling) for m in modules]
            self._connection.sendall(framed(msgspec.msgpack.encode(Begun(facts, size))))
            socket.send_fds(self._connection, [b"\0"], [fd])
            return map_pages(fd, size)
        finally:
            os.close(fd)


def _load(setup: Setup, load: Load, job: _Job) -> Loaded:
    try:
        stages = read_run(
            Path(load.folder),
            load.digest,
            setup.shapes,
            setup.num_layers,
            setup.dtype,
            job.begin,
        )
    except VeneerError as error:
        return Loaded({}, (error.reason, error.message, error.metadata))
    except MemoryError:
        return Loaded({}, (AdapterBudgetExceeded.reason, NO_MEMORY, {}))
    except BrokenPipeError:
        raise
    except Exception as error:
        why = f"the adapter could not be loaded ({type(error).__name__}: {error}); retry"
        return Loaded({}, (InternalError.reason, why, {}))
    return Loaded(stages)


def main() -> None:
    """Serve loads until the engine ends."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority()
    connection = socket.socket(fileno=int(sys.argv[1]))
    first = read_frame(connection)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    spare = _Spare()
    while True:
        while not spare.complete and not select.select([connection], [], [], _PAUSE_S)[0]:
            spare.prepare()
        if (body := read_frame(connection)) is None:
            return
        job = _Job(spare, connection)
        try:
            loaded = _load(setup, msgspec.msgpack.decode(body, type=Load), job)
            connection.sendall(framed(msgspec.msgpack.encode(loaded)))
        except BrokenPipeError:
            return
        spare.want(job.size)


if __name__ == "__main__":
    main()
