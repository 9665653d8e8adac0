"""The variants of the engine that a row runs: torch in float32, and the native kernels.

The native backend is the default, so testing torch alone would cover only a part of the
product. Its kernels exist once per instruction set; a machine runs those that it supports.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from veneer_server.backends.native.forms import AMX, FORMS, forms_of

from tests.backends_ran import asked, native_possible
from tests.places import cache_dir


@dataclass(frozen=True, slots=True)
class Form:
    """How an engine executes its steps.

    Attributes:
        name: its name in figures.
        settings: settings of a server, also fields of `EngineConfig`. An engine that cannot
            apply them does not start.
    """

    name: str
    settings: Mapping[str, Any]

    def cache(self, folder: Path) -> Path:
        """Return the cache folder of its engines: ``folder``, or for native kernels a shared
        one, so that they are compiled once for all rows."""
        return _SHARED if self.native else folder

    @property
    def native(self) -> bool:
        return bool(self.settings["backend"] == "native")

    @property
    def flags(self) -> list[str]:
        """The settings as command-line flags."""
        return [f"--{key.replace('_', '-')}={value}" for key, value in self.settings.items()]


def _native(instructions: str) -> Form:
    settings = {
        "dtype": "bfloat16",
        "quantization": "none",
        "backend": "native",
        "native_instructions": instructions,
    }
    return Form(f"native {instructions}", settings)


_SHARED: Final = cache_dir()
TORCH: Final = Form("torch", {"dtype": "float32", "quantization": "none", "backend": "torch"})
NATIVE: Final = {form.name: _native(form.name) for form in forms_of("x86_64")}


def forms() -> tuple[Form, ...]:
    """Return the forms that this machine can run and the suite's settings allow, torch
    first."""
    given = asked()
    if not native_possible() or given.get("VENEER_BACKEND") == "torch":
        return (TORCH,)
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    wanted = given.get("VENEER_NATIVE_INSTRUCTIONS", "auto")
    here = [form for form in FORMS if form.needs <= flags and wanted in ("auto", form.name)]
    return (
        TORCH,
        *(NATIVE[form.name] for form in here if form is not AMX or _matrix_permitted()),
    )


def _matrix_permitted() -> bool:
    """Return whether Linux lets a process use AMX's registers; asks as the kernels do
    (`amx.h`)."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
