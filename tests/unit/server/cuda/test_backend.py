"""The backend for CUDA on a simulated card; `python -m tests.gpu.engine` has the long form.

In a process of its own: it imports triton to be interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.places import REPOSITORY


@pytest.mark.skipif(sys.platform != "linux", reason="triton is published for Linux alone")
@pytest.mark.timeout(600)
def test_it_is_right_on_a_simulated_card() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.engine", "--quick"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    parts = ["memory", "places", "graphs", "graphs, exact", "lookahead", "engine"]
    for part in (*parts, "engine, exact", "bases", "parallel", "engine on two cards"):
        assert f"\n{part}: " in f"\n{done.stdout}"
    assert "without a card: refused" in done.stdout
