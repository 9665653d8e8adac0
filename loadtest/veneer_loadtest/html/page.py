"""The page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer_loadtest.results import Result

__all__ = ["write_page"]


def write_page(path: Path, results: Sequence[Result]) -> None:
    """Write it."""
    path.write_text("", "utf-8")
