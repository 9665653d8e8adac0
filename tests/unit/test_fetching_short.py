"""The short form of `tests.fetching`, with its planted bugs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.places import REPOSITORY


@pytest.mark.push
def test_mutated_uris_redirects_and_drops() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fetching", "--cases", "60"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "planted" in ran.stdout
