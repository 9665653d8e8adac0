"""Facts about a run, for its result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psutil
from veneer_registry.replacing import replace_file

from veneer_loadtest.quantiles import percentiles
from veneer_loadtest.results import Spread

_FOLDERS: Final = re.compile(
    r"(?P<url>\b(?!file:)[a-z][a-z0-9+.-]+://[^\s,]*)"
    r"|(?P<scheme>\bfile://)?(?<![^=:,/\s])/(?:[^/=:,\s]*/)*",
    re.IGNORECASE,
)
"""Matches a URL, which is kept; or the folders of an absolute path. The path must be a whole
word, in a file URL, or after ``=``, ``:`` or ``,``."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def spread(seconds: Iterable[float]) -> Spread:
    """Compute the spread of samples in seconds, as milliseconds."""
    values = [float(second) * 1e3 for second in seconds]  # also for numpy's floats
    p50, p99 = percentiles(values, [0.5, 0.99])
    return Spread(
        p50=p50,
        p99=p99,
        low=min(values),
        high=max(values),
    )


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of installed packages; those that are missing are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def busy_share() -> float:
    """Load average of the last minute / cores."""
    minute: float = psutil.getloadavg()[0]
    return minute / usable_cores()


def without_folders(argument: str) -> str:
    """Cut absolute paths in a part of a command line to their last names, since others may read
    the result. URLs other than file URLs stay as they are."""
    return _FOLDERS.sub(lambda found: found["url"] or found["scheme"] or "", argument)


def conditions() -> dict[str, object]:
    """Return when and where a run happened, and how busy the machine was at its start."""
    memory = psutil.virtual_memory()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(map(without_folders, sys.argv)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory.total,
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write_json(path: Path, result: Mapping[str, object]) -> None:
    """Write a result; its folder must exist."""
    replace_file(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
