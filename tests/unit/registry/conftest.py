"""A registry of a folder, and adapters by number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from veneer_registry.registry import Registry

from tests.unit.registry.kit import BASE, make_adapter


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


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
