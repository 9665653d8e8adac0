"""Structured logs on stderr: an event name and fields, for a console or as JSON.

Prompts and completions are never logged: fields are names, numbers and digests.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final, Literal, TextIO

__all__ = ["REQUEST_ID", "Logger", "configure", "get_logger"]

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the call that the current task serves; added to each of its lines."""

_FIELDS: Final = "veneer_fields"


class Logger:
    """A standard logger that takes fields: ``log.info("ready", grpc=address)``."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def _log(
        self, level: int, event: str, fields: Mapping[str, object], error: BaseException | None
    ) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if (request_id := REQUEST_ID.get()) and "request_id" not in fields:
            fields = {"request_id": request_id, **fields}
        self._logger.log(level, event, extra={_FIELDS: fields}, exc_info=error)

    def info(self, event: str, **fields: object) -> None:
        self._log(logging.INFO, event, fields, None)

    def warning(self, event: str, **fields: object) -> None:
        self._log(logging.WARNING, event, fields, None)

    def error(self, event: str, cause: BaseException | None = None, **fields: object) -> None:
        """A failure; ``cause`` adds its trace."""
        self._log(logging.ERROR, event, fields, cause)


def get_logger(name: str) -> Logger:
    """The structured logger of one module."""
    return Logger(logging.getLogger(name))


def configure(
    log_format: Literal["console", "json"],
    stream: TextIO = sys.stderr,
    *,
    process: Literal["front", "engine"] = "front",
) -> None:
    """Send everything of ours, and warnings of others, to ``stream``."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json(process) if log_format == "json" else _Console(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("veneer_server", "veneer_registry"):
        logging.getLogger(name).setLevel(logging.INFO)


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
        return line


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
        return json.dumps(entry, default=str, ensure_ascii=False)


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    # One event is one line, whatever a client put into a field.
    return (
        json.dumps(text, ensure_ascii=False) if not text.isprintable() or " " in text else text
    )
