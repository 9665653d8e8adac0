"""What the Makefile's own pieces of shell do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.places import REPOSITORY

PIECE = (
    "define with_progress\n"
    + (REPOSITORY / "Makefile")
    .read_text("utf-8")
    .partition("define with_progress\n")[2]
    .partition("endef\n")[0]
    + "endef\n"
)
ENVIRONMENT = {name: value for name, value in os.environ.items() if "MAKE" not in name}
"""Not that of `make test`, which would have these say that they are its children."""


def test_a_target_that_says_how_long_it_runs_ends_its_output_with_its_work(
    tmp_path: Path,
) -> None:
    """A pause that is left over must not hold the pipe; here it would for longer than the
    test waits."""
    assert PIECE.count("sleep 5 ") == 1
    pause = tmp_path / "pause"
    pause.write_text("#!/bin/sh\ntouch paused\nexec sleep 60\n")
    pause.chmod(0o755)
    (tmp_path / "Makefile").write_text(
        f"{PIECE.replace('sleep 5 ', './pause ')}all:\n"
        "\t@$(call with_progress,waiting); until [ -e paused ]; do :; done; echo done\n"
    )
    made = subprocess.run(
        ["make"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert made.stdout == "done\n"


def test_a_target_says_how_long_it_runs(tmp_path: Path) -> None:
    """The work waits for the line itself."""
    (tmp_path / "Makefile").write_text(
        f"{PIECE.replace('sleep 5 ', 'sleep 0.01 ')}all:\n"
        "\t@exec > said; $(call with_progress,waiting); "
        "until grep -q 'waiting: [0-9]* s so far' said; do :; done\n"
    )
    subprocess.run(["make"], cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=30)
