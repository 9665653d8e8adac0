"""Several registries on one PostgreSQL and one object store, and how they find both."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry.errors import (
    AdapterExists,
    FailedPrecondition,
    InvalidField,
    Unavailable,
)
from veneer_registry.rebuild import recover
from veneer_registry.records import AdapterRecord
from veneer_registry.registry import Registry
from veneer_registry.shared import catalog as shared_catalog
from veneer_registry.shared.locations import SharedLocations
from veneer_registry.shared.objects import check_url
from veneer_registry.shared.postgres import PostgresAddress
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.upkeep import collect, verify
from veneer_server.serving.events import AdapterEvents, Happened, tell_of_others

from tests.refused import refused
from tests.shared_services import Services
from tests.unit.registry.kit import BASE, announce, bundle_files, catalog_of, push, send
from tests.unit.registry.shared_kit import WAIT_S, Adapters, Open, Watched

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


@pytest.mark.push
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


@pytest.mark.push
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
    assert [each.kind for each in told] == [
        "published",
        "alias_changed",
        "alias_changed",
        "replaced",
        "deleted",
        "updated",
        "deleted",
    ]


async def test_each_target_of_an_alias_that_another_changes_has_an_event(
    opened: Open, adapters: Adapters
) -> None:
    """The contract: "one event for each target that it has now, or had before"."""
    one, two = opened(), opened()
    for n in range(3):
        push(one, "chat", adapters(n), allow_replace=True)
    targets = [record.ref.revision for record in one.revisions("chat")]
    events = AdapterEvents()
    start = events.last
    tell_of_others(two, events)

    def change() -> None:
        one.set_alias("chat/prod", [(targets[2], 1)])
        one.set_alias("chat/prod", [(targets[0], 9), (targets[1], 1)])
        one.remove_alias("chat/prod")
        one.update("chat", labels={"the": "end"})

    await asyncio.to_thread(change)
    told: tuple[Happened, ...] = ()
    async with asyncio.timeout(WAIT_S):
        while not told or told[-1].kind != "updated":
            await events.beyond(told[-1].sequence if told else start)
            told = events.after(start) or ()
    changed = [each for each in told if each.kind == "alias_changed"]
    assert {each.detail for each in changed} == {"chat/prod"}
    records = [each.subject for each in changed if isinstance(each.subject, AdapterRecord)]
    assert [record.ref.revision for record in records] == [
        targets[2],
        *targets[:2],
        *targets[:2],
    ]


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
        PostgresAddress(url).check()
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
    address = PostgresAddress(services.postgres.url, wrong)
    places = SharedLocations(
        tmp_path / "data", address, services.s3.objects("x"), cache_bytes=1 << 30
    )
    with refused(Unavailable, cause="catalog") as caught:
        Registry.open(tmp_path / "data", BASE, places=places)
    assert "not-the-one" not in str(caught.value)
