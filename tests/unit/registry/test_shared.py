"""A name may be shared with other tenants; that lasts as long as the name does."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry import rebuild
from veneer_registry.registry import Registry

from tests.unit.registry.kit import BASE, kill, push

everywhere = pytest.mark.usefixtures("anywhere")
Adapters = Callable[[int], Path]


@everywhere
def test_sharing_lasts_over_replaces_aliases_and_kill_9(data: Path, adapters: Adapters) -> None:
    registry = Registry.open(data, BASE)
    push(registry, "chat", adapters(1))
    push(registry, "code", adapters(2))
    before = registry.get("chat").etag
    record, _ = registry.update("chat", shared=True)
    assert record.shared
    assert record.etag != before
    assert registry.update("chat", shared=True)[0].etag == record.etag, "nothing changed"
    kill(registry)
    with Registry.open(data, BASE) as registry:
        assert registry.shared() == ("chat",)
        assert registry.is_shared("chat")
        assert not registry.is_shared("code")
        new = push(registry, "chat", adapters(3), allow_replace=True).record
        registry.set_alias("chat/prod", [(new.ref.revision, 1)])
        registry.update("chat", retain=1, labels={"team": "a"})
        assert all(each.shared for each in registry.revisions("chat"))
        assert not registry.get("code").shared
    with Registry.open(data, BASE) as registry:
        assert registry.get("chat").shared
        assert not registry.update("chat", shared=False)[0].shared
        events = [line.event for line in registry.history("chat")]
        assert (events[0], events.count("shared")) == ("unshared", 1)
    with Registry.open(data, BASE) as registry:
        assert registry.shared() == ()


@everywhere
def test_a_new_adapter_of_a_deleted_name_is_not_shared(data: Path, adapters: Adapters) -> None:
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", adapters(1))
        registry.update("chat", shared=True)
        registry.delete("chat")
        assert registry.shared() == ()
        push(registry, "chat", adapters(1))
        assert not registry.get("chat").shared
    with Registry.open(data, BASE) as registry:
        assert registry.shared() == ()


def test_a_damaged_row_shares_nothing_and_costs_nothing_else(
    data: Path, adapters: Adapters
) -> None:
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", adapters(1))
        push(registry, "code", adapters(2))
        registry.update("chat", shared=True)
    with sqlite3.connect(data / "catalog.sqlite") as db:
        db.execute("UPDATE shared SET name = 'code'")
    db.close()
    with Registry.open(data, BASE) as registry:
        assert registry.shared() == ()
        assert [record.ref.name for record in registry.list()] == ["chat", "code"]
        registry.update("chat", shared=True)
        registry.update("code", shared=True)
        assert registry.shared() == ("chat", "code")
    with Registry.open(data, BASE) as registry:
        assert registry.shared() == ("chat", "code")


def test_a_rebuilt_catalog_shares_what_the_old_one_did(data: Path, adapters: Adapters) -> None:
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", adapters(1))
        push(registry, "code", adapters(2))
        registry.update("chat", shared=True)
    with sqlite3.connect(data / "catalog.sqlite") as db:
        db.execute("UPDATE revisions SET weights = ? WHERE name = 'code'", ("0" * 64,))
    db.close()
    assert rebuild.recover(data).lost_rows == 1
    with Registry.open(data, BASE) as registry:
        assert registry.shared() == ("chat",)
        assert registry.get("code").current


def test_a_folder_from_before_tenants_shares_nothing(data: Path, adapters: Adapters) -> None:
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", adapters(1))
    with sqlite3.connect(data / "catalog.sqlite") as db:
        db.execute("DROP TABLE shared")
        db.execute("PRAGMA user_version = 4")
    db.close()
    assert not rebuild.recover(data).changed, "it is whole, and the next start upgrades it"
    with Registry.open(data, BASE) as registry:
        assert registry.shared() == ()
        registry.update("chat", shared=True)
        assert registry.shared() == ("chat",)
