"""The front's side of the processes that check uploads: starts, uses and restarts them."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.adapter import NO_CLAIM, AdapterManifest, BaseClaim, BaseSpec
from veneer_registry.errors import DiskFailed, InternalError
from veneer_registry.manifest_json import manifest_from_json

from veneer_server.adapters.check_process import Checked, CheckFiles
from veneer_server.adapters.child import TRIES, ChildProcess
from veneer_server.wire.frames import framed, read_frame

log = logging.getLogger(__name__)

MODULE: Final = "veneer_server.adapters.check_process"
"""The module that each process runs."""

LIMIT_S: Final = 60.0
"""Seconds that a check may take, plus one for each `BYTES_A_SECOND` of its files."""

BYTES_A_SECOND: Final = 4 << 20

_KEPT: Final = 1
"""Most idle processes kept for the next upload; others end when they have done their check."""


class Checkers:
    """Checks adapters in separate processes, one each. Any thread may call `read`; callers
    must limit how many checks run at once.

    Args:
        limit_s: see `LIMIT_S`.
    """

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._idle: list[ChildProcess] = []
        self._closed = False

    def read(
        self, folder: Path, base: BaseSpec | None, claim: BaseClaim = NO_CLAIM
    ) -> AdapterManifest:
        """Run `veneer_registry.format.read_upload` in another process.

        Raises:
            VeneerError: `read_upload` raised it.
            DiskFailed: the last attempt took too long.
            InternalError: the process of the last attempt ended early.
        """
        ask = framed(msgspec.msgpack.encode(CheckFiles(str(folder), base, claim)))
        size = sum(path.stat().st_size for path in folder.iterdir())
        limit_s = self._limit_s + size / BYTES_A_SECOND
        child = self._take()
        try:
            checked = _ask(child, ask, limit_s)
        finally:
            self._give_back(child)
        if (failed := checked.failure) is not None:
            raise failed.error
        return manifest_from_json(checked.manifest)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the idle processes."""
        with self._lock:
            return tuple(child.pid for child in self._idle if child.pid is not None)

    def close(self) -> None:
        """End all idle processes, and others when they have done their check."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def _take(self) -> ChildProcess:
        with self._lock:
            return self._idle.pop() if self._idle else ChildProcess(MODULE)

    def _give_back(self, child: ChildProcess) -> None:
        with self._lock:
            keep = child.pid is not None and not self._closed and len(self._idle) < _KEPT
            if keep:
                self._idle.append(child)
        if not keep:
            child.end()


def _ask(child: ChildProcess, ask: bytes, limit_s: float) -> Checked:
    """Return a process's answer. A process that ends or takes too long is replaced once."""
    ends: list[str] = []
    for _ in range(TRIES):
        deadline = time.monotonic() + limit_s
        try:
            connection = child.start()
            connection.settimeout(limit_s)
            connection.sendall(ask)
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            if (body := read_frame(connection)) is not None:
                return msgspec.msgpack.decode(body, type=Checked)
            late = False
        except TimeoutError:
            late = True
        except OSError:
            late = False  # the process has ended: see below
        except BaseException:
            child.end(kill=True)  # or its late answer would be taken for the next one
            raise
        ends.append(f"killed after {limit_s:.0f} s" if late else child.end())
        if late:
            child.end(kill=True)
        log.warning("a process that checks uploads ended (%s)", ends[-1])
    told = ", then ".join(ends)
    if late:
        raise DiskFailed(
            f"the adapter could not be checked within {limit_s:.0f} s, tried {TRIES} times "
            f"({told}): the server's disk is hanging or the machine is overloaded; push it "
            "again",
            metadata={"tries": str(TRIES)},
            retry_after_s=5.0,
        )
    raise InternalError(
        f"the adapter could not be checked, tried {TRIES} times: the process that checks it "
        f"ended early ({told}); the machine may be short of memory; push it again",
        metadata={"tries": str(TRIES)},
    )
