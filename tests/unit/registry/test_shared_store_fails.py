"""Registries that share places while their object store fails, and what of it they keep."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from veneer_registry.errors import (
    AdapterCorrupt,
    Unavailable,
)
from veneer_registry.shared import object_store, unneeded
from veneer_registry.shared.exclusive import SharedExclusive
from veneer_registry.shared.marks import ContentMarks, Mark
from veneer_registry.shared.object_store import ObjectStore
from veneer_registry.shared.objects import Objects
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.weights import WEIGHTS_FILE

from tests.refused import refused
from tests.shared_services import BUCKET, Services
from tests.unit.registry.kit import bundle_files, core_of, push
from tests.unit.registry.shared_kit import WAIT_S, Adapters, Open, Watched, flipped

# ------------------------------------------------------------------ the store fails


@pytest.mark.push
@pytest.mark.parametrize(("kind", "skip"), [("refuse", 0), ("cut", 1), ("lose", 1), ("cut", 2)])
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


@pytest.mark.parametrize("whole_bucket", [False, True])
def test_all_interrupted_uploads_are_removed(
    services: Services, name: str, whole_bucket: bool
) -> None:
    """More than the store lists in one answer; and in a bucket without a prefix."""
    objects = services.s3.objects(BUCKET if whole_bucket else name)
    call, folder = objects.fs.call_s3, "" if whole_bucket else f"{name}/"
    for at in range(5):  # the fake lists two at a time
        key = f"{folder}weights/{at:064x}/{WEIGHTS_FILE}"
        call("create_multipart_upload", Bucket=BUCKET, Key=key)
    assert objects.drop_stale_parts(time.time() + 2 * 86400) == 5
    left = call("list_multipart_uploads", Bucket=BUCKET, Prefix=f"{folder}weights/")
    assert "Uploads" not in left


def test_servers_that_start_at_once_remove_the_same_interrupted_upload(
    services: Services, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAKE: another server removes it between the listing and the removal."""
    objects = services.s3.objects(name)
    call = objects.fs.call_s3
    key = f"{name}/weights/{'cd' * 32}/{WEIGHTS_FILE}"
    call("create_multipart_upload", Bucket=BUCKET, Key=key)

    def after_the_other(method: str, **asked: Any) -> Any:
        if method == "abort_multipart_upload":
            call(method, **asked)
        return call(method, **asked)

    monkeypatch.setattr(objects.fs, "call_s3", after_the_other)
    assert objects.drop_stale_parts(time.time() + 2 * 86400) == 0
    assert "Uploads" not in call("list_multipart_uploads", Bucket=BUCKET, Prefix=key)


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


def test_weights_are_fetched_once_at_a_time_also_after_a_failure(
    services: Services, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each download takes disk and network for a whole adapter. All of these fail."""
    marks = ContentMarks(services.address(name))
    store = ObjectStore(services.s3.objects(name), tmp_path / "cache", 1 << 30, marks)
    store.keep_while(lambda weights: 0, lambda digest: True)
    get, lock = store.objects.get, threading.Lock()
    now, most = 0, 0

    def counted(key: str, to: Path) -> bool:
        nonlocal now, most
        with lock:
            now += 1
            most = max(now, most)
        try:
            return get(key, to)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(store.objects, "get", counted)

    def fetch() -> None:
        for _ in range(5):
            with refused(AdapterCorrupt, why="gone"):
                store.fetch("ab" * 32)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(fetch) for _ in range(4)]:
            done.result()
    assert most == 1


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
    push(registry, "chat", adapters(1))
    watched.until(2)
    assert other.resolve("chat") == ref
    assert objects.read(key) == data
    other.fetch(ref)
    verify_weights(other.weights_folder(ref), ref.weights_digest)


def test_a_push_that_learns_late_that_the_object_is_damaged_overwrites_it(
    services: Services,
    opened: Open,
    adapters: Adapters,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another registry notices the damage after this one has found the object in place."""
    registry, other = opened(), opened()
    ref = push(registry, "chat", adapters(1)).record.ref
    objects = services.s3.objects(name)
    key = f"weights/{ref.weights_digest}/{WEIGHTS_FILE}"
    data = objects.read(key)
    assert data
    objects.write(key, flipped(data))
    prepare = ObjectStore.prepare

    def beside(store: ObjectStore, *what: Any, **how: Any) -> bool:
        found = prepare(store, *what, **how)
        registry.quarantine(ref.weights_digest, "test")
        return found

    monkeypatch.setattr(ObjectStore, "prepare", beside)
    push(other, "chat", adapters(1))
    assert objects.read(key) == data
    assert other.resolve("chat") == ref


def marked(services: Services, name: str) -> list[Mark]:
    marks = ContentMarks(services.address(name))
    try:
        return marks.marked()
    finally:
        marks.close()


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
    assert not marked(services, name)
    assert not objects.list(f"revisions/{gone.revision}")


def test_a_read_that_was_damaged_on_its_way_condemns_no_intact_object(
    opened: Open, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy on this disk is damaged, and so is what is read to replace it, once."""
    registry = opened()
    ref = push(registry, "chat", adapters(1)).record.ref
    file = registry.weights_folder(ref) / WEIGHTS_FILE
    file.chmod(0o600)
    file.write_bytes(flipped(file.read_bytes()))
    objects, reads = cast(ObjectStore, core_of(registry).store).objects, []
    get = objects.get

    def once_damaged(key: str, to: Path) -> bool:
        """FAKE: a store whose protocol has no checksums."""
        found = get(key, to)
        reads.append(key)
        if key.endswith(WEIGHTS_FILE) and len(reads) == 2:
            to.write_bytes(flipped(to.read_bytes()))
        return found

    monkeypatch.setattr(objects, "get", once_damaged)
    assert registry.quarantine(ref.weights_digest, "a bit has flipped") == ()
    assert len(reads) == 4
    assert opened().resolve("chat") == ref
    verify_weights(registry.weights_folder(ref), ref.weights_digest)


def test_what_an_upload_that_broke_off_left_is_deleted(
    services: Services,
    opened: Open,
    adapters: Adapters,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it is old; and nothing of a push that goes on, nor what a name has."""
    registry, objects = opened(), services.s3.objects(name)
    kept = push(registry, "kept", adapters(1)).record.ref
    broken = {f"weights/{'a' * 64}/adapter_config.json", f"revisions/{'b' * 64}/README.md"}
    lost = f"weights/{kept.weights_digest}/{WEIGHTS_FILE}"
    for key in broken:
        objects.write(key, b"{}")
    objects.delete([lost])
    for key in ("weights", "revisions/odd", f"weights/{'c' * 64}/deep/er"):
        objects.write(key, b"of somebody else")
    opened()
    assert not marked(services, name), "they may be on their way"
    monkeypatch.setattr(object_store, "_BROKEN_S", -60.0)
    monkeypatch.setattr(unneeded, "GRACE_S", -60.0)
    opened().prune_quarantine(1 << 30, 3600)
    left = {*objects.list("weights"), *objects.list("revisions")}
    assert not broken & left
    assert f"weights/{kept.weights_digest}/adapter_config.json" in left


def test_marks_of_an_older_version_are_taken_over(
    services: Services, opened: Open, adapters: Adapters, name: str
) -> None:
    """They were objects."""
    with opened("one") as registry:
        push(registry, "kept", adapters(1))
    objects, digest = services.s3.objects(name), "d" * 64
    objects.write(f"unneeded/weights/{digest}", b"")
    opened("one")
    assert [(mark.kind, mark.digest) for mark in marked(services, name)] == [
        ("weights", digest)
    ]
    assert not objects.list("unneeded")


def test_the_store_is_asked_nothing_under_the_lock_of_the_catalog(
    opened: Open, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow it is, others change what they like meanwhile."""
    registry = opened()
    lock = cast(SharedExclusive, core_of(registry).changes)
    errors, under, asked = Objects._errors, [], []

    @contextlib.contextmanager
    def noting(objects: Objects, local: Path | None = None) -> Iterator[None]:
        # The thread `mark` writes the last change's number, whenever it gets to it.
        here = threading.current_thread().name != "mark"
        found = under if lock.held and here else asked
        found.append("".join(traceback.format_stack(limit=6)))
        with errors(objects, local):
            yield

    monkeypatch.setattr(Objects, "_errors", noting)
    revisions = []
    for seed in (1, 2, 3, 4):
        pushed = push(registry, "chat", adapters(seed), allow_replace=True)
        revisions.append(pushed.record.ref.revision)
    push(registry, "same", adapters(4))
    registry.update("chat", labels={"a": "b"})
    registry.set_alias("chat/prod", [(revisions[-1], 1)])
    registry.quarantine(registry.resolve("same").weights_digest, "a bit has flipped")
    registry.remove_alias("chat/prod")
    for name in ("chat", "same"):
        registry.delete(name)
    registry.sweep()
    monkeypatch.setattr(unneeded, "GRACE_S", -60.0)
    assert registry.prune_quarantine(1 << 30, 3600)
    assert asked
    assert not under, under[0]


def test_a_push_waits_while_its_content_is_being_deleted(
    services: Services,
    opened: Open,
    adapters: Adapters,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, other = opened(), opened()
    weights = push(registry, "chat", adapters(1)).record.ref.weights_digest
    registry.delete("chat")
    registry.sweep()
    monkeypatch.setattr(unneeded, "GRACE_S", -60.0)
    deleting, pushing = threading.Event(), threading.Event()
    delete, claimed = Objects.delete, ContentMarks._claimed

    def slow(objects: Objects, keys: Any) -> None:
        deleting.set()
        assert pushing.wait(WAIT_S)
        delete(objects, keys)

    def told(marks: ContentMarks, *asked: Any) -> bool:
        found = claimed(marks, *asked)
        pushing.set()
        return found

    monkeypatch.setattr(Objects, "delete", slow)
    pruning = threading.Thread(target=registry.prune_quarantine, args=(1 << 30, 3600))
    pruning.start()
    assert deleting.wait(WAIT_S)
    monkeypatch.setattr(ContentMarks, "_claimed", told)
    ref = push(other, "again", adapters(1)).record.ref
    pruning.join()
    assert ref.weights_digest == weights
    anew = opened()
    anew.fetch(ref)
    verify_weights(anew.weights_folder(ref), weights)
    assert not marked(services, name)
