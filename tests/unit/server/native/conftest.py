"""Shared by the tests of the native kernels: the library, for each instruction set."""

from __future__ import annotations

import pytest
from veneer_server.backends.native.compiler import NativeUnavailable, cpu_flags
from veneer_server.backends.native.forms import FORMS
from veneer_server.backends.native.library import Library

from tests.backends_ran import skip_or_fail
from tests.kernels_once import EMULATED, emulated_kernels, kernels_built

_OTHERS = [
    *(pytest.param(name, marks=pytest.mark.push) for name in ("avx2", "software-matrix")),
    *(
        pytest.param(f, marks=pytest.mark.verify)
        for f in ("avx512-vnni", "avx512", "avx2-vnni")
    ),
]
"""They take long to compile."""


@pytest.fixture(scope="session", params=["best", *_OTHERS])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Library:
    """The library; ``best`` is the CPU's best instruction set, and ``software-matrix`` the
    kernels for matrix registers over a software model, so that any CPU tests them."""
    wanted = "auto" if request.param == "best" else request.param
    form = next((form for form in FORMS if form.name == wanted), None)
    try:
        if form is None or form.needs <= cpu_flags():
            made = Library(kernels_built(tmp_path_factory, wanted))
        elif form in EMULATED:
            made = Library(emulated_kernels(tmp_path_factory, form))
        else:
            pytest.skip(f"this CPU has no {form.name}, and nothing emulates it")
    except NativeUnavailable as reason:
        skip_or_fail(reason)
    if wanted not in ("auto", made.instructions):
        pytest.fail(f"{made.instructions} was compiled")
    return made
