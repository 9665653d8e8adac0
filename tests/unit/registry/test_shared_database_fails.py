"""Registries that share places while their database fails, or is restored from a backup."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from veneer_registry.errors import (
    StoreMismatch,
    Unavailable,
)
from veneer_registry.registry import Registry
from veneer_registry.shared import catalog as shared_catalog
from veneer_registry.shared import unneeded
from veneer_registry.shared.catalog import PostgresCatalog
from veneer_registry.shared.locations import SharedLocations
from veneer_registry.shared.object_store import ObjectStore

from tests.refused import refused
from tests.shared_services import Services
from tests.unit.registry.kit import BASE, catalog_of, core_of, push
from tests.unit.registry.shared_kit import Adapters, Open, execute

# ------------------------------------------------------------------- the database fails


@pytest.mark.push
def test_lookups_go_on_without_the_database(
    services: Services, opened: Open, adapters: Adapters
) -> None:
    registry = opened()
    before = push(registry, "chat", adapters(1)).record
    services.postgres.kill()
    try:
        assert registry.resolve("chat") == before.ref
        with registry.acquire("chat") as lease:
            assert lease.record == before
        assert registry.list() == (before,)
        with refused(Unavailable, cause="catalog", outcome="unchanged") as caught:
            push(registry, "chat", adapters(2), allow_replace=True)
        assert caught.value.retry_after_s
        assert services.postgres.password not in str(caught.value)
        with pytest.raises(Unavailable):
            registry.delete("chat")
    finally:
        services.postgres.start()
    after = push(registry, "chat", adapters(2), allow_replace=True).record
    assert registry.list() == (after,)
    assert [r.ref for r in opened().revisions("chat")] == [after.ref, before.ref]


@pytest.mark.push
@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("back", [True, False])
def test_a_commit_whose_answer_is_lost(
    opened: Open, adapters: Adapters, monkeypatch: pytest.MonkeyPatch, made: bool, back: bool
) -> None:
    registry = opened()
    first = push(registry, "chat", adapters(1)).record.ref
    real = psycopg.Connection.execute
    cut = threading.Event()
    monkeypatch.setattr(shared_catalog, "FIND_OUT_S", 0.0)

    def execute(self: Any, query: Any, *more: Any, **options: Any) -> Any:
        if cut.is_set() and not back:
            raise psycopg.OperationalError("there is no way")
        if query == "COMMIT" and not cut.is_set():
            cut.set()
            if made:
                real(self, query)
            self.close()
            raise psycopg.OperationalError("the answer was lost")
        return real(self, query, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Connection, "execute", execute)
        if made and back:
            assert push(registry, "chat", adapters(2), allow_replace=True).replaced
        else:
            outcome = "unchanged" if back else "unknown"
            with refused(Unavailable, cause="catalog", outcome=outcome):
                push(registry, "chat", adapters(2), allow_replace=True)
            assert registry.resolve("chat") == first
    again = push(registry, "chat", adapters(2), allow_replace=True)
    assert again.published != made, "the same call again does nothing twice"
    events = [line.event for line in registry.history("chat")]
    assert events == ["replaced", "published"]
    assert opened().list() == registry.list()


@pytest.mark.push
def test_a_hung_database_is_given_up(
    opened: Open, adapters: Adapters, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = opened()
    monkeypatch.setattr("veneer_registry.shared.postgres.ANSWER_S", 1.0)
    with services.postgres.connect() as other:
        catalog = catalog_of(registry)
        assert isinstance(catalog, PostgresCatalog)
        other.execute("SELECT pg_advisory_lock(%s)", [catalog.lock_key])
        with refused(Unavailable, cause="catalog"):
            push(registry, "chat", adapters(1))
    push(registry, "chat", adapters(1))


# ------------------------------------------------------------------------ backups


def test_an_older_backup_is_refused(
    services: Services, opened: Open, adapters: Adapters, name: str
) -> None:
    with opened("one") as registry:
        push(registry, "chat", adapters(1))
        push(registry, "chat", adapters(2), allow_replace=True)
    execute(
        services,
        name,
        "UPDATE counter SET value = value - 1",
        "DELETE FROM changes WHERE number = (SELECT max(number) FROM changes)",
    )
    with refused(StoreMismatch, found="catalog older than store"):
        opened("one")


def test_a_backup_that_has_been_used_since_is_refused(
    services: Services, opened: Open, adapters: Adapters, name: str
) -> None:
    with opened("one") as registry:
        push(registry, "chat", adapters(1))
    execute(services, name, "UPDATE changes SET token = 'another' WHERE number > 0")
    with refused(StoreMismatch, found="catalog of another history"):
        opened("one")


def test_a_backup_restored_while_serving_is_noticed(
    services: Services,
    opened: Open,
    adapters: Adapters,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = opened()
    kept = push(registry, "kept", adapters(1)).record
    push(registry, "lost", adapters(2))
    execute(
        services,
        name,
        *(f"DELETE FROM {t} WHERE name = 'lost'" for t in ("revisions", "names", "history")),
        "UPDATE counter SET value = value - 1",
        "DELETE FROM changes WHERE number = (SELECT max(number) FROM changes)",
    )
    with caplog.at_level(logging.ERROR):
        push(registry, "new", adapters(3))
    assert "restored from an older backup" in caplog.text
    assert [r.ref.name for r in registry.list()] == ["kept", "new"]
    assert registry.get("kept") == kept


def test_another_store_is_refused(
    services: Services, opened: Open, adapters: Adapters, name: str, tmp_path: Path
) -> None:
    with opened("one") as registry:
        push(registry, "chat", adapters(1))
    other = services.s3.objects(f"{name}-other")
    places = SharedLocations(
        tmp_path / "two", services.address(name), other, cache_bytes=1 << 30
    )
    with refused(StoreMismatch, found="store empty"):
        Registry.open(tmp_path / "two", BASE, places=places)


def test_a_registry_that_is_paused_with_the_lock_stops_others_only_for_a_while(
    opened: Open, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes to a halt between two statements, as with SIGSTOP, loses the lock."""
    monkeypatch.setattr(shared_catalog, "HOLD_S", 0.5)
    one, other = opened(), opened()
    revision = push(one, "chat", adapters(1)).record.ref.revision
    paused, catalog = core_of(one), cast(PostgresCatalog, catalog_of(one))
    with paused.changes:
        other.set_alias("chat/prod", [(revision, 1)])
        with refused(Unavailable, cause="catalog"):
            one.set_alias("chat/late", [(revision, 1)])
        with refused(Unavailable, cause="catalog"):
            catalog.check_held()
    one.set_alias("chat/again", [(revision, 1)])
    assert {alias.alias for alias in one.aliases("chat")} == {"prod", "again"}
    with paused.changes:
        catalog.check_held()


def test_a_registry_that_lost_the_lock_deletes_nothing_from_the_store(
    services: Services,
    opened: Open,
    adapters: Adapters,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another may be storing the same content again."""
    registry = opened()
    weights = push(registry, "chat", adapters(1)).record.ref.weights_digest
    registry.delete("chat")
    registry.sweep()
    monkeypatch.setattr(unneeded, "GRACE_S", -60.0)
    objects = services.s3.objects(name)

    def paused(*_: object) -> None:
        """What PostgreSQL does with the session of a registry that says nothing."""
        with services.postgres.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            )

    quarantine = cast(ObjectStore, core_of(registry).store).quarantine
    held = quarantine.check_held
    monkeypatch.setattr(quarantine, "check_held", lambda: (paused(), held()))
    with refused(Unavailable, cause="catalog"):
        registry.prune_quarantine(1 << 30, 3600)
    assert objects.any(f"weights/{weights}")
