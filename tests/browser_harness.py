"""Run a real headless Chromium, installed by ``make tools``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Return the program's path. If it is missing, skip the test; in CI, fail it."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is missing: run `make tools`")
        pytest.skip("Chromium is missing: run `make tools`")
    return found


Scheme = Literal["light", "dark"]
"""The colour scheme that the reader's system prefers."""


def dump_dom(page: Path, width: int, work: Path, scheme: Scheme = "light") -> str:
    """Return the document after its scripts have run, in a window ``width`` pixels wide."""
    return _run(page, work, scheme, f"--window-size={width},900", "--dump-dom")


def screenshot(
    page: Path, file: Path, size: tuple[int, int], work: Path, scheme: Scheme = "light"
) -> None:
    """Save the upper left part of the page as a PNG of ``size`` pixels."""
    width, height = size
    _run(page, work, scheme, f"--window-size={width},{height}", f"--screenshot={file}")


def _run(page: Path, work: Path, scheme: Scheme, *flags: str) -> str:
    """Run without a network, and with a new profile under ``work``."""
    done = subprocess.run(
        [
            chromium(),
            "--headless",
            # Chromium's sandbox does not work for root, the usual user in containers.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            f"--user-data-dir={work / 'chromium'}",
            *flags,
            page.resolve().as_uri(),
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("utf-8")
