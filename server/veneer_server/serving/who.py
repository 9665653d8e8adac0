"""Identifies the caller, for the history of admin calls and for fair queueing."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any, Final

from veneer_registry.rows import Who

from veneer_server.access.principal import PRINCIPAL

__all__ = ["CALLER", "who_calls", "who_is_here"]

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""The connection of the current call. Callers take turns wherever one of them could keep
the others waiting."""

ACTOR: Final = "veneer-actor"
_LONGEST: Final = 128
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")


def who_calls(context: Any) -> Who:
    """The caller's name and its address. Where callers need not say who they are, the name is
    what metadata ``veneer-actor`` claims."""
    if name := PRINCIPAL.get().name:
        return Who(name, context.peer())
    metadata = dict(context.invocation_metadata() or ())
    given = str(metadata.get(ACTOR, ""))[:_LONGEST]
    return Who(_UNPRINTABLE.sub("?", given), context.peer())


def who_is_here() -> Who:
    """The caller of an HTTP request."""
    return Who(PRINCIPAL.get().name, CALLER.get())
