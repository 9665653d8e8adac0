"""A replica's loads from disk: one after another, slower while the engine computes.

A real server has several loader processes, at low priority. On the cores that they share with
the engine they take turns, so what they achieve together is what one would.
"""

from __future__ import annotations

from collections import deque


class SimulatedLoader:
    """Attributes:
    loaded, loaded_bytes: counts since the start.
    """

    def __init__(self) -> None:
        self.loaded = 0
        self.loaded_bytes = 0
        self._queue: deque[tuple[str, int]] = deque()
        self._left: deque[float] = deque()

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def digests(self) -> set[str]:
        """What is being loaded."""
        return {digest for digest, _ in self._queue}

    @property
    def left_s(self) -> float:
        """Until the next one is complete, beside an idle engine; there must be one."""
        return self._left[0]

    def add(self, digest: str, size: int, seconds: float) -> None:
        """A load begins, or waits for those before it."""
        self._queue.append((digest, size))
        self._left.append(seconds)

    def work(self, seconds: float) -> list[str]:
        """So much is done. Returns the digests that are now complete."""
        done = []
        # Clocks are sums of floats: a load that lacks a nanosecond is complete.
        while self._queue and self._left[0] <= seconds + 1e-9:
            seconds = max(0.0, seconds - self._left.popleft())
            digest, size = self._queue.popleft()
            self.loaded += 1
            self.loaded_bytes += size
            done.append(digest)
        if self._queue:
            self._left[0] -= seconds
        return done
