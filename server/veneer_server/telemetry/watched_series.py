"""Metrics of ``--watch-dir``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

_STATES: Final = ("published", "waiting", "refused")


class WatchedSeries:
    """Folders by state, publications, failures by reason.

    Attributes:
        published: counts revisions published from the folder.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._folders = Gauge(
            "veneer_watch_dir_folders",
            "Folders in --watch-dir: published, waiting to be whole, or refused.",
            ["state"],
            registry=registry,
        )
        self.published = Counter(
            "veneer_watch_dir_publications_total",
            "Revisions published from --watch-dir.",
            registry=registry,
        )
        self._failures = Counter(
            "veneer_watch_dir_failures_total",
            "Failures to publish from --watch-dir by reason, counted once per content.",
            ["reason"],
            registry=registry,
        )

    def folders_are(self, counts: Mapping[str, int]) -> None:
        """Set the gauge. Before the first call it has no series."""
        for state in _STATES:
            self._folders.labels(state).set(counts.get(state, 0))

    def failed(self, reason: str) -> None:
        """Count a failure."""
        self._failures.labels(reason).inc()
