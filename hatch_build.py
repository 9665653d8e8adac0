"""Builds the wheel: with a C++ compiler for Linux on x86-64 or ARM it brings compiled kernels.

Without one it is a pure wheel, and a server compiles them at its first start. An editable
install compiles nothing here. A compiler for another architecture, named in CXX, makes a wheel
for that one.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Adds compiled libraries and example adapters to a wheel."""

    PLUGIN_NAME = "custom"
    _made: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See the module."""
        if version == "editable":
            return
        root = Path(self.root)
        build_data["force_include"][str(root / "examples/adapters")] = "veneer_client/examples"
        if sys.platform != "linux":
            self._pure(f"there are no kernels for {sys.platform}")
            return
        command = _compiler()
        if not command:
            self._pure("there is no C++ compiler: install one, or name it in CXX")
            return
        self._made = tempfile.TemporaryDirectory(prefix="veneer-wheel-")
        try:
            forms = _load(root / "server/veneer_server/backends/native/forms.py")
            machine = forms.target(command)
            if not forms.forms_of(machine):
                self._pure(f"there are no kernels for {machine}")
                return
            sources = root / "server/veneer_server/backends/native/cpp"
            files = forms.compile_forms(command, sources, Path(self._made.name))
        except (OSError, subprocess.CalledProcessError) as error:
            told = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            self._pure(f"{command[0]} failed: {told[0] if told else error}")
            return
        for file in files:
            build_data["force_include"][str(file)] = (
                f"veneer_server/backends/native/prebuilt/{file.name}"
            )
        # For any Python 3: the libraries know nothing of it.
        build_data["pure_python"] = False
        system = "linux" if machine == platform.machine() else f"manylinux_2_{_glibc(files)}"
        build_data["tag"] = f"py3-none-{system}_{machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The libraries are in the wheel."""
        if self._made is not None:
            self._made.cleanup()

    def _pure(self, why: str) -> None:
        self.app.display_warning(
            f"a wheel without compiled kernels: {why}. A server compiles them at its first "
            "start, or serves with torch, several times slower."
        )


def _compiler() -> list[str]:
    words = shlex.split(os.environ.get("CXX", ""))
    for name in words[:1] or ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path, *words[1:]]
    return []


def _glibc(files: Iterable[Path]) -> int:
    """The C library that they need: N of 2.N. A wheel for this machine needs the machine's own;
    a cross-compiler's may be newer than that where the wheel is installed."""
    needed = (re.findall(rb"\0GLIBC_2\.(\d+)(?=[.\0])", file.read_bytes()) for file in files)
    return max(int(number) for numbers in needed for number in numbers)


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("veneer_forms", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def get_build_hook() -> type[BuildHookInterface[Any]]:
    """What hatchling asks for."""
    return KernelsHook
