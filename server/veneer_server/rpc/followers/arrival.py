"""A change that a registry has made for a follower's caller, and when it is known here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from veneer_registry.errors import AdapterNotFound, Unavailable

from veneer_server.serving.tenants.tenant import Tenant

__all__ = ["ARRIVAL_S", "Until", "arrived", "knows"]

ARRIVAL_S: Final = 10.0
"""How long a change that the registry has made may take to be known here."""

Until = Callable[[Callable[[], bool], float], Awaitable[bool]]
"""Waits until something holds of the view, at most so many seconds; whether it does."""


async def arrived(until: Until, name: str, holds: Callable[[], bool]) -> None:
    """Wait until a change of ``name`` is known here. Raises Unavailable."""
    if not await until(holds, ARRIVAL_S):
        raise Unavailable(
            f"the registry changed {name!r}, but the change did not arrive here within "
            f"{ARRIVAL_S:g} s: it will once the registry is reachable",
            metadata={"adapter": name, "cause": "registry_away"},
            retry_after_s=1.0,
        )


def knows(home: Tenant, spec: str) -> bool:
    """Whether ``name@revision`` is known here."""
    try:
        home.registry.resolve(spec)
    except (AdapterNotFound, Unavailable):  # in doubt, while the registry is away
        return False
    return True
