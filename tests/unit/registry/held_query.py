"""A query of the catalog that stops halfway, like one whose thread is preempted."""

from __future__ import annotations

import sqlite3
import threading
from typing import Any, Final

import pytest

GIVE_UP_S: Final = 20.0
"""Time after which a held query continues, so that a caller that must not wait for it fails
instead of hanging."""


class HeldQuery:
    """FAULT: the first query whose SQL contains ``words`` is held inside SQLite, with all
    the locks that it has taken, until `let_go`.

    Applies to connections that are opened from now on.

    Attributes:
        gave_up: whether it continued by itself, since `let_go` was not called.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
        self.gave_up = False
        first = threading.Lock()
        self._words = words
        self._reached = threading.Event()
        self._go = threading.Event()
        hold, real_connect = self._hold, sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
                if words not in sql or not first.acquire(blocking=False):
                    return super().execute(sql, *rest)
                self.set_progress_handler(hold, 1)
                try:
                    return super().execute(sql, *rest)
                finally:
                    self.set_progress_handler(None, 0)

        def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            return real_connect(*args, factory=Connection, **kwargs)

        monkeypatch.setattr(sqlite3, "connect", connect)

    def wait(self) -> None:
        """Wait until the query is held."""
        assert self._reached.wait(GIVE_UP_S), f"no query with {self._words!r}"

    def let_go(self) -> None:
        """Let the query continue."""
        self._go.set()

    def _hold(self) -> None:
        self._reached.set()
        if not self._go.wait(GIVE_UP_S):
            self.gave_up = True
            self._go.set()
