"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from veneer_server.engine import process
from veneer_server.engine.backends import Chosen
from veneer_server.engine.messages import EngineConfig
from veneer_server.models.source import import_bundled

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _asked_backend() -> Iterator[None]:
    """``VENEER_BACKEND=torch make test``: engines inside a test take it too, where the test
    does not say which."""
    wanted, chosen = os.environ.get("VENEER_BACKEND"), process.choose

    def choose(config: EngineConfig, *rest: Any) -> Chosen:
        if wanted and config.backend == "auto":
            config = msgspec.structs.replace(config, backend=wanted)
        return chosen(config, *rest)

    process.choose = choose
    yield
    process.choose = chosen


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where imported bases live; `make test` fills it before the suite starts."""
    return Path(os.environ.get("VENEER_CACHE_DIR", REPOSITORY / ".cache" / "veneer"))


@pytest.fixture(scope="session")
def base_folder(cache_dir: Path) -> Path:
    """The real base: SmolLM2-135M-Instruct as a Hugging Face folder."""
    return import_bundled(cache_dir).path
