"""The loader: a process that reads adapters for the engine, at low priority.

A worker thread in the engine would sometimes hold the GIL at low priority, and the step
would wait for a thread that gets no CPU time. It could also end the engine: truncating a
file while it is mapped kills the process that reads it.

Engine and loader exchange frames on a socket (`wire.frames`). The answer to a `LoadRequest` is
`Begun`, followed by the file descriptor of the memory for the run, and then `LoadDone`; or only
`LoadDone` with an error. So the engine can prepare its side while the run is being filled,
but must not use any of the run before `LoadDone`.
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
from veneer_registry.causes import cause_of
from veneer_registry.errors import (
    AdapterBudgetExceeded,
    InternalError,
    VeneerError,
)

from veneer_server.adapters.failure import Failure
from veneer_server.adapters.pages import (
    SEGMENT,
    make_ready,
    map_pages,
    memory,
    next_range,
    place,
    release,
)
from veneer_server.adapters.reading import Dtype, read_run
from veneer_server.system.priority import lower_priority
from veneer_server.wire.frames import framed, read_frame

NO_MEMORY: Final = (
    "not enough memory to load the adapter; lower the adapter budgets, or stop other "
    "processes that use memory, and retry"
)
_MOST_SPARE: Final = 32 << 20
"""Most bytes that a loader keeps ready for the next load."""
_PAUSE_S: Final = 0.0025
"""Pause before making each piece ready."""


class LoaderSetup(msgspec.Struct, frozen=True, array_like=True):
    """The first frame: settings of all loads.

    Attributes:
        shapes: projection -> (out_features, in_features).
        dtype: dtype of the runs.
        paired: see `Layout`.
        segment_bytes: see `SEGMENT`.
    """

    shapes: dict[Projection, tuple[int, int]]
    num_layers: int
    dtype: Dtype
    segment_bytes: int = SEGMENT
    paired: bool = False


class LoadRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request to read the weights in ``folder``, which must have ``digest``."""

    folder: str
    digest: str


class Begun(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A load has begun, into this memory.

    Attributes:
        modules: (layer, projection, rank, scaling) of each module.
        size: bytes of the run.
        segment: number of the file in memory that holds the run; its descriptor follows.
        segment_size: bytes of that file.
        offset: where the run begins in the file.
    """

    modules: list[tuple[int, Projection, int, float]]
    size: int
    segment: int
    segment_size: int
    offset: int


class LoadDone(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The end of a load: the run is complete and matches its digest, unless there is an error.

    Attributes:
        stages: seconds of each stage.
        error: why it failed, or None.
    """

    stages: dict[str, float]
    error: Failure | None = None


class _Segments:
    """Files in memory, used one after the other; loads fill their ranges (`pages`).

    Pages for the next load are made ready after the last one, since allocating and zeroing
    them takes as long as filling them. This is done piece by piece, each after a pause, because
    the prompt that waited for a load follows immediately: making all pages ready in one go
    slows that prompt by 12 ms.

    Attributes:
        fd, number, size: descriptor, number and bytes of the current file; the number is 0
            before the first.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self.fd = -1
        self.number = 0
        self.size = 0
        self._next = 0
        """Where the next range begins."""
        self._ready = 0
        """Where the ready pages end."""
        self._wanted = 0
        """Where the ready pages should end."""
        self._taken = os.getpid()
        """Number of ranges so far, counted from a different number in each loader."""

    def take(self, size: int) -> int:
        """Take ``size`` zeroed bytes with ready pages; return where they begin in the current
        file.

        Raises:
            MemoryError: there is not enough memory.
        """
        self._have_room(next_range(size))
        begin = self._next
        at = begin + place(self._taken, size)
        end = at + size
        try:
            while self._ready < end:
                self._ready = make_ready(self.fd, end, self._ready)
        except BaseException:
            release(self.fd, begin, self._ready)
            self._ready = self._wanted = begin
            raise
        release(self.fd, end, self._ready)
        self._next = self._ready = self._wanted = next_range(end)
        self._taken += 1
        return at

    def want(self, size: int) -> None:
        """Plan to have ``size`` bytes ready, unless that is too much to keep idle."""
        if 0 < size <= _MOST_SPARE:
            self._have_room(next_range(size))
            self._wanted = self._next + place(self._taken, size) + size

    @property
    def complete(self) -> bool:
        return self._ready >= self._wanted

    def prepare(self) -> None:
        """Make one more piece ready."""
        self._ready = make_ready(self.fd, self._wanted, self._ready)

    def _have_room(self, size: int) -> None:
        if self._next + size <= self.size:
            return
        whole = max(self._least, size)
        fd = memory(whole)
        if self.fd >= 0:
            release(self.fd, self._next, self._ready)
            os.close(self.fd)
        self.fd, self.number, self.size = fd, self.number + 1, whole
        self._next = self._ready = self._wanted = 0


class _Job:
    """One load: takes its memory and announces it to the engine."""

    def __init__(self, segments: _Segments, connection: socket.socket) -> None:
        self.size = 0
        self._segments = segments
        self._connection = connection

    def begin(self, modules: Sequence[LoraModule], size: int) -> memoryview:
        """Return memory of ``size`` bytes, after passing it to the engine too."""
        self.size = size
        segments = self._segments
        offset = segments.take(size)
        facts = [(m.layer, m.projection, m.rank, m.scaling) for m in modules]
        begun = Begun(facts, size, segments.number, segments.size, offset)
        self._connection.sendall(framed(msgspec.msgpack.encode(begun)))
        socket.send_fds(self._connection, [b"\0"], [segments.fd])
        return map_pages(segments.fd, size, offset)


def _load(setup: LoaderSetup, load: LoadRequest, job: _Job) -> LoadDone:
    try:
        stages = read_run(
            Path(load.folder),
            load.digest,
            setup.shapes,
            setup.num_layers,
            setup.dtype,
            job.begin,
            paired=setup.paired,
        )
    except VeneerError as error:
        return LoadDone({}, Failure.of(error))
    except MemoryError:
        return LoadDone({}, Failure.of(AdapterBudgetExceeded(NO_MEMORY)))
    except BrokenPipeError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {cause_of(error)}"
        why = f"the adapter could not be loaded ({cause}); retry"
        return LoadDone({}, Failure.of(InternalError(why)))
    return LoadDone(stages)


def main() -> None:
    """Serve loads until the engine ends."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority()
    connection = socket.socket(fileno=int(sys.argv[1]))
    first = read_frame(connection)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=LoaderSetup)
    segments = _Segments(setup.segment_bytes)
    while True:
        while not segments.complete and not select.select([connection], [], [], _PAUSE_S)[0]:
            segments.prepare()
        if (body := read_frame(connection)) is None:
            return
        job = _Job(segments, connection)
        try:
            loaded = _load(setup, msgspec.msgpack.decode(body, type=LoadRequest), job)
            connection.sendall(framed(msgspec.msgpack.encode(loaded)))
        except BrokenPipeError:
            return
        segments.want(job.size)


if __name__ == "__main__":
    main()
