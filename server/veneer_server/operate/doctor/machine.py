"""Checks of Python, the packages, the limits and the clock."""

from __future__ import annotations

import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from veneer_registry.errors import VeneerError
from veneer_registry.extras import install_extra

from veneer_server.openai import require_gateway
from veneer_server.operate.doctor.check import Check

PACKAGES: Final = (
    "torch", "transformers", "bitsandbytes", "tokenizers", "safetensors", "llguidance",
    "grpcio", "protobuf",
)  # fmt: skip

_LEAST_PYTHON: Final = (3, 11)
_LEAST_FILES: Final = 4096


def python_check() -> Check:
    found = f"{platform.python_version()} on {platform.platform()}"
    if sys.version_info >= _LEAST_PYTHON:
        return Check("python", "ok", found)
    return Check("python", "problem", found, "use Python 3.11 or newer")


def package_check(name: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "problem", "not installed", install_extra("server"))


def no_kernels_check() -> Check:
    if find_spec("kernels") is None:
        return Check("kernels", "ok", "not installed (correct)")
    return Check(
        "kernels",
        "problem",
        "installed: bitsandbytes would download native code from a hub with it",
        "pip uninstall kernels, and pip install 'transformers<5.25', which does not need it",
    )


def gateway_check() -> Check:
    try:
        require_gateway()
    except VeneerError as error:
        found, _, fix = str(error).partition(": ")
        return Check("gateway", "problem", found, fix)
    return Check("gateway", "ok", "its packages are installed")


def open_files_check() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The server raises its soft limit by itself.
    if resource.RLIM_INFINITY in (soft, hard) or hard >= _LEAST_FILES:
        return Check("open files", "ok", f"at most {max(soft, hard)}")
    return Check(
        "open files",
        "warning",
        f"at most {hard}: each connection uses one",
        "raise the hard limit (ulimit -Hn 65536, or LimitNOFILE of the service)",
    )


def clock_check() -> Check:
    """Check that the clock is not earlier than these files; revisions are sorted by time."""
    now, written = time.time(), Path(__file__).stat().st_mtime
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now >= written - 86400:
        return Check("clock", "ok", found)
    return Check("clock", "problem", f"{found} is in the past", "set the clock (NTP)")
