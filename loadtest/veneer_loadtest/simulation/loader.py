"""A replica's loads from disk: one after another, and slower while the engine computes.

A real server has several loader processes, at low priority. They take turns on the cores that
they share with the engine, so together they achieve no more than one would.
"""

from __future__ import annotations

from collections import deque


class SimulatedLoader:
    """The queue of a replica's loads.

    Attributes:
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
        """Weights digests of the adapters that are being loaded or wait for it."""
        return {digest for digest, _ in self._queue}

    @property
    def left_s(self) -> float:
        """Seconds until the next load is complete on an idle engine; there must be a load."""
        return self._left[0]

    def add(self, digest: str, size: int, seconds: float) -> None:
        """Add a load, which begins when those before it are complete."""
        self._queue.append((digest, size))
        self._left.append(seconds)

    def work(self, seconds: float) -> list[str]:
        """Advance by ``seconds``; return the digests whose loads are now complete."""
        done = []
        # Clocks are sums of floats: a load with a nanosecond left is complete.
        while self._queue and self._left[0] <= seconds + 1e-9:
            seconds = max(0.0, seconds - self._left.popleft())
            digest, size = self._queue.popleft()
            self.loaded += 1
            self.loaded_bytes += size
            done.append(digest)
        if self._queue:
            self._left[0] -= seconds
        return done
