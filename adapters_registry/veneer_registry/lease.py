"""A lease: one request's claim on one revision's content."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from veneer_registry.adapter import AdapterRef
from veneer_registry.records import AdapterRecord


class RevisionLease:
    """Keeps one revision's content on disk from admission to the end of a request."""

    def __init__(self, record: AdapterRecord, release: Callable[[AdapterRef], None]) -> None:
        """Made by `Registry.acquire`."""
        self.record = record
        self._release = release
        self._lock = threading.Lock()
        self._held = True

    @property
    def ref(self) -> AdapterRef:
        """The leased revision."""
        return self.record.ref

    def release(self) -> None:
        """End the lease; never blocks on I/O. Idempotent."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._release(self.ref)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
