"""The rows of one tenant's names in memory, for the queries that `Lookups` makes."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping

from veneer_registry.errors import FailedPrecondition
from veneer_registry.rows import AliasRow, HistoryRow, ResidentRow, RevisionRow

from veneer_server.replication.states import NameState


class MirroredRows:
    """Read-only replacement for `Catalog`. Thread-safe: `put` may run beside queries."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[str, NameState] = {}
        self._sorted: list[str] = []
        self.number = 0
        """Increases with every change."""

    def put(self, state: NameState) -> None:
        """Set or remove a name."""
        with self._lock:
            self.number += 1
            at = bisect.bisect_left(self._sorted, state.name)
            known = state.name in self._states
            if state.entry is None:
                if known:
                    del self._states[state.name], self._sorted[at]
                return
            self._states[state.name] = state
            if not known:
                self._sorted.insert(at, state.name)

    def revision(self, name: str, revision: str, *, urgent: bool = False) -> RevisionRow | None:
        """As `Catalog.revision`."""
        return next((row for row in self._rows(name) if row.revision == revision), None)

    def revisions(self, name: str) -> tuple[RevisionRow, ...]:
        """As `Catalog.revisions`."""
        return self._rows(name)

    def page(
        self, prefix: str, labels: Mapping[str, str], after: str, limit: int
    ) -> tuple[RevisionRow, ...]:
        """As `Catalog.page`."""
        found: list[RevisionRow] = []
        with self._lock:
            at = max(
                bisect.bisect_right(self._sorted, after),
                bisect.bisect_left(self._sorted, prefix),
            )
            while at < len(self._sorted) and len(found) < limit:
                name = self._sorted[at]
                if not name.startswith(prefix):
                    break
                current = next((row for row in self._states[name].rows if row.current), None)
                if current is not None and labels.items() <= current.labels.items():
                    found.append(current)
                at += 1
        return tuple(found)

    def aliases(self) -> tuple[AliasRow, ...]:
        """As `Catalog.aliases`."""
        with self._lock:
            entries = [self._states[name].entry for name in self._sorted]
        return tuple(a for entry in entries if entry is not None for a in entry.aliases)

    @property
    def stored_bytes(self) -> int:
        """As `Catalog.stored_bytes`: bytes stored by the registry, not by this server."""
        with self._lock:
            sizes = {
                row.weights: row.bytes for state in self._states.values() for row in state.rows
            }
        return sum(sizes.values())

    def history(self, name: str, before: int | None, limit: int) -> tuple[HistoryRow, ...]:
        """Refuse: only the registry has the history."""
        raise FailedPrecondition(
            "this server follows a registry, which keeps the history: ask the registry",
            metadata={"cause": "follower"},
        )

    def residents(self) -> tuple[ResidentRow, ...]:
        """Always empty: at a start the names are not known yet."""
        return ()

    def _rows(self, name: str) -> tuple[RevisionRow, ...]:
        with self._lock:
            state = self._states.get(name)
        return () if state is None else state.rows
