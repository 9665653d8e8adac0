"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        found: what was found.
        fix: what to do about it; empty if all is well.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
