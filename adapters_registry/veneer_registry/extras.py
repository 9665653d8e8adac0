"""Says in one line which extra to install for a program that lacks a package, and how."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9._-]+).*extra == ['\"]([a-z]+)['\"]")

_NAMES: Final = {"pyyaml": "yaml"}
"""Distributions whose module has a different name."""


def install_extra(extra: str) -> str:
    """The command that adds an extra to this installation. Veneer is on no package index, so it
    names the checkout or wheel that pip installed: a person can paste it."""
    try:
        told = metadata.distribution("veneer").read_text("direct_url.json")
        origin = json.loads(told or "{}")
        url = urlsplit(origin.get("url", ""))
        # Only if the path exists: a container image lacks the folder that it was built from.
        path = url2pathname(url.path) if url.scheme == "file" else ""
        if path and Path(path).exists():
            editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
            return f"pip install {editable}{shlex.quote(f'{path}[{extra}]')}"
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        pass  # a broken installation must not hide which package is missing
    return f"pip install '.[{extra}]' in Veneer's folder, or 'WHEEL[{extra}]' with its wheel"


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
    return f"the package {name} is not installed: {install_extra(extra)}"


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
