"""A data folder of an older Veneer is upgraded, and one can go back."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry import rebuild, schema
from veneer_registry.errors import FailedPrecondition
from veneer_registry.registry import Registry

from tests.refused import refused
from tests.unit.registry.kit import BASE, make_older, push


def version(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        (number,) = connection.execute("PRAGMA user_version").fetchone()
        return int(number)


@pytest.fixture(params=[1, 3])
def older(data: Path, adapters: Callable[[int], Path], request: pytest.FixtureRequest) -> Path:
    """A data folder as Veneer wrote it with an older catalog: two adapters, one replaced."""
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", adapters(1), labels={"team": "a"})
        push(registry, "chat", adapters(2), allow_replace=True)
        push(registry, "code", adapters(3))
    catalog = data / "catalog.sqlite"
    make_older(catalog, request.param)
    return catalog


def test_an_older_folder_is_upgraded(
    data: Path, older: Path, adapters: Callable[[int], Path]
) -> None:
    before = version(older)
    with Registry.open(data, BASE) as registry:
        assert [record.ref.name for record in registry.list()] == ["chat", "code"]
        assert len(registry.revisions("chat")) == 2
        assert dict(registry.revisions("chat")[1].labels) == {"team": "a"}
        assert registry.list(labels={"team": "a"}) == ()
        registry.set_alias("chat/prod", [(registry.resolve("chat").revision, 1)])
        registry.update("chat", retain=7)
    assert version(older) == schema.VERSION
    assert version(older.with_name(f"catalog.sqlite.v{before}")) == before
    with Registry.open(data, BASE) as registry:
        assert registry.resolve("chat/prod") == registry.resolve("chat")


def test_an_upgrade_that_fails_leaves_the_old_tables(
    data: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (*schema.STEPS[:-1], schema.STEPS[-1] + "CREATE TABLE names (x);")
    before = version(older)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "STEPS", broken)
        with pytest.raises(sqlite3.OperationalError):
            Registry.open(data, BASE)
    assert version(older) == before
    with Registry.open(data, BASE) as registry:
        assert len(registry) == 2


def test_a_newer_folder_is_refused(data: Path) -> None:
    Registry.open(data, BASE).close()
    with sqlite3.connect(data / "catalog.sqlite") as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    with refused(FailedPrecondition, schema=schema.VERSION + 1, known=schema.VERSION):
        Registry.open(data, BASE)


def test_what_an_older_veneer_stored_is_completed(
    data: Path, older: Path, adapters: Callable[[int], Path]
) -> None:
    """Afterwards a lost catalog can be rebuilt with all names, and others can read nothing."""
    for path in data.glob("store/*/*/*"):
        path.chmod(0o644)
    with Registry.open(data, BASE) as registry:
        before = {record.ref: dict(record.labels) for record in registry.list()}
        while registry.complete_store(1):
            pass
        assert not registry.complete_store(1)
    assert [p for p in data.rglob("*") if p.is_file() and p.stat().st_mode & 0o077] == []
    for path in data.glob("catalog.sqlite*"):
        path.unlink()
    assert rebuild.recover(data).nameless == []
    with Registry.open(data, BASE) as registry:
        assert {record.ref: dict(record.labels) for record in registry.list()} == before
        assert len(registry.revisions("chat")) == 2
