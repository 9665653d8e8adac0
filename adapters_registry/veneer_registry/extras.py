"""A program whose extra is not installed names it, in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

__all__ = ["missing_extra", "run_with_extra"]

_OWN: Final = "veneer_"
_GATEWAY: Final = frozenset({"fastapi", "uvicorn", "starlette"})


def missing_extra(error: ModuleNotFoundError, extra: str) -> str | None:
    """What to install for a module that is not there; None where it is one of ours."""
    name = (error.name or "").partition(".")[0]
    if not name or name.startswith(_OWN):
        return None
    extra = "gateway" if name in _GATEWAY else extra
    return f"the package {name} is not installed: pip install 'veneer[{extra}]'"


def run_with_extra(program: str, extra: str, find: Callable[[], Callable[[], None]]) -> None:
    """Run what ``find`` imports; exit with status 1 and a line where a package is missing."""
    try:
        find()()
    except ModuleNotFoundError as error:
        line = missing_extra(error, extra)
        if line is None:
            raise
        print(f"{program}: {line}", file=sys.stderr)
        sys.exit(1)
