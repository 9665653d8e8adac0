"""The lines that CI prints last: what failed, and what passed only when repeated.

A program that runs in a stage of CI (`tests.ci`) adds its lines here; outside CI they go
nowhere, since the program prints its own verdict too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

VARIABLE: Final = "VENEER_CI_SUMMARY"
"""Environment variable with the path of the file that collects the lines."""


def add(line: str) -> None:
    """Add a line to the summary of the stage that runs."""
    if file := os.environ.get(VARIABLE):
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(line + "\n")
