"""The lock under which a registry decides on a change and makes it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType


class Exclusive:
    """One thread at a time; it may enter again inside its block.

    Where several processes change one catalog, a subclass keeps the others out as well, and
    `__enter__` returns with their changes applied.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Keep the other threads of this process out, and nobody else. Needs no network."""
        with self._lock:
            yield
