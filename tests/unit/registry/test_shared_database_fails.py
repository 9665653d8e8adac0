"""Registries that share places while their database fails, or is restored from a backup."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from veneer_registry.errors import (
    StoreMismatch,
    Unavailable,
)
from veneer_registry.registry import Registry
from veneer_registry.shared import catalog as shared_catalog
from veneer_registry.shared import postgres, unneeded
from veneer_registry.shared.catalog import PostgresCatalog
from veneer_registry.shared.locations import SharedLocations
from veneer_registry.shared.object_store import ObjectStore
from veneer_registry.shared.postgres import PostgresLink

from tests.refused import refused
from tests.shared_services import Services
from tests.unit.registry.kit import BASE, catalog_of, core_of, push
from tests.unit.registry.shared_kit import WAIT_S, Adapters, Open, execute

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
    monkeypatch.setattr(postgres, "HOLD_S", 0.5)
    one, other = opened(), opened()
    revision = push(one, "chat", adapters(1)).record.ref.revision
    paused = core_of(one)
    with paused.changes:
        other.set_alias("chat/prod", [(revision, 1)])
        with refused(Unavailable, cause="catalog"):
            one.set_alias("chat/late", [(revision, 1)])
    one.set_alias("chat/again", [(revision, 1)])
    assert {alias.alias for alias in one.aliases("chat")} == {"prod", "again"}


def test_a_registry_that_is_paused_while_it_waits_for_the_lock_does_not_keep_it(
    services: Services, opened: Open, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the lock, and does not go on to its next statement."""
    monkeypatch.setattr(postgres, "HOLD_S", 0.5)
    one, other = opened(), opened()
    revision = push(one, "chat", adapters(1)).record.ref.revision
    real, paused, end = psycopg.Connection.execute, threading.Event(), threading.Event()

    def execute(self: Any, query: Any, *more: Any, **options: Any) -> Any:
        found = real(self, query, *more, **options)
        if "pg_advisory_lock" in str(query) and threading.current_thread().name == "paused":
            paused.set()
            end.wait()
        return found

    def change() -> None:
        one.set_alias("chat/late", [(revision, 1)])

    monkeypatch.setattr(psycopg.Connection, "execute", execute)
    monkeypatch.setattr(PostgresLink, "wake", lambda link: None)  # all of it is paused
    thread = threading.Thread(target=change, name="paused")
    thread.start()
    assert paused.wait(WAIT_S)
    try:
        other.set_alias("chat/prod", [(revision, 1)])
    finally:
        end.set()
        thread.join()
    assert {alias.alias for alias in one.aliases("chat")} == {"late", "prod"}


class Line:
    """Forwards a registry's connections to PostgreSQL, through Unix sockets.

    Attributes:
        url: what the registry connects to.
        sent: bytes that the registry has sent.
    """

    def __init__(self, folder: Path, url: str) -> None:
        place = parse_qs(urlsplit(url).query)["host"][0]
        self.url = url.replace(place, str(folder))
        self.sent = 0
        self._server = f"{place}/.s.PGSQL.5432"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        self._lock = threading.Lock()
        self._left: int | None = None
        self._paused = threading.Event()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def paused_after(self, size: int) -> Iterator[threading.Event]:
        """Forward ``size`` more bytes of the registry, then nothing, as if it were paused.
        Yield what is set then. At the end the connections are cut."""
        self._paused.clear()
        self._left = size
        try:
            yield self._paused
        finally:
            with self._lock:
                self._left = None
                for each in self._open:
                    with suppress(OSError):  # it has been closed
                        each.shutdown(socket.SHUT_RDWR)
                self._open.clear()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.socket(socket.AF_UNIX)
                there.connect(self._server)
                self._open += [here, there]
                threading.Thread(target=self._to_server, args=(here, there)).start()
                threading.Thread(target=self._to_registry, args=(there, here)).start()

    def _to_server(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError), here:
            while data := here.recv(65536):
                with self._lock:
                    if self._left is not None:
                        data, self._left = data[: self._left], self._left - len(data)
                        if self._left <= 0:
                            self._left = 0
                            self._paused.set()
                    self.sent += len(data)
                    there.sendall(data)

    def _to_registry(self, there: socket.socket, here: socket.socket) -> None:
        with suppress(OSError), there:
            while data := there.recv(65536):
                here.sendall(data)
            here.shutdown(socket.SHUT_RDWR)


@pytest.mark.push
def test_wherever_a_registry_is_paused_in_a_change_it_stops_others_only_for_a_while(
    services: Services,
    opened: Open,
    adapters: Adapters,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with half of a statement sent, or in the middle of several."""
    other = opened()
    monkeypatch.setattr(postgres, "HOLD_S", 0.3)
    # The other registry keeps its own limit, on a slow machine too.
    catalog: Any = core_of(other).catalog
    may_idle = catalog._may_idle
    monkeypatch.setattr(catalog, "_may_idle", lambda on, seconds: may_idle(on, 100 * seconds))
    chosen = [(push(other, "chat", adapters(1)).record.ref.revision, 1)]
    (folder := tmp_path / "line").mkdir()
    line = Line(folder, services.address(name).url)
    places = SharedLocations(
        tmp_path / "paused",
        replace(services.address(name), url=line.url),
        services.s3.objects(name),
        cache_bytes=1 << 30,
    )
    with closing(line), Registry.open(tmp_path / "paused", BASE, places=places) as one:
        one.set_alias("chat/first", chosen)
        before = line.sent
        one.set_alias("chat/counted", chosen)
        change = line.sent - before
        for part in range(1, 13):

            def paused(part: int = part) -> None:
                with suppress(Unavailable):
                    one.set_alias(f"chat/paused-{part}", chosen)

            with line.paused_after(change * part // 13) as stopped:
                thread = threading.Thread(target=paused)
                thread.start()
                assert stopped.wait(WAIT_S)
                other.set_alias(f"chat/other-{part}", chosen)
            thread.join()
        assert len(other.aliases("chat")) >= 2 + 12


def test_a_registry_that_was_paused_while_it_deleted_stops(
    services: Services,
    opened: Open,
    adapters: Adapters,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another has stored the same content again meanwhile."""
    registry, other = opened(), opened()
    weights = push(registry, "chat", adapters(1)).record.ref.weights_digest
    registry.delete("chat")
    registry.sweep()
    monkeypatch.setattr(unneeded, "GRACE_S", -60.0)
    quarantine = cast(ObjectStore, core_of(registry).store).quarantine
    remove = quarantine.remove

    def paused(chosen: Any) -> Any:
        execute(services, name, "UPDATE deleting SET until = now() - interval '1 second'")
        push(other, "again", adapters(1))
        return remove(chosen)

    monkeypatch.setattr(quarantine, "remove", paused)
    with pytest.raises(Unavailable, match="paused"):
        registry.prune_quarantine(1 << 30, 3600)
    assert services.s3.objects(name).any(f"weights/{weights}")
    monkeypatch.setattr(quarantine, "remove", remove)
    assert not registry.prune_quarantine(1 << 30, 3600)
    opened().fetch(other.resolve("again"))
