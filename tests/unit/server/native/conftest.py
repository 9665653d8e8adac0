"""Shared by the tests of the native kernels: the library, for each instruction set."""

from __future__ import annotations

import pytest
from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.library import Library

from tests.backends_ran import skip_or_fail
from tests.kernels_once import kernels_built

_OTHERS = [pytest.param(name, marks=pytest.mark.push) for name in ("avx2", "software-matrix")]
"""They take long to compile."""


@pytest.fixture(scope="session", params=["best", *_OTHERS])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Library:
    """The library; ``best`` is the CPU's best instruction set, and ``software-matrix`` the
    kernels for matrix registers over a software model, so that any CPU tests them."""
    wanted = "auto" if request.param == "best" else request.param
    try:
        made = Library(kernels_built(tmp_path_factory, wanted))
    except NativeUnavailable as reason:
        skip_or_fail(reason)
    if wanted not in ("auto", made.instructions):
        pytest.fail(f"{made.instructions} was compiled")
    return made
