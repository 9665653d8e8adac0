"""The threads and step buffers of a native decoder."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from veneer_server.backends.native.library import Library, Model


class NativeEngine:
    """Threads that execute the steps of a model. A model may have several, used in turn.

    Args:
        model: must outlive the engine.
        bound: the CPUs of each thread; empty if the system places them. A thread that the
            system refuses to bind may run anywhere.

    Attributes:
        handle: identifies the engine to the library's functions.
        refused: number of threads that the system refused to bind.

    Raises:
        NativeUnavailable: the threads cannot be started.
    """

    def __init__(
        self,
        library: Library,
        model: Model,
        threads: int,
        bound: Sequence[Sequence[int]] = (),
    ) -> None:
        self.handle = library.create(model, threads)
        self._finalizer = weakref.finalize(self, library.destroy, self.handle)
        self.refused = sum(
            not library.bind(self.handle, thread, cpus) for thread, cpus in enumerate(bound)
        )

    def close(self) -> None:
        """End the threads."""
        self._finalizer()
