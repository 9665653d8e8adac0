"""The native kernels, compiled once for a run of the suite: its workers share them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from veneer_server.backends.native import compiler
from veneer_server.backends.native.compiler import build
from veneer_server.backends.native.forms import compile_forms


def kernels_folder(factory: pytest.TempPathFactory) -> Path:
    """Where `kernels_built` keeps them; a worker of pytest-xdist has a folder in the run's."""
    own = factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "native"


def kernels_built(factory: pytest.TempPathFactory, instructions: str = "auto") -> Path:
    """The library of a form. Who needs one that another worker compiles waits for it, since
    compiling takes ten seconds of a processor.

    Raises:
        NativeUnavailable: as `build`.
    """
    folder = kernels_folder(factory)
    folder.mkdir(exist_ok=True)
    with (folder / f"{instructions}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder, instructions)


def forms_built(factory: pytest.TempPathFactory) -> Path:
    """A folder with the libraries of a wheel, which tests copy; compiled as for a wheel."""
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
