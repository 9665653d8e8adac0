"""Which replicas have which adapter in memory, as far as is known."""

from __future__ import annotations

from collections.abc import Collection

from veneer_server.routing.records import ReplicaReport


class Holders:
    """What replicas have reported, and what was sent to them since and they will load.

    A report costs as much as what has changed since the one before, apart from a comparison
    of two sets.
    """

    def __init__(self) -> None:
        self._reported: dict[str, frozenset[str]] = {}
        self._expected: dict[str, dict[str, float]] = {}
        """By replica and digest: when a request for it was last sent there."""
        self._of: dict[str, set[str]] = {}

    def of(self, digest: str) -> Collection[str]:
        """Replicas that have an adapter, or will soon."""
        return self._of.get(digest, ())

    def expect(self, replica: str, digest: str, now: float) -> None:
        """A request for an adapter was sent to a replica."""
        self._expected.setdefault(replica, {})[digest] = now
        self._of.setdefault(digest, set()).add(replica)

    def report(self, replica: str, report: ReplicaReport, now: float) -> None:
        """What a replica has. Requests sent after that was so are still expected to load."""
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
        """It is gone. Idempotent."""
        reported = self._reported.pop(replica, frozenset())
        for digest in reported | self._expected.pop(replica, {}).keys():
            self._remove(replica, digest)

    def _remove(self, replica: str, digest: str) -> None:
        holders = self._of.get(digest)
        if holders is not None:
            holders.discard(replica)
            if not holders:
                del self._of[digest]
