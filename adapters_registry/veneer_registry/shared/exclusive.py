"""The lock of a catalog that several registries may change."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from veneer_registry.exclusive import Exclusive


class SharedExclusive(Exclusive):
    """Keeps the threads of this process and the other registries out."""

    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        super().__init__()
        self._enter = enter
        self._leave = leave
        self._depth = 0

    def __enter__(self) -> None:
        """Raises Unavailable."""
        super().__enter__()
        try:
            if not self._depth:
                self._enter()
            self._depth += 1
        except BaseException:
            super().__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        try:
            if not self._depth:
                self._leave()
        finally:
            super().__exit__(kind, error, trace)

    @property
    def held(self) -> bool:
        """Whether the calling thread may make changes; only meaningful inside `here`."""
        return self._depth > 0
