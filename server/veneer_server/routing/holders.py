"""Tracks which replicas have which adapters in memory, as far as is known."""

from __future__ import annotations

from collections.abc import Collection

from veneer_server.routing.records import ReplicaReport


class Holders:
    """Adapters that replicas have reported, and those that they will load for requests sent
    since.

    The cost of a report is proportional to the changes since the last one, apart from a
    comparison of two sets.
    """

    def __init__(self) -> None:
        self._reported: dict[str, frozenset[str]] = {}
        self._expected: dict[str, dict[str, float]] = {}
        """By replica and digest: when a request for the adapter was last sent there."""
        self._of: dict[str, set[str]] = {}

    def of(self, digest: str) -> Collection[str]:
        """Replicas that have an adapter, or will soon."""
        return self._of.get(digest, ())

    def expect(self, replica: str, digest: str, now: float) -> None:
        """Note that a request for an adapter was sent to a replica."""
        self._expected.setdefault(replica, {})[digest] = now
        self._of.setdefault(digest, set()).add(replica)

    def report(self, replica: str, report: ReplicaReport, now: float) -> None:
        """Take in a replica's report. Adapters of requests sent after the state was taken are
        still expected."""
        taken = now - report.age_s
        sent = self._expected.get(replica, {})
        expected = {digest: at for digest, at in sent.items() if at > taken}
        before = self._reported.get(replica, frozenset()) | sent.keys()
        for digest in before - report.resident - expected.keys():
            self._remove(replica, digest)
        for digest in report.resident - before:
            self._of.setdefault(digest, set()).add(replica)
        self._reported[replica] = report.resident
        self._expected[replica] = expected

    def leave(self, replica: str) -> None:
        """Remove a replica that is gone. Idempotent."""
        reported = self._reported.pop(replica, frozenset())
        for digest in reported | self._expected.pop(replica, {}).keys():
            self._remove(replica, digest)

    def _remove(self, replica: str, digest: str) -> None:
        holders = self._of.get(digest)
        if holders is not None:
            holders.discard(replica)
            if not holders:
                del self._of[digest]
