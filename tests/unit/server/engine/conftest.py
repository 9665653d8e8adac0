"""Fixtures shared by several tests of the engine."""

from __future__ import annotations

import pytest
from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.draws import NativeDraws
from veneer_server.backends.native.library import Library
from veneer_server.engine.execution.sampler import TorchDraws
from veneer_server.step.choice import Draws

from tests.backends_ran import skip_or_fail
from tests.kernels_once import kernels_built


@pytest.fixture(params=["torch", "best", pytest.param("avx2", marks=pytest.mark.push)])
def draws(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Draws:
    """Each sampler implementation, for tests of what all of them must do."""
    if request.param == "torch":
        return TorchDraws()
    instructions = "auto" if request.param == "best" else request.param
    try:
        return NativeDraws(Library(kernels_built(tmp_path_factory, instructions)))
    except NativeUnavailable as reason:
        skip_or_fail(reason)
