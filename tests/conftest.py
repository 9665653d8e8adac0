"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from veneer_server.models.source import import_bundled

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where imported bases live; `make test` fills it before the suite starts."""
    return Path(os.environ.get("VENEER_CACHE_DIR", REPOSITORY / ".cache" / "veneer"))


@pytest.fixture(scope="session")
def base_folder(cache_dir: Path) -> Path:
    """The real base: SmolLM2-135M-Instruct as a Hugging Face folder."""
    return import_bundled(cache_dir).path
