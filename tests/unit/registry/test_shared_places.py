"""Several registries on one PostgreSQL and one object store, and what happens when one of the
two fails."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import (
    AdapterCorrupt,
    AdapterExists,
    FailedPrecondition,
    InvalidField,
    StoreMismatch,
    Unavailable,
)
from veneer_registry.rebuild import recover
from veneer_registry.registry import Registry
from veneer_registry.rows import HistoryRow
from veneer_registry.shared import catalog as shared_catalog
from veneer_registry.shared import unneeded
from veneer_registry.shared.catalog import PostgresCatalog
from veneer_registry.shared.objects import check_url
from veneer_registry.shared.places import SharedPlaces
from veneer_registry.shared.postgres import Address
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.upkeep import collect, verify
from veneer_registry.weights import WEIGHTS_FILE
from veneer_server.serving.adapters.events import AdapterEvents
from veneer_server.serving.tenants.elsewhere import tell_of_others

from tests.refused import refused
from tests.shared_services import BUCKET, Services
from tests.unit.registry.kit import BASE, announce, bundle_files, catalog_of, push, send

Adapters = Callable[[int], Path]
Open = Callable[..., Registry]
WAIT_S = 20.0


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


class Watched:
    """The lines that a registry was told."""

    def __init__(self, registry: Registry) -> None:
        self.lines: list[HistoryRow] = []
        self._more = threading.Condition()
        registry.watch(self._told)

    def _told(self, lines: Any) -> None:
        with self._more:
            self.lines += lines
            self._more.notify_all()

    def until(self, count: int) -> list[HistoryRow]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.lines) >= count, WAIT_S), self.lines
        return self.lines


def flipped(data: bytes) -> bytes:
    """The same with one bit flipped."""
    return data[:-1] + bytes([data[-1] ^ 1])


def execute(services: Services, name: str, *statements: str) -> None:
    """Change a catalog behind the back of its registries."""
    with services.postgres.connect() as connection:
        schema = sql.Identifier(services.address(name).schema)
        connection.execute(sql.SQL("SET search_path TO {}").format(schema))
        for statement in statements:
            connection.execute(statement)  # type: ignore[call-overload]


# ------------------------------------------------------------------ several registries


def test_what_one_publishes_the_other_serves(opened: Open, adapters: Adapters) -> None:
    one, two = opened(), opened()
    watched = Watched(two)
    ref = push(one, "chat", adapters(1), labels={"team": "a"}).record.ref
    (line,) = watched.until(1)
    assert (line.event, line.name, line.revision) == ("published", "chat", ref.revision)
    with two.acquire("chat") as lease:
        assert lease.record == one.get("chat")
        assert not two.is_local(lease.ref)
        two.fetch(lease.ref)
        assert two.is_local(lease.ref)
        verify_weights(two.weights_folder(lease.ref), ref.weights_digest)
    one.set_alias("chat/prod", [(ref.revision, 1)])
    watched.until(2)
    assert two.resolve("chat/prod") == ref
    two.delete("chat")
    push(two, "mail", adapters(1))
    with pytest.raises(AdapterExists):
        push(one, "mail", adapters(2))
    assert len(one) == 1


def test_changes_at_once_are_all_made_and_none_is_missed(
    opened: Open, adapters: Adapters
) -> None:
    """Each number once, and every registry ends with the same."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    one, two, third = opened(), opened(), opened()
    watched = Watched(third)
    failed: list[BaseException] = []

    def work(registry: Registry, own: str) -> None:
        rng = random.Random(f"{seed} {own}")
        try:
            for _ in range(6):
                name = rng.choice((own, "both"))
                push(registry, name, adapters(rng.randrange(3)), allow_replace=True)
                # Content that nobody needs is removed by one while others store it.
                registry.sweep()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=a) for a in ((one, "one"), (two, "two"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    end = push(one, "end", adapters(0)).record
    history = one.history(limit=1000)[::-1]
    lines = watched.until(len(history))
    assert lines == list(history)
    assert [line.sequence for line in lines] == list(range(1, len(lines) + 1))
    assert len({r.etag for r in (*one.list(), end)}) == len(one)
    for registry in (two, third):
        registry.sweep()  # returns with all changes applied
        assert registry.list() == one.list()
    for record in one.list():
        with third.acquire(record.ref.name) as lease:
            third.fetch(lease.ref)
            verify_weights(third.weights_folder(lease.ref), lease.ref.weights_digest)


def test_who_was_slower_is_refused(opened: Open, adapters: Adapters) -> None:
    """Each decides on what the other has done, whether it has heard of it or not."""
    one, two = opened(), opened()
    files = bundle_files(adapters(2))
    with two.stage(send(two.begin_upload(announce("chat", files)), files)) as staged:
        ref = push(one, "chat", adapters(1)).record.ref
        with refused(AdapterExists, adapter="chat", current=ref.revision):
            two.commit(staged)
    assert one.resolve("chat") == ref


def test_a_request_never_loses_its_name_to_a_replace_elsewhere(
    opened: Open, adapters: Adapters
) -> None:
    one, two = opened(retain_superseded=0), opened(retain_superseded=0)
    watched = Watched(two)
    push(one, "chat", adapters(0))
    watched.until(1)
    stop, failed = threading.Event(), list[BaseException]()

    def ask() -> None:
        try:
            while not stop.is_set():
                two.acquire("chat").release()
        except BaseException as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    for n in range(1, 7):
        push(one, "chat", adapters(n % 3), allow_replace=True)
    watched.until(1 + 6 * 2)
    stop.set()
    asking.join()
    assert failed == []


def test_a_registry_that_was_away_for_long_reads_everything_again(
    opened: Open, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = opened(), opened()
    watched = Watched(two)
    monkeypatch.setattr(shared_catalog, "KEPT_CHANGES", 1)
    with catalog_of(two).exclusive.here():  # keeps its watcher waiting
        for n in range(4):
            push(one, f"name-{n}", adapters(n))
    assert [line.name for line in watched.until(4)] == [f"name-{n}" for n in range(4)]
    assert two.list() == one.list()


async def test_watchers_of_a_server_are_told_of_the_others(
    opened: Open, adapters: Adapters
) -> None:
    one, two = opened(retain_superseded=0), opened(retain_superseded=0)
    events = AdapterEvents()
    start = events.last
    tell_of_others(two, events)

    def change() -> None:
        first = push(one, "chat", adapters(1)).record.ref
        one.set_alias("chat/prod", [(first.revision, 1)])
        one.remove_alias("chat/prod")
        push(one, "chat", adapters(2), allow_replace=True)
        one.update("chat", labels={"team": "a"})
        one.delete("chat")

    await asyncio.to_thread(change)
    async with asyncio.timeout(WAIT_S):
        while len(told := events.after(start) or ()) < 7:
            await events.beyond(told[-1].sequence if told else start)
    assert [adapters_pb2.AdapterEvent.Name(each.kind)[14:] for each in told] == [
        *("PUBLISHED", "ALIAS_CHANGED", "ALIAS_CHANGED", "REPLACED", "DELETED"),
        *("UPDATED", "DELETED"),
    ]


# ------------------------------------------------------------------- the database fails


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
    places = SharedPlaces(tmp_path / "two", services.address(name), other, cache_bytes=1 << 30)
    with refused(StoreMismatch, found="store empty"):
        Registry.open(tmp_path / "two", BASE, places=places)


# ------------------------------------------------------------------ the store fails


@pytest.mark.parametrize(("kind", "skip"), [("refuse", 0), ("cut", 2), ("lose", 1), ("cut", 3)])
def test_a_store_that_fails_publishes_nothing(
    services: Services, opened: Open, adapters: Adapters, kind: str, skip: int
) -> None:
    registry = opened()
    services.s3.fail(kind=kind, methods=["PUT"], skip=skip)
    try:
        with refused(Unavailable, cause="object_store"):
            push(registry, "chat", adapters(1))
    finally:
        services.s3.fail()
    assert registry.list() == opened().list() == ()
    record = push(registry, "chat", adapters(1)).record
    other = opened()
    other.fetch(other.resolve("chat"))
    verify_weights(other.weights_folder(record.ref), record.ref.weights_digest)


@pytest.mark.parametrize("kind", ["refuse", "lose"])
def test_a_short_failure_is_survived(
    services: Services, opened: Open, adapters: Adapters, kind: str
) -> None:
    registry = opened()
    services.s3.fail(kind=kind, methods=["PUT"], count=1)
    assert push(registry, "chat", adapters(1)).published
    services.s3.fail()


def test_what_was_read_is_compared_with_its_digest(
    services: Services, opened: Open, adapters: Adapters, name: str
) -> None:
    ref = push(opened(), "chat", adapters(1)).record.ref
    other, objects = opened(), services.s3.objects(name)
    key = f"weights/{ref.weights_digest}/{WEIGHTS_FILE}"
    whole = objects.read(key)
    assert whole
    objects.write(key, flipped(whole))
    with refused(AdapterCorrupt, weights_digest=ref.weights_digest):
        other.fetch(ref)
    assert not other.is_local(ref)
    objects.write(key, whole)
    services.s3.fail(kind="rot", methods=["GET"], key="safetensors")  # on the way
    try:
        with pytest.raises((AdapterCorrupt, Unavailable)):
            other.fetch(ref)
        assert not other.is_local(ref)
    finally:
        services.s3.fail()
    other.fetch(ref)
    verify_weights(other.weights_folder(ref), ref.weights_digest)


def test_half_a_multipart_upload_is_never_seen(
    services: Services, opened: Open, name: str
) -> None:
    opened()
    objects = services.s3.objects(name)
    call = objects.fs.call_s3
    key = f"{name}/weights/{'ab' * 32}/{WEIGHTS_FILE}"
    begun = call("create_multipart_upload", Bucket=BUCKET, Key=key)
    part = {"UploadId": begun["UploadId"], "PartNumber": 1, "Body": b"x" * 100}
    call("upload_part", Bucket=BUCKET, Key=key, **part)
    assert not objects.any("weights")
    assert objects.drop_stale_parts(0.0) == 0
    assert objects.drop_stale_parts(time.time() + 2 * 86400) == 1


# ------------------------------------------------------------------ cache and garbage


def test_the_cache_is_bounded_but_for_what_is_leased(opened: Open, adapters: Adapters) -> None:
    first = opened()
    refs = [push(first, f"n{n}", adapters(n)).record.ref for n in range(3)]
    size = sum(
        (first.weights_folder(refs[0]) / f).stat().st_size for f in bundle_files(adapters(0))
    )
    other = opened(cache_bytes=max(2 * size, 1))
    with other.acquire("n0") as lease:
        for ref in refs:
            other.fetch(ref)
        assert [other.is_local(ref) for ref in refs] == [True, False, True]
        verify_weights(other.weights_folder(lease.ref), lease.ref.weights_digest)
    other.fetch(refs[1])
    assert other.is_local(refs[1])
    assert sum(map(other.is_local, refs)) == 2


def test_a_revision_is_given_back_where_nothing_of_it_lies(
    opened: Open, adapters: Adapters
) -> None:
    folder = adapters(1)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    push(opened(), "chat", folder)
    other = opened("other")
    with other.acquire("chat") as lease, other.bundle_files(lease.ref) as paths:
        found = {name: path.read_bytes() for name, path in paths.items()}
    assert found == bundle_files(folder)
    assert "chat_template.jinja" in found


def test_a_damaged_copy_is_fetched_again(opened: Open, adapters: Adapters) -> None:
    registry = opened()
    ref = push(registry, "chat", adapters(1)).record.ref
    path = registry.weights_folder(ref) / WEIGHTS_FILE
    path.write_bytes(flipped(path.read_bytes()))
    assert registry.quarantine(ref.weights_digest, "test") == ()
    assert registry.resolve("chat") == ref
    verify_weights(registry.weights_folder(ref), ref.weights_digest)


def test_a_damaged_object_is_quarantined_until_it_is_pushed_again(
    services: Services, opened: Open, adapters: Adapters, name: str
) -> None:
    registry, other = opened(), opened()
    ref = push(registry, "chat", adapters(1)).record.ref
    objects = services.s3.objects(name)
    key = f"weights/{ref.weights_digest}/{WEIGHTS_FILE}"
    data = objects.read(key)
    assert data
    objects.write(key, flipped(data))
    watched = Watched(other)
    assert registry.quarantine(ref.weights_digest, "test") == (ref,)
    watched.until(1)
    for each in (registry, other):
        with pytest.raises(AdapterCorrupt):
            each.resolve("chat")
    assert objects.read(f"quarantine/{ref.weights_digest}/{WEIGHTS_FILE}")
    push(registry, "chat", adapters(1))
    watched.until(2)
    assert other.resolve("chat") == ref
    other.fetch(ref)
    verify_weights(other.weights_folder(ref), ref.weights_digest)


def test_what_nobody_needs_is_deleted_later_unless_it_is_pushed_again(
    services: Services,
    opened: Open,
    adapters: Adapters,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = opened()
    gone = push(registry, "gone", adapters(1)).record.ref
    back = push(registry, "back", adapters(2)).record.ref
    registry.delete("gone")
    registry.delete("back")
    objects = services.s3.objects(name)
    there = lambda ref: bool(objects.list(f"weights/{ref.weights_digest}"))  # noqa: E731
    registry.prune_quarantine(1 << 30, 3600)
    assert there(gone), "another registry may be about to read it"
    push(registry, "back", adapters(2))
    monkeypatch.setattr(unneeded, "GRACE_S", -60.0)
    registry.prune_quarantine(1 << 30, 3600)
    assert not there(gone)
    assert there(back)
    assert not objects.list("unneeded")
    assert not objects.list(f"revisions/{gone.revision}")


# --------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "url", ["", "s3://", "s3:///x", "gs://b/x", "s3://b/../x", "s3://b/a b", "/tmp/x"]
)
def test_bad_store_urls(url: str) -> None:
    with refused(InvalidField, field="store"):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mysql://x/y",
        "host=x",
        "postgresql://u:secret@h/d",
        "postgresql://h/d?password=secret",
    ],
)
def test_bad_catalog_urls(url: str) -> None:
    with refused(InvalidField, field="catalog") as caught:
        Address(url).check()
    assert "secret" not in str(caught.value)


def test_a_folder_with_a_catalog_of_its_own_is_refused(
    opened: Open, adapters: Adapters, tmp_path: Path
) -> None:
    with Registry.open(tmp_path / "mine", BASE) as registry:
        push(registry, "chat", adapters(1))
    with refused(InvalidField, field="data_dir"):
        opened("mine")


@pytest.mark.parametrize(
    "command",
    [
        verify,
        recover,
        lambda data: collect(data, uploads_older_than=0, quarantine=False, dry_run=True),
    ],
)
def test_commands_for_folders_say_that_the_adapters_are_elsewhere(
    opened: Open, tmp_path: Path, command: Callable[[Path], object]
) -> None:
    opened("one").close()
    with refused(FailedPrecondition, cause="shared"):
        command(tmp_path / "one")


def test_a_wrong_password_is_told_without_it(services: Services, tmp_path: Path) -> None:
    wrong = tmp_path / "password"
    wrong.write_text("not-the-one")
    address = Address(services.postgres.url, wrong)
    places = SharedPlaces(
        tmp_path / "data", address, services.s3.objects("x"), cache_bytes=1 << 30
    )
    with refused(Unavailable, cause="catalog") as caught:
        Registry.open(tmp_path / "data", BASE, places=places)
    assert "not-the-one" not in str(caught.value)
