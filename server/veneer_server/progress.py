"""Progress of the long parts of a start, for users who wait for it.

The code of each part reports progress through `stage`, in whichever process it runs. Reports
go to the `SINK` of the context: in the front process a `Display` shows them, in the engine
they are sent over the socket to the front. Without a sink they are dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final, Literal

from veneer_server.logs import get_logger, show_status, takes_status

EVERY_S: Final = 5.0
"""Seconds between log lines of a running part."""

_REDRAW_S: Final = 0.25
_BAR: Final = 20
_LEAST_S: Final = 2.0
"""A part must run for this long before it shows the time left."""

_SHORT_S: Final = 0.1
"""A part that finishes sooner, without counting anything, found its result cached by an
earlier start, which is not worth a log line."""

Unit = Literal["", "bytes", "tensors", "layers", "adapters"]

_log = get_logger(__name__)


class StartStopped(Exception):
    """The start was cancelled; raised in running parts to end them."""


@dataclass(frozen=True, slots=True)
class StartPart:
    """The state of one part.

    Attributes:
        name: such as ``compiling the kernels``; unique among the running parts.
        done, total: progress in ``unit``; a total of 0 means unknown.
    """

    name: str
    done: int = 0
    total: int = 0
    unit: Unit = ""
    state: Literal["running", "done", "failed"] = "running"


Sink = Callable[[StartPart], None]
"""Receives each change, in any thread. Raises `StartStopped`."""

SINK: ContextVar[Sink] = ContextVar("progress", default=lambda part: None)


class Stage:
    """A running part; see `stage`."""

    def __init__(self, part: StartPart) -> None:
        self._part = part
        self._sink = SINK.get()

    def update(self, done: int, total: int | None = None) -> None:
        """Set the progress. Raises `StartStopped`."""
        total = self._part.total if total is None else total
        self._tell(replace(self._part, done=done, total=total))

    def advance(self, count: int = 1) -> None:
        """Add to the progress. Raises `StartStopped`."""
        self.update(self._part.done + count)

    def end(self, state: Literal["done", "failed"]) -> None:
        """Report that the part has ended."""
        self._tell(replace(self._part, state=state))

    def _tell(self, part: StartPart) -> None:
        self._part = part
        self._sink(part)


@contextmanager
def stage(name: str, *, total: int = 0, unit: Unit = "") -> Iterator[Stage]:
    """Report a part of the start while the block runs."""
    running = Stage(StartPart(name, 0, total, unit))
    running.update(0)
    try:
        yield running
    except BaseException:
        running.end("failed")
        raise
    running.end("done")


class Display:
    """Shows parts on standard error: as a status line if in the foreground of a terminal, else
    as a log line every `EVERY_S`. When a part ends, its duration is logged.

    Its thread lives while a part runs. Thread-safe.

    Args:
        structured: write log lines with fields for programs instead of text for people.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        *,
        structured: bool = False,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._structured = structured
        self._every_s = every_s
        self._clock = clock
        self._running: dict[str, _Shown] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def __call__(self, part: StartPart) -> None:
        """A `Sink`."""
        with self._changed:
            now = self._clock()
            shown = self._running.get(part.name)
            if shown is None:
                shown = _Shown(part, now, now + self._every_s, now)
            if part.done and not shown.part.done and now - shown.began >= _LEAST_S:
                shown.since, shown.first = now, part.done
            shown.part = part
            if part.state == "running":
                if self._stopped:
                    raise StartStopped
                self._running[part.name] = shown
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._show, name="progress", daemon=True
                    )
                    self._thread.start()
                return
            self._running.pop(part.name, None)
            show_status("")
            kept = not part.done and now - shown.began < _SHORT_S and not shown.told
            if part.state == "failed" or not kept:
                self._write(shown, now)
            self._changed.notify()

    @property
    def doing(self) -> str:
        """The running part in words; "" if none."""
        with self._changed:
            last = next(reversed(self._running.values()), None)
            return "" if last is None else last.words(self._clock())

    def stop(self) -> None:
        """Make every part end at its next report."""
        with self._changed:
            self._stopped = True

    def _show(self) -> None:
        with self._changed:
            while self._running:
                now, drawn = self._clock(), takes_status()
                for shown in self._running.values():
                    if now >= shown.due:
                        shown.due = now + self._every_s
                        if not drawn:
                            self._write(shown, now)
                if drawn:
                    show_status(next(reversed(self._running.values())).line(now))
                due = min(shown.due for shown in self._running.values()) - now
                self._changed.wait(_REDRAW_S if drawn else min(due, self._every_s))
            self._thread = None

    def _write(self, shown: _Shown, now: float) -> None:
        part, seconds = shown.part, round(now - shown.began, 2)
        shown.told = True
        if not self._structured:
            _log.info(shown.words(now))
            return
        fields: dict[str, object] = {"part": part.name, "state": part.state}
        if part.unit:
            fields |= {"done": part.done, "total": part.total or None, "unit": part.unit}
        if part.state == "running":
            left = shown.left_s(now)
            fields["left_s"] = None if left is None else round(left, 2)
        _log.info("progress", **fields, seconds=seconds)


@dataclass(slots=True)
class _Shown:
    """A running part: when it began, when its next log line is due, whether it had one.

    Attributes:
        since, first: time and count from which the rate is computed. Time long before the
            first count went into something else, such as importing torch.
    """

    part: StartPart
    began: float
    due: float
    since: float
    first: int = 0
    told: bool = False

    def left_s(self, now: float) -> float | None:
        """Seconds left at the rate so far; None if it cannot be estimated yet."""
        part, took, did = self.part, now - self.since, self.part.done - self.first
        if did <= 0 or part.done >= part.total or took < _LEAST_S:
            return None
        return took * (part.total - part.done) / did

    def words(self, now: float) -> str:
        part, took = self.part, _seconds(now - self.began)
        count = _count(part)
        if part.state != "running":
            ended = "done in" if part.state == "done" else "stopped unfinished after"
            return f"{part.name}: {ended} {took}" + (f" ({count})" if count else "")
        left = self.left_s(now)
        ahead = "" if left is None else f", about {_seconds(left)} left"
        return f"{part.name}: " + (f"{count}, " if count else "") + f"{took} so far{ahead}"

    def line(self, now: float) -> str:
        part, bar = self.part, ""
        if part.total:
            filled = _BAR * min(part.done, part.total) // part.total
            bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] "
        return bar + self.words(now)


def _count(part: StartPart) -> str:
    if not part.unit or not (part.done or part.total):
        return ""
    if part.unit == "bytes":
        whole = f" of {part.total / 1e6:.0f}" if part.total else ""
        return f"{part.done / 1e6:.0f}{whole} MB"
    whole = f" of {part.total}" if part.total else ""
    return f"{part.done}{whole} {part.unit}"


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
