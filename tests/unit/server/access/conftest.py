"""A front process that asks for keys; see `tests.unit.server.rpc.front_harness`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def front_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the base's fingerprint, so that only the first server hashes it."""
    return tmp_path_factory.mktemp("access-cache")
