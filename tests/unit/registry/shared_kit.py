"""What tests of registries on one PostgreSQL and one object store share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from psycopg import sql
from veneer_registry.registry import Registry
from veneer_registry.rows import HistoryRow

from tests.shared_services import Services

Adapters = Callable[[int], Path]
Open = Callable[..., Registry]
WAIT_S = 20.0


class Watched:
    """The lines that a registry was told."""

    def __init__(self, registry: Registry) -> None:
        self.lines: list[HistoryRow] = []
        self._more = threading.Condition()
        registry.watch(self._told)

    def _told(self, lines: Any) -> None:
        with self._more:
            self.lines += lines
            self._more.notify_all()

    def until(self, count: int) -> list[HistoryRow]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.lines) >= count, WAIT_S), self.lines
        return self.lines


def flipped(data: bytes) -> bytes:
    """The same with one bit flipped."""
    return data[:-1] + bytes([data[-1] ^ 1])


def execute(services: Services, name: str, *statements: str) -> None:
    """Change a catalog behind the back of its registries."""
    with services.postgres.connect() as connection:
        schema = sql.Identifier(services.address(name).schema)
        connection.execute(sql.SQL("SET search_path TO {}").format(schema))
        for statement in statements:
            connection.execute(statement)  # type: ignore[call-overload]
