"""A registry of a folder, and adapters by number; and the same registry elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from veneer_registry.registry import Registry

from tests.shared_services import Services, running
from tests.unit.registry.kept_elsewhere import KeptElsewhere
from tests.unit.registry.kit import BASE, Kept, make_adapter


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
    monkeypatch.setattr("veneer_registry.registry.FolderPlaces", elsewhere.places)
    return elsewhere


@pytest.fixture
def registry(data: Path) -> Iterator[Registry]:
    with Registry.open(data, BASE) as registry:
        yield registry


@pytest.fixture
def adapters(tmp_path: Path) -> Callable[[int], Path]:
    """Folder of adapter number n, with different tensors for each n."""

    def make(number: int) -> Path:
        folder = tmp_path / f"adapter-{number}"
        return folder if folder.exists() else make_adapter(folder, seed=number)

    return make
