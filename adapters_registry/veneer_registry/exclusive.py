"""The lock under which a registry decides on a change and makes it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType


class Exclusive:
    """A lock for one thread at a time. That thread may enter it again.

    Where several processes change one catalog, a subclass also keeps the other processes out,
    and `__enter__` returns after their changes have been applied.
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
        """Keep out only the other threads of this process. Needs no network."""
        with self._lock:
            yield
