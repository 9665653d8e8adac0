"""Builds the wheel. With a C++ compiler for Linux on x86-64 or ARM it has compiled kernels.

Its tag is `forms.PLATFORM`, which PyPI accepts, if the kernels need no newer symbols of the
system's libraries than that platform has; else ``linux``, for this machine alone.

Without a compiler it is a pure wheel, and a server compiles the kernels at its first start. An
editable install compiles nothing here. A compiler for another architecture, named in CXX, makes
a wheel for that one.
"""

from __future__ import annotations

import importlib.util
import os
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
        """Compile the kernels and add them to the wheel; see the module."""
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
        # For any Python 3: the libraries do not use Python's API.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{self._platform(forms, files)}_{machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled libraries, which the wheel contains by now."""
        if self._made is not None:
            self._made.cleanup()

    def _platform(self, forms: Any, files: Iterable[Path]) -> str:
        versions = frozenset().union(*map(forms.symbol_versions, files))
        if not any(version.startswith("GLIBC_") for version in versions):
            self.app.display_warning("a wheel without a manylinux tag: there is no glibc here")
            return "linux"
        if newer := forms.too_new(versions):
            self.app.display_warning(
                f"a wheel without a manylinux tag: its kernels need {', '.join(newer)}, which "
                f"{forms.PLATFORM} lacks; it may be installed where it was built"
            )
            return "linux"
        return str(forms.PLATFORM)

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


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("veneer_forms", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look the module up there
    spec.loader.exec_module(module)
    return module


def get_build_hook() -> type[BuildHookInterface[Any]]:
    """The hook that hatchling loads."""
    return KernelsHook
