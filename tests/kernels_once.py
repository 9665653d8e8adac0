"""Compile the native kernels once for a run of the suite; its workers share them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from veneer_server.backends.native import compiler
from veneer_server.backends.native.compiler import build
from veneer_server.backends.native.forms import compile_forms


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
