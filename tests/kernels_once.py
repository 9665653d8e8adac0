"""Compile the native kernels once for a run of the suite; its workers share them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Final

import pytest
from veneer_server.backends.native import compiler
from veneer_server.backends.native.compiler import build
from veneer_server.backends.native.forms import (
    AVX2,
    AVX512,
    AVX512_VNNI,
    FLAGS,
    HEX,
    InstructionSet,
    compile_forms,
)

from tests.places import REPOSITORY

EMULATED: Final = (AVX512, AVX512_VNNI)
"""Forms that `emulated_kernels` makes for CPUs without them."""


def kernels_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which `kernels_built` keeps them. A pytest-xdist worker's own folder
    is inside the run's folder, which all workers share."""
    own = factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "native"


def kernels_built(factory: pytest.TempPathFactory, instructions: str = "auto") -> Path:
    """Return the shared library for one instruction set. If another worker is compiling it,
    wait, since compiling takes ten seconds of a processor.

    Raises:
        NativeUnavailable: as `build`.
    """
    folder = kernels_folder(factory)
    folder.mkdir(exist_ok=True)
    with (folder / f"{instructions}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder, instructions)


def emulated_kernels(factory: pytest.TempPathFactory, form: InstructionSet) -> Path:
    """Return the shared library of ``avx512`` or ``avx512-vnni`` for a CPU with AVX2 alone."""
    folder = kernels_folder(factory)
    folder.mkdir(exist_ok=True)
    with (folder / f"emulated-{form.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made := next(folder.glob(f"emulated-{form.name}-*.so"), None):
            return made
        draft = folder / f"emulated-{form.name}.draft"
        header = REPOSITORY / "tests/unit/server/native/avx512_emulator.h"
        vnni = ["-DEMULATE_VNNI"] if form is AVX512_VNNI else []
        source = Path(compiler.__file__).with_name("cpp") / "library.cpp"
        command = ["c++", *FLAGS, *AVX2.flags, *vnni, "-include", header, "-o", draft, source]
        subprocess.run(command, check=True)
        draft.chmod(0o644)
        digest = hashlib.sha256(draft.read_bytes()).hexdigest()[:HEX]
        return draft.rename(folder / f"emulated-{form.name}-{digest}.so")


def forms_built(factory: pytest.TempPathFactory) -> Path:
    """Return a folder with libraries compiled as for a wheel; tests copy it."""
    folder = kernels_folder(factory)
    folder.mkdir(exist_ok=True)
    with (folder / "forms.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "forms"
        if not made.exists():
            compiling = folder / "forms.part"
            compiling.mkdir()
            compile_forms(["c++"], Path(compiler.__file__).with_name("cpp"), compiling)
            compiling.rename(made)
        return made
