"""The engine's side of the loader processes: starts, uses and restarts them."""

from __future__ import annotations

import logging
import os
import queue
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import msgspec
import torch
from veneer_registry.adapter import LoraModule
from veneer_registry.errors import DiskFailed, InternalError, VeneerError

from veneer_server.adapters.child import TRIES, ChildProcess
from veneer_server.adapters.failure import Failure
from veneer_server.adapters.loader_process import (
    Begun,
    LoadDone,
    LoaderSetup,
    LoadRequest,
)
from veneer_server.adapters.pages import MappedSegment
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.layout import Layout
from veneer_server.wire.frames import framed, read_frame
from veneer_server.wire.messages import LOST, AdapterSource

log = logging.getLogger(__name__)

MODULE: Final = "veneer_server.adapters.loader_process"
"""The module that a loader runs."""
LIMIT_S: Final = 20.0
"""Seconds that a load may take, plus one for each `BYTES_A_SECOND`."""

BYTES_A_SECOND: Final = 4 << 20

_SOON_S: Final = 0.01


@dataclass(slots=True)
class HostCopy:
    """An adapter in HOST memory.

    Attributes:
        run: the adapter's numbers, [layout.length], ready to copy.
        table: table of the run in HOST, made in advance for the first move; see `take_table`.
    """

    layout: Layout
    run: torch.Tensor
    table: AdapterTable | None = None

    def take_table(self) -> AdapterTable:
        """Return the table, made now if needed. It is not kept, since a copy that is only in
        HOST needs none."""
        ahead, self.table = self.table, None
        return AdapterTable(self.layout, self.run) if ahead is None else ahead


class Loaders:
    """Reads each adapter in the first process that is free. Any thread may call `read`.

    Args:
        count: number of processes.
        pinned: make page-locked copies, for asynchronous copies to a GPU.
        tables: also make each copy's table, while the copy is being filled.
        limit_s: see `LIMIT_S`.
    """

    def __init__(
        self,
        setup: LoaderSetup,
        dtype: torch.dtype,
        *,
        count: int,
        pinned: bool,
        tables: bool = False,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._limit_s = limit_s
        self._setup = setup
        self._dtype = dtype
        self._pinned = pinned
        self._tables = tables
        self._processes = [Loader(setup) for _ in range(count)]
        self._idle: queue.SimpleQueue[Loader] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        # Not on the caller's thread, which has low priority: it would hold the GIL and make the
        # step wait while the loader has the CPU.
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="adapter-map")

    def start(self) -> None:
        """Start all processes now, so that the first load need not wait for one."""
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """End all processes."""
        self._preparer.shutdown()
        for process in self._processes:
            process.end()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the running loaders."""
        return tuple(p.pid for p in self._processes if p.pid is not None)

    def read(self, source: AdapterSource) -> tuple[HostCopy, dict[str, float]]:
        """Read, verify and convert an adapter; also return the seconds of each stage.

        Raises:
            AdapterCorrupt: the content no longer matches its digest.
            DiskFailed: the system cannot read it now, or the last attempt took too long.
            InternalError: the loader of the last attempt ended early.
        """
        size = source.parameters * self._dtype.itemsize
        process = self._idle.get()
        try:
            copy, stages = process.load(
                source,
                lambda *begun: self._preparer.submit(self._prepare, *begun),
                self._limit_s + size / BYTES_A_SECOND,
            )
        finally:
            self._idle.put(process)
        if self._pinned:  # only now, since this copies the run, which must be complete
            copy.run = copy.run.pin_memory()
        return copy, stages

    def _prepare(self, begun: Begun, fd: int, segments: _Segments) -> HostCopy:
        memory = segments.take(begun, fd)
        modules = (LoraModule(*facts, "", "") for facts in begun.modules)
        layout = Layout.of(
            modules, self._setup.shapes, self._setup.num_layers, paired=self._setup.paired
        )
        run = torch.frombuffer(memory, dtype=self._dtype)
        return HostCopy(layout, run, AdapterTable(layout, run) if self._tables else None)


class _Segments:
    """The files in memory that one process fills; each is mapped once, with its first range."""

    def __init__(self) -> None:
        self._number = 0
        self._current: MappedSegment | None = None

    def take(self, begun: Begun, fd: int) -> memoryview:
        """Return the memory of a run.

        Args:
            fd: descriptor of the run's file; closed when no longer needed.

        Raises:
            MemoryError: the memory cannot be mapped.
        """
        if self._current is None or begun.segment != self._number:
            self._current = MappedSegment(fd, begun.segment_size)
            self._number = begun.segment
        else:
            os.close(fd)
        return self._current.take(begun.offset, begun.size)

    def close(self) -> None:
        """Give back the memory that the process had ready. Call when it has ended."""
        if self._current is not None:
            self._current.close()


_Prepare = Callable[[Begun, int, _Segments], "Future[HostCopy]"]
"""Starts to make a `HostCopy` from the descriptor of the file that holds the run."""


class Loader:
    """One loader process, started on first use and restarted when it has ended."""

    def __init__(self, setup: LoaderSetup) -> None:
        self._child = ChildProcess(MODULE, msgspec.msgpack.encode(setup))
        self._segments = _Segments()

    def start(self) -> socket.socket:
        """Return the connection to the process, starting it if it is not running."""
        return self._child.start()

    def load(
        self, source: AdapterSource, prepare: _Prepare, limit_s: float
    ) -> tuple[HostCopy, dict[str, float]]:
        """Load an adapter; return the complete, verified copy and the seconds of each stage.

        A process that ends is replaced, and one that takes longer than ``limit_s`` is
        killed; a new one then tries once more.
        """
        ask = msgspec.msgpack.encode(LoadRequest(source.folder, source.digest))
        began, late, ends = time.monotonic(), False, list[str]()
        for attempt in range(TRIES):
            try:
                connection = self.start()
                deadline = time.monotonic() + limit_s
                connection.settimeout(limit_s)
                connection.sendall(framed(ask))
                tried = time.monotonic()
                if (loaded := self._loaded(connection, prepare, deadline)) is not None:
                    copy, stages = loaded
                    return copy, {**stages, LOST: tried - began} if attempt else stages
                late = False
            except TimeoutError:
                late = True
            except OSError:
                late = False  # the process has ended: see below
            except VeneerError:
                raise
            except BaseException:
                self.end()  # or its late answer would be taken for the next one
                raise
            ends.append(f"killed after {limit_s:.0f} s" if late else self.end())
            if late:
                self.end(kill=True)
            log.warning("a loader ended (%s) while reading %s", ends[-1], source.name)
        told = ", then ".join(ends)
        if late:
            raise DiskFailed(
                f"adapter {source.name} could not be read within {limit_s:.0f} s, tried "
                f"{TRIES} times ({told}): the disk is hanging or the machine is overloaded; "
                "retry",
                metadata={"adapter": source.name, "loaders": str(TRIES)},
                retry_after_s=5.0,
            )
        raise InternalError(
            f"adapter {source.name} could not be loaded, tried {TRIES} times: the process "
            f"that reads it ended early ({told}); check the disk and push it again",
            metadata={"loaders": str(TRIES)},
        )

    def _loaded(
        self, connection: socket.socket, prepare: _Prepare, deadline: float
    ) -> tuple[HostCopy, dict[str, float]] | None:
        """Wait for an attempt of `load`; None if the process has ended. Raises TimeoutError."""
        copy = None
        while (body := read_frame(connection)) is not None:
            connection.settimeout(max(_SOON_S, deadline - time.monotonic()))
            match msgspec.msgpack.decode(body, type=Begun | LoadDone):
                case Begun() as begun:
                    _, fds, _, _ = socket.recv_fds(connection, 1, 1)
                    if not fds:
                        return None
                    copy = prepare(begun, fds[0], self._segments)
                case LoadDone(error=None, stages=stages) if copy is not None:
                    return copy.result(), stages
                case LoadDone(error=Failure() as failure):
                    raise failure.error
        return None

    @property
    def pid(self) -> int | None:
        """The process id; None if it is not running."""
        return self._child.pid

    def end(self, *, kill: bool = False) -> str:
        """End the process, or clean up after it; return how it ended."""
        segments, self._segments = self._segments, _Segments()
        try:
            return self._child.end(kill=kill)
        finally:
            segments.close()
