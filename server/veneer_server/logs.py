"""Structured logs on stderr: an event name and fields, for a console or as JSON.

Prompts and completions are never logged: fields are names, numbers and digests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import stat
import sys
import time
from collections.abc import Mapping
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, Literal, TextIO

from veneer_registry.terminal import one_line, visible

from veneer_server.queues.recent import Recent

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the call that the current task serves; added to each of its log lines."""

TENANT: ContextVar[str] = ContextVar("tenant", default="")
"""Tenant of that call, or "" for the default tenant; added in the same way."""


def upkeep_of(tenant: str) -> Context:
    """A context for a tenant's background work, which outlives the call that starts it: its
    log lines have the tenant, but no request id."""
    context = copy_context()
    context.run(REQUEST_ID.set, "")
    context.run(TENANT.set, tenant)
    return context


BURST: Final = 100
"""Lines of one kind and tenant that `Logger.often` logs before it limits their rate."""

_FIELDS: Final = "veneer_fields"

_LOST: Final = "log lines were lost"

_ERASE: Final = "\x1b[K"
"""Terminal sequence that erases everything to the right of the cursor."""

_PIECE: Final = 1024
"""Bytes in each write. A pipe or socket that polls as writable accepts 4 KiB without blocking,
but other processes may write to it at the same time."""


class Logger:
    """A standard logger that takes fields: ``log.info("ready", grpc=address)``."""

    __slots__ = ("_frequent", "_logger")

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._frequent: Recent[tuple[str, str], tuple[float, int]] = Recent(1024)
        """State of `often`'s rate limit by kind and tenant: the time until which its logged
        lines use up the rate, and how many lines were left out since the last logged one."""

    def _log(
        self, level: int, event: str, fields: Mapping[str, object], error: BaseException | None
    ) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if (tenant := TENANT.get()) and "tenant" not in fields:
            fields = {"tenant": tenant, **fields}
        if (request_id := REQUEST_ID.get()) and "request_id" not in fields:
            fields = {"request_id": request_id, **fields}
        self._logger.log(level, event, extra={_FIELDS: fields}, exc_info=error)

    def info(self, event: str, **fields: object) -> None:
        self._log(logging.INFO, event, fields, None)

    def often(self, kind: str, event: str, **fields: object) -> None:
        """Log an event that strangers can cause as often as they like: for each kind and tenant
        `BURST` lines at once, then one a second. The next logged line counts the lines that
        were left out as ``left_out``."""
        now, key = time.monotonic(), (kind, TENANT.get())
        due, left_out = self._frequent.get(key, (now, 0))
        if due - now >= BURST:
            self._frequent[key] = due, left_out + 1
            return
        self._frequent[key] = max(due, now) + 1, 0
        more = {"left_out": left_out} if left_out else {}
        self._log(logging.INFO, event, {**fields, **more}, None)

    def warning(self, event: str, **fields: object) -> None:
        self._log(logging.WARNING, event, fields, None)

    def error(self, event: str, cause: BaseException | None = None, **fields: object) -> None:
        """Log a failure; ``cause`` adds its traceback."""
        self._log(logging.ERROR, event, fields, cause)


def get_logger(name: str) -> Logger:
    """The structured logger of one module."""
    return Logger(logging.getLogger(name))


def configure(
    log_format: Literal["console", "json"],
    stream: TextIO | None = sys.stderr,
    *,
    process: Literal["front", "engine"] = "front",
) -> None:
    """Send all of Veneer's log lines, and other packages' warnings, to ``stream``."""
    handler = _handler(stream)
    if isinstance(handler, _Unblocked):
        handler.for_a_person = log_format == "console"
        # The front reports the engine's start too.
        handler.quiet_in_background = process == "engine"
    handler.setFormatter(_Json(process) if log_format == "json" else _Console(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("veneer_server", "veneer_registry"):
        logging.getLogger(name).setLevel(logging.INFO)


def takes_status() -> bool:
    """Whether the log goes to a terminal with this process in its foreground. A background
    process must not draw over the output of a shell or another program."""
    return any(handler.takes_status() for handler in _unblocked())


def quiet_in_background() -> None:
    """From now on, show only warnings and errors whenever this process is in the background of
    the terminal that it logs to: a person is typing there. Nothing changes for files, pipes, or
    in the foreground."""
    quiet = [handler for handler in _unblocked() if handler.in_background()]
    if quiet:
        get_logger(__name__).info(
            "in the background: only warnings are shown from here on (2>FILE keeps the log)"
        )
    for handler in _unblocked():
        handler.quiet_in_background = True


def show_status(line: str) -> None:
    """Show a line on the terminal until the next status or log line replaces it; "" removes
    it. Does nothing if `takes_status` is false."""
    for handler in _unblocked():
        handler.show_status(line)


def _unblocked() -> list[_Unblocked]:
    return [h for h in logging.getLogger().handlers if isinstance(h, _Unblocked)]


def _handler(stream: TextIO | None) -> logging.Handler:
    if stream is None:  # sys.stderr of a process that was started without one
        return logging.NullHandler()
    try:
        return _Unblocked(stream.fileno())
    except OSError:  # not a file
        return logging.StreamHandler(stream)


def _non_blocking(file: int) -> int:
    """The same pipe or terminal, reopened so that only our writes are non-blocking: other
    processes share the flags of the open file. The file itself if it cannot be reopened."""
    kind = os.fstat(file).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            return os.open(f"/proc/self/fd/{file}", flags)
    return file


class _Unblocked(logging.Handler):
    """Drops and counts lines that cannot be written immediately: a log that nobody reads, such
    as a full pipe or a stopped terminal, must not block the server."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file = file = _non_blocking(file)
        self.for_a_person = False
        self.quiet_in_background = False
        """See the function of this name."""
        self._status = False
        """Whether a status line is shown."""
        self._poll = select.poll()
        self._poll.register(file, select.POLLOUT)
        self._lost = 0

    def takes_status(self) -> bool:
        """See the function `takes_status`."""
        return self._in_foreground() is True

    def in_background(self) -> bool:
        """Whether the lines go to a terminal with this process in its background."""
        return self._in_foreground() is False

    def _in_foreground(self) -> bool | None:
        """Whether this process is in the foreground of the terminal that the lines go to; None
        if they go elsewhere, are not for a person, or go to another session's terminal."""
        try:
            if self.for_a_person and os.isatty(self._file):
                return os.tcgetpgrp(self._file) == os.getpgrp()
        except OSError:
            pass
        return None

    def show_status(self, line: str) -> None:
        """See the function `show_status`."""
        with self.lock or contextlib.nullcontext():
            if not self.takes_status() or not (line or self._status):
                return
            with contextlib.suppress(OSError):
                width = (os.get_terminal_size(self._file).columns or 80) - 1
                # The cursor returns to the start of the line, so that output of another
                # process overwrites it.
                data = f"{_ERASE}{one_line(line)[:width]}\r".encode(errors="replace")
                if self._poll.poll(0):
                    os.write(self._file, data)
                    self._status = bool(line)

    def emit(self, record: logging.LogRecord) -> None:
        quiet = self.quiet_in_background and record.levelno < logging.WARNING
        if quiet and self.in_background():
            return
        if self._status:
            self.show_status("")
        if self._lost:
            notice = logging.LogRecord(__name__, logging.WARNING, "", 0, _LOST, None, None)
            setattr(notice, _FIELDS, {"lines": self._lost})
            if self._write(notice):
                self._lost = 0
        if not self._write(record):
            self._lost += 1

    def _write(self, record: logging.LogRecord) -> bool:
        try:
            line = self.format(record)
        except Exception as error:  # a bug in a log call must not fail the caller
            line = visible(f"cannot format a log line: {record.msg!r}: {error!r}")
        try:
            data = f"{line}\n".encode(errors="backslashreplace")
            for at in range(0, len(data), _PIECE):
                if not self._poll.poll(0):
                    return False
                piece = data[at : at + _PIECE]
                if os.write(self._file, piece) < len(piece):
                    return False
        except OSError:  # closed at the other end, or a full disk
            return False
        return True


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, _FIELDS, {})
    return fields


class _Console(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._prefix = [] if process == "front" else [f"{process}:"]

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        parts = [clock, f"{record.levelname.lower():7}", *self._prefix, record.getMessage()]
        parts += [f"{key}={_plain(value)}" for key, value in _fields(record).items()]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return visible(line)


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return visible(json.dumps(entry, default=str, ensure_ascii=False))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    # An event is always one line, whatever a client put into a field.
    if text.isprintable() and " " not in text:
        return text
    return one_line(json.dumps(text, ensure_ascii=False))
