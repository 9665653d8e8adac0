"""gRPC services that are registered before their servicers exist."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["Later"]


class Later:
    """A stand-in with the methods of a servicer, which `answer_by` supplies. A server must know
    its methods when it starts, before the base is loaded; until then `CallInterceptor` lets no
    call through."""

    def __init__(self, kind: type) -> None:
        """Args: kind: the generated class of the servicer."""
        self._kind = kind
        self._servicer: Any = None

    def answer_by(self, servicer: object) -> None:
        """Forward calls to this servicer from now on."""
        self._servicer = servicer

    def __getattr__(self, name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        if name.startswith("_") or not hasattr(self._kind, name):
            raise AttributeError(name)

        async def call(request: Any, context: Any) -> Any:
            return await getattr(self._servicer, name)(request, context)

        return call
