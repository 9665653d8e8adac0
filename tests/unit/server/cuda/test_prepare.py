"""What a decoder prepares at the start, so that no step of a request compiles or captures.

In a process of its own: it imports triton to be interpreted.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.places import REPOSITORY


@pytest.mark.skipif(sys.platform != "linux", reason="triton is published for Linux alone")
def test_no_step_compiles_a_kernel_or_captures_a_graph() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.engine.prepared"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepared: 16 graphs" in done.stdout
