"""Whose doing an admin call is, for the history."""

from __future__ import annotations

import re
from typing import Any, Final

from veneer_registry.rows import Who

__all__ = ["who_calls"]

ACTOR: Final = "veneer-actor"
_LONGEST: Final = 128
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")


def who_calls(context: Any) -> Who:
    """Who the caller says it is (metadata ``veneer-actor``), and where it calls from."""
    metadata = dict(context.invocation_metadata() or ())
    given = str(metadata.get(ACTOR, ""))[:_LONGEST]
    return Who(_UNPRINTABLE.sub("?", given), context.peer())
