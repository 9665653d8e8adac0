"""The compiler and the emulator for ARM that ``make tools`` unpacks. Standard library only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).resolve().parent
ROOT: Final = _HERE.parents[1] / ".cache" / "tools" / "arm"
CXX: Final = _HERE / "c++"
DRIVER: Final = _HERE / "driver.cpp"


def missing() -> str:
    """What of compiler and emulator is missing, and how to get it; "" if both are there."""
    if not (ROOT / "usr" / "bin" / "qemu-aarch64").exists() and not (
        shutil.which("qemu-aarch64") and shutil.which("aarch64-linux-gnu-g++")
    ):
        return "a C++ compiler for ARM and QEMU are missing: run `make tools`"
    return ""


def command(cpu: str, *words: str | Path) -> list[str]:
    """The command that runs a program for ARM on a CPU that QEMU knows."""
    libraries = ROOT / "usr" / "aarch64-linux-gnu"
    if not libraries.exists():
        libraries = Path("/usr/aarch64-linux-gnu")
    here = ROOT / "usr" / "bin" / "qemu-aarch64"
    program = str(here) if here.exists() else "qemu-aarch64"
    return [program, "-L", str(libraries), "-cpu", cpu, *map(str, words)]


def readelf() -> tuple[list[str], dict[str, str]]:
    """The program that prints what is in a library for ARM, and its environment."""
    here = ROOT / "usr" / "bin" / "aarch64-linux-gnu-readelf"
    libraries = ":".join(map(str, (ROOT / "usr" / "lib").glob("*-linux-gnu")))
    program = str(here) if here.exists() else "aarch64-linux-gnu-readelf"
    return [program], {**os.environ, "LD_LIBRARY_PATH": libraries}
