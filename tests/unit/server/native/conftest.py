"""Shared by the tests of the native kernels: the library, for both instruction sets."""

from __future__ import annotations

import pytest
from veneer_server.backends.native.compiler import NativeUnavailable, build
from veneer_server.backends.native.library import Library

from tests.backends_ran import skip_or_fail


@pytest.fixture(scope="session", params=["best", "avx2"])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Library:
    """The library; ``best`` is the CPU's best instruction set."""
    wanted = "" if request.param == "best" else "avx2"
    try:
        made = Library(build(tmp_path_factory.getbasetemp() / "native", instructions=wanted))
    except NativeUnavailable as reason:
        skip_or_fail(reason)
    if wanted and made.instructions != wanted:
        pytest.fail(f"{made.instructions} was compiled")
    return made
