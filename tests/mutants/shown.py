"""A pytest plugin that prints which copy of the server's package the tests run with."""

from __future__ import annotations

from pathlib import Path

import veneer_server


def pytest_terminal_summary() -> None:
    print(f"uses {Path(veneer_server.__file__).parent}")
