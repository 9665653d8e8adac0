"""A registry of a folder, and adapters by number; and the same registry elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from veneer_registry.registry import Registry

from tests.shared_services import Services, running
from tests.unit.registry.kept_elsewhere import KeptElsewhere
from tests.unit.registry.kit import BASE, Kept, make_adapter
from tests.unit.registry.shared_kit import Open


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    """PostgreSQL and S3, started by the first test that needs them."""
    with running() as services:
        yield services


@pytest.fixture(params=["folder", "shared"])
def anywhere(
    request: pytest.FixtureRequest, data: Path, monkeypatch: pytest.MonkeyPatch
) -> Kept:
    """Run the test twice: with a data folder, and with PostgreSQL and an object store."""
    if request.param == "folder":
        return Kept(data)
    services: Services = request.getfixturevalue("services")
    elsewhere = KeptElsewhere(data, services)
    monkeypatch.setattr("veneer_registry.registry.FolderLocations", elsewhere.places)
    return elsewhere


@pytest.fixture
def registry(data: Path) -> Iterator[Registry]:
    with Registry.open(data, BASE) as registry:
        yield registry


@pytest.fixture
def adapters(tmp_path: Path) -> Callable[[int], Path]:
    """Folder of adapter number n, with different tensors for each n. For any thread."""
    lock = threading.Lock()

    def make(number: int) -> Path:
        folder = tmp_path / f"adapter-{number}"
        with lock:
            return folder if folder.exists() else make_adapter(folder, seed=number)

    return make


@pytest.fixture
def name(tmp_path: Path) -> str:
    """Of the catalog and the store of a test."""
    return f"s{abs(hash(str(tmp_path))):x}"


@pytest.fixture
def opened(services: Services, tmp_path: Path, name: str) -> Iterator[Open]:
    """Opens further registries, each with a folder of its own unless one is given."""
    with ExitStack() as stack:

        def open_(folder: str = "", **options: Any) -> Registry:
            folder = folder or f"own-{len(list(tmp_path.iterdir()))}"
            data = tmp_path / folder
            cache = options.pop("cache_bytes", 1 << 30)
            places = services.places(name, data, cache_bytes=cache)
            return stack.enter_context(Registry.open(data, BASE, places=places, **options))

        yield open_
