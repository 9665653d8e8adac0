"""A folder that an older Veneer wrote is taken over, with a way back."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry import schema
from veneer_registry.errors import FailedPrecondition
from veneer_registry.registry import Registry

from tests.unit.registry.kit import BASE, announce, bundle_files, push


def version(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        (number,) = connection.execute("PRAGMA user_version").fetchone()
        return int(number)


@pytest.fixture
def first_version(
    data: Path, adapters: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A data folder whose catalog has the tables of version 1, with two adapters."""
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", adapters(1), labels={"team": "a"})
        push(registry, "chat", adapters(2), allow_replace=True)
        push(registry, "code", adapters(3))
    catalog = data / "catalog.sqlite"
    with sqlite3.connect(catalog) as connection:
        for table in ("aliases", "history", "quarantine", "files", "residents"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("ALTER TABLE names DROP COLUMN retain")
        connection.execute("DROP INDEX labels_of_value")
        connection.execute("PRAGMA user_version = 1")
    return catalog


def test_an_older_folder_is_upgraded(
    data: Path, first_version: Path, adapters: Callable[[int], Path]
) -> None:
    with Registry.open(data, BASE) as registry:
        assert [record.ref.name for record in registry.list()] == ["chat", "code"]
        assert len(registry.revisions("chat")) == 2
        registry.set_alias("chat/prod", [(registry.resolve("chat").revision, 1)])
        registry.update("chat", retain=7)
        # Which files its content came from was not written down then: all is sent.
        assert set(registry.committed(announce("x", bundle_files(adapters(1)))).values()) == {0}
    assert version(first_version) == schema.VERSION
    assert version(first_version.with_name("catalog.sqlite.v1")) == 1
    with Registry.open(data, BASE) as registry:
        assert registry.resolve("chat/prod") == registry.resolve("chat")


def test_an_upgrade_that_fails_leaves_the_old_tables(
    data: Path, first_version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (*schema._STEPS[:-1], schema._STEPS[-1] + "CREATE TABLE names (x);")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "_STEPS", broken)
        with pytest.raises(sqlite3.OperationalError):
            Registry.open(data, BASE)
    assert version(first_version) == 1
    with Registry.open(data, BASE) as registry:
        assert len(registry) == 2


def test_a_newer_folder_is_refused(data: Path) -> None:
    Registry.open(data, BASE).close()
    with sqlite3.connect(data / "catalog.sqlite") as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    with pytest.raises(FailedPrecondition, match="start the version that made it"):
        Registry.open(data, BASE)
