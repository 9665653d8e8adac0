"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["INSTALL", "Check", "Status"]

Status = Literal["ok", "warning", "problem"]

INSTALL: Final = "pip install '.[server]' in Veneer's folder"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        found: what is there.
        fix: what to do about it; empty where all is well.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
