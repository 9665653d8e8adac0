"""The clock of a simulation, and its queue of events."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Events:
    """Makes calls in order of time, and at the same time in the order of `at`.

    Attributes:
        now: seconds since the start.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Call ``what`` at time ``when``, which must not be in the past."""
        assert when >= self.now, f"{when} is past: it is {self.now}"
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Call ``what`` some seconds from now."""
        self.at(self.now + seconds, what)

    @property
    def next(self) -> float | None:
        """When the next call is due; None if there is no call."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> None:
        """Make the next call."""
        self.now, _, what = heapq.heappop(self._heap)
        what()
