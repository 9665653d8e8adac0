"""The kernels for CUDA, without a card: a few shapes of each interpreted, all compiled.

Each in a process of its own: whether triton interprets or compiles is decided at its import.
``make gpu-kernels`` has the long form.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.places import REPOSITORY

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="triton is published for Linux alone"
)


def _run(*arguments: str) -> str:
    """What a module prints; fails the test with it if its exit status is not 0."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    return done.stdout


@pytest.mark.timeout(600)
def test_each_kernel_is_equal_to_its_reference_and_a_planted_bug_is_not() -> None:
    assert _run("tests.gpu", "--quick").count("1 of 1 bugs noticed") == 13


@pytest.mark.timeout(600)
def test_each_kernel_compiles_within_its_budget() -> None:
    told = _run("tests.gpu.compile")
    for target in ("sm_80", "sm_89", "sm_90", "sm_100"):
        assert told.count(target) == 18
