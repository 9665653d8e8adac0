"""Says in one line which extra to install for a program that lacks a package."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Final

__all__ = ["missing_extra", "run_with_extra"]

_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9._-]+).*extra == ['\"]([a-z]+)['\"]")

_NAMES: Final = {"pyyaml": "yaml"}
"""Distributions whose module has a different name."""


def missing_extra(error: ModuleNotFoundError, extra: str) -> str | None:
    """What to install for a missing module; None for a module of no extra, since then there is
    a bug or a broken installation.

    Args:
        extra: the extra that the program belongs to.
    """
    name = (error.name or "").partition(".")[0]
    extras = _extras()
    if not any(name in modules for modules in extras.values()):
        return None
    extra = "gateway" if name in extras["gateway"] else extra
    return f"the package {name} is not installed: pip install 'veneer[{extra}]'"


def _extras() -> dict[str, set[str]]:
    """Modules of each extra, from the installed package's metadata."""
    found: dict[str, set[str]] = {}
    for requirement in metadata.requires("veneer") or ():
        match = _REQUIREMENT.match(requirement)
        if match is not None:
            package, extra = match[1].lower(), match[2]
            found.setdefault(extra, set()).add(_NAMES.get(package, package.replace("-", "_")))
    return found


def run_with_extra(program: str, extra: str, find: Callable[[], Callable[[], None]]) -> None:
    """Run the program that ``find`` imports; exit with status 1 and one line if a package is
    missing."""
    try:
        find()()
    except ModuleNotFoundError as error:
        line = missing_extra(error, extra)
        if line is None:
            raise
        print(f"{program}: {line}", file=sys.stderr)
        sys.exit(1)
