"""The registry as its callers see it: upload, publish, look up, lease, delete, reopen."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from veneer_registry.adapter import BaseFingerprint
from veneer_registry.bundle_files import TEMPLATE_FILE
from veneer_registry.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    BaseModelMismatch,
    CatalogDamaged,
    ChecksumMismatch,
    DiskFailed,
    DiskFull,
    EtagMismatch,
    FailedPrecondition,
    InvalidField,
    StoreLocked,
    VeneerError,
)
from veneer_registry.lock import OwnerLock
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.manifest_json import manifest_to_json
from veneer_registry.records import UploadFile, UploadRequest
from veneer_registry.registry import Registry
from veneer_registry.store import Store
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.weights import WEIGHTS_FILE

from tests.refused import refused
from tests.unit.registry.kit import (
    BASE,
    Kept,
    announce,
    bundle_files,
    catalog_of,
    limit_pages,
    make_adapter,
    make_tensors,
    push,
    send,
)

everywhere = pytest.mark.usefixtures("anywhere")


def staged(data: Path) -> list[str]:
    return [
        name for part in ("staging", "uploads") for name in os.listdir(data / "store" / part)
    ]


# ----------------------------------------------------------------------- publish


def open_files() -> int:
    """Without sockets, of which clients of a store keep some."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the folder itself
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith("/")
    return found


@pytest.mark.push
def test_publish_and_look_up(
    anywhere: Kept,
    registry: Registry,
    adapters: Callable[[int], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    push(registry, "first", adapters(0))  # opens connections that stay
    files = open_files()
    published = push(registry, "chat", adapters(1), labels={"team": "a"})
    assert open_files() == files
    assert caplog.text == ""
    assert published.published
    assert not published.replaced
    record = published.record
    assert record.current
    assert registry.resolve("chat") == record.ref
    assert registry.get("chat") == record
    assert registry.get(record.ref.short) == record
    assert registry.revisions("chat") == (record,)
    assert registry.list(prefix="chat") == (record,)
    assert record.labels == {"team": "a"}
    assert record.bytes == sum(len(d) for d in bundle_files(adapters(1)).values())
    verify_weights(registry.weights_folder(record.ref), record.ref.weights_digest)
    assert len(registry) == 2
    assert anywhere.staged() == []


@everywhere
def test_same_content_again(registry: Registry, adapters: Callable[[int], Path]) -> None:
    first = push(registry, "chat", adapters(1), labels={"a": "b"})
    again = push(registry, "chat", adapters(1))
    assert not again.published
    assert not again.replaced
    assert again.record == first.record
    other = push(registry, "chat", adapters(1), labels={"a": "c"})
    assert other.record.labels == {"a": "b"}
    assert "labels were not changed" in other.warnings[-1]


def test_other_content_needs_allow_replace(
    anywhere: Kept, registry: Registry, adapters: Callable[[int], Path]
) -> None:
    first = push(registry, "chat", adapters(1))
    with refused(AdapterExists, adapter="chat", current=first.record.ref.revision):
        push(registry, "chat", adapters(2))
    assert anywhere.staged() == []
    assert len(anywhere.stored("weights")) == 1
    second = push(registry, "chat", adapters(2), allow_replace=True)
    assert second.published
    assert second.replaced
    assert second.record.etag != first.record.etag
    assert registry.resolve("chat") == second.record.ref
    assert registry.resolve(first.record.ref.short) == first.record.ref
    newest, oldest = registry.revisions("chat")
    assert (newest.current, oldest.current) == (True, False)


@everywhere
def test_pushing_an_older_revision_brings_it_back(
    registry: Registry, adapters: Callable[[int], Path]
) -> None:
    first = push(registry, "chat", adapters(1))
    push(registry, "chat", adapters(2), allow_replace=True)
    with pytest.raises(AdapterExists):
        push(registry, "chat", adapters(1))
    back = push(registry, "chat", adapters(1), allow_replace=True)
    assert back.published
    assert back.replaced
    assert registry.resolve("chat") == first.record.ref
    assert len(registry.revisions("chat")) == 2


def test_a_template_makes_another_revision_of_the_same_weights(
    anywhere: Kept, registry: Registry, adapters: Callable[[int], Path]
) -> None:
    first = push(registry, "chat", adapters(1)).record
    (adapters(1) / TEMPLATE_FILE).write_text("{{ messages }}")
    second = push(registry, "chat", adapters(1), allow_replace=True).record
    assert second.ref.revision != first.ref.revision
    assert second.ref.weights_digest == first.ref.weights_digest
    assert second.manifest.chat_template == "{{ messages }}"
    assert len(anywhere.stored("weights")) == 1


@pytest.mark.parametrize("retain", [0, 1, 2])
def test_superseded_revisions_are_kept_by_count(
    anywhere: Kept, data: Path, adapters: Callable[[int], Path], retain: int
) -> None:
    with Registry.open(data, BASE, retain_superseded=retain) as registry:
        pushed = [push(registry, "chat", adapters(n), allow_replace=True) for n in range(4)]
        refs = [published.record.ref for published in pushed]
        kept = refs[::-1][: retain + 1]
        dropped = [ref for published in pushed for ref in published.dropped]
        assert dropped == refs[: 3 - retain]
        assert [record.ref for record in registry.revisions("chat")] == kept
        assert anywhere.stored("weights") == {r.weights_digest for r in kept}
        with pytest.raises(AdapterNotFound):
            registry.resolve(refs[0].short)


@pytest.mark.parametrize("exists", [False, True])
def test_validate_only(
    anywhere: Kept, registry: Registry, adapters: Callable[[int], Path], exists: bool
) -> None:
    if exists:
        push(registry, "chat", adapters(1))
    files = bundle_files(adapters(2))
    upload = send(registry.begin_upload(announce("chat", files, allow_replace=True)), files)
    checked = registry.validate(upload)
    assert not checked.published
    assert not checked.record.current
    assert checked.record.etag == (registry.get("chat").etag if exists else "")
    assert len(registry) == exists
    assert len(anywhere.stored("weights")) == exists
    assert anywhere.staged() == []
    if exists:
        upload = send(registry.begin_upload(announce("chat", files)), files)
        with pytest.raises(AdapterExists):
            registry.validate(upload)


@everywhere
def test_publishing_repairs_damage(registry: Registry, adapters: Callable[[int], Path]) -> None:
    ref = push(registry, "chat", adapters(1)).record.ref
    path = registry.weights_folder(ref) / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    again = push(registry, "chat", adapters(1))
    assert not again.published
    verify_weights(registry.weights_folder(ref), ref.weights_digest)


# --------------------------------------------------------------- bad announcements

SHA = "0" * 64
GOOD = (UploadFile(CONFIG_FILE, 10, SHA), UploadFile(WEIGHTS_FILE, 10, SHA))


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (UploadRequest("../x", GOOD), InvalidField, "'../x'"),
        (UploadRequest("", GOOD), InvalidField, "''"),
        (UploadRequest("A", GOOD), InvalidField, "'A'"),
        (UploadRequest("x" * 10_000, GOOD), InvalidField, "not allowed"),
        # Over HTTP, `model` names one or the other: the adapter would be out of reach.
        (UploadRequest("tiny", GOOD), InvalidField, "'tiny' is the base model"),
        (UploadRequest("x", GOOD[:1]), AdapterInvalid, f"{WEIGHTS_FILE} is missing"),
        (UploadRequest("x", GOOD[1:]), AdapterInvalid, f"{CONFIG_FILE} is missing"),
        (UploadRequest("x", (*GOOD, GOOD[0])), AdapterInvalid, "listed twice"),
        (
            UploadRequest("x", (*GOOD, UploadFile("adapter_model.bin", 1, SHA))),
            AdapterInvalid,
            "'adapter_model.bin' is a pickle",
        ),
        (
            UploadRequest("x", (*GOOD, UploadFile("../../etc/passwd", 1, SHA))),
            AdapterInvalid,
            "does not belong",
        ),
        (
            UploadRequest("x", (*GOOD, UploadFile(TEMPLATE_FILE, 65_537, SHA))),
            AdapterInvalid,
            "1 to 65536 are allowed",
        ),
        (
            UploadRequest("x", (GOOD[0], UploadFile(WEIGHTS_FILE, 3 << 30, SHA))),
            AdapterInvalid,
            "--max-adapter-bytes",
        ),
        (
            UploadRequest("x", (GOOD[0], UploadFile(WEIGHTS_FILE, 0, SHA))),
            AdapterInvalid,
            "announced with 0 bytes",
        ),
        (
            UploadRequest("x", (GOOD[0], UploadFile(WEIGHTS_FILE, 1, "f" * 63))),
            InvalidField,
            "SHA-256",
        ),
        (UploadRequest("x", GOOD, {"": "v"}), InvalidField, "label ''"),
        (UploadRequest("x", GOOD, {"k": "v" * 257}), InvalidField, "label k"),
        (UploadRequest("x", GOOD, {"k": "\n"}), InvalidField, "label k"),
        (
            UploadRequest("x", GOOD, {f"k{n}": "v" for n in range(65)}),
            InvalidField,
            "64 labels",
        ),
    ],
)
def test_bad_announcements(
    registry: Registry, data: Path, request_: UploadRequest, error: type[Any], words: str
) -> None:
    with pytest.raises(error) as caught:
        registry.begin_upload(request_)
    assert words in caught.value.message
    assert len(caught.value.message) < 400
    assert staged(data) == []


def test_no_room_for_the_announced_bytes(
    registry: Registry, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda self: 19)
    with pytest.raises(DiskFull):
        registry.begin_upload(UploadRequest("x", GOOD))
    monkeypatch.setattr(Store, "free_bytes", lambda self: 20)
    registry.begin_upload(UploadRequest("x", GOOD)).abort()


# ------------------------------------------------------------------------- uploads


def test_writing_out_of_line(registry: Registry, data: Path) -> None:
    upload = registry.begin_upload(UploadRequest("x", GOOD))
    upload.write(CONFIG_FILE, 0, b"abc")
    for name, offset, chunk, named in (
        ("README.md", 0, b"x", {"field": "file"}),
        ("../x", 0, b"x", {"field": "file"}),
        (CONFIG_FILE, 0, b"x", {"field": "offset", "expected": 3}),
        (CONFIG_FILE, 4, b"x", {"field": "offset", "expected": 3}),
        (CONFIG_FILE, 3, b"x" * 8, {"field": "data", "announced": 10}),
    ):
        with refused(InvalidField, **named):
            upload.write(name, offset, chunk)
    upload.write(CONFIG_FILE, 3, b"x" * 7)
    assert upload.received_bytes == 10
    upload.abort()
    upload.abort()
    assert staged(data) == []
    with refused(InvalidField, field="upload"):
        upload.write(WEIGHTS_FILE, 0, b"x")
    with refused(InvalidField, field="upload"):
        registry.publish(upload)


def test_incomplete(registry: Registry, adapters: Callable[[int], Path], data: Path) -> None:
    files = bundle_files(adapters(1))
    upload = registry.begin_upload(announce("x", files))
    upload.write(CONFIG_FILE, 0, files[CONFIG_FILE])
    upload.write(WEIGHTS_FILE, 0, files[WEIGHTS_FILE][:-1])
    with refused(InvalidField, field="files", file=WEIGHTS_FILE):
        registry.publish(upload)
    assert staged(data) == []


def test_checksum(anywhere: Kept, registry: Registry, adapters: Callable[[int], Path]) -> None:
    files = bundle_files(adapters(1))
    damaged = {
        **files,
        WEIGHTS_FILE: bytes([files[WEIGHTS_FILE][0] ^ 1]) + files[WEIGHTS_FILE][1:],
    }
    upload = send(registry.begin_upload(announce("x", files)), damaged)
    with pytest.raises(ChecksumMismatch) as caught:
        registry.publish(upload)
    assert caught.value.metadata == {
        "file": WEIGHTS_FILE,
        "expected": hashlib.sha256(files[WEIGHTS_FILE]).hexdigest(),
        "actual": hashlib.sha256(damaged[WEIGHTS_FILE]).hexdigest(),
    }
    assert anywhere.staged() == []
    assert len(registry) == 0


def test_an_invalid_adapter_leaves_nothing(
    registry: Registry, tmp_path: Path, data: Path
) -> None:
    with refused(AdapterInvalid, key="use_dora"):
        push(registry, "x", make_adapter(tmp_path / "a", {"use_dora": True}))
    assert staged(data) == []
    assert registry.list() == ()


def test_leaving_an_upload_aborts_it(registry: Registry, data: Path) -> None:
    with registry.begin_upload(UploadRequest("x", GOOD)) as upload:
        upload.write(CONFIG_FILE, 0, b"x")
    assert staged(data) == []


def test_closing_aborts_uploads(data: Path) -> None:
    registry = Registry.open(data, BASE)
    registry.begin_upload(UploadRequest("x", GOOD))
    registry.close()
    assert staged(data) == []


@pytest.mark.parametrize("when", ["write", "fsync", "rename", "catalog"])
def test_full_disk(
    registry: Registry,
    adapters: Callable[[int], Path],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    before = push(registry, "chat", adapters(1)).record
    files = bundle_files(adapters(2))
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")

        def fail(*args: Any, **options: Any) -> Any:
            raise full

        if when == "catalog":
            limit_pages(catalog_of(registry), 1)
            patch.setattr(
                "veneer_registry.publishing.manifest_to_json",
                lambda m: manifest_to_json(m) + " " * 10**6,
            )
        elif when == "rename":
            patch.setattr(Path, "rename", fail)
        else:
            patch.setattr(os, when, fail)
        with refused(DiskFull):
            registry.publish(
                send(registry.begin_upload(announce("chat", files, allow_replace=True)), files)
            )
    limit_pages(catalog_of(registry), 100_000)
    assert staged(data) == []
    assert registry.get("chat") == before
    registry.sweep()
    assert os.listdir(data / "store" / "weights") == [before.ref.weights_digest]
    assert push(registry, "chat", adapters(2), allow_replace=True).published


def test_other_disk_errors_are_not_called_full(
    registry: Registry, adapters: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = OSError(errno.EIO, "Input/output error")

    def fail(fd: int) -> None:
        raise broken

    monkeypatch.setattr(os, "fsync", fail)
    with refused(DiskFailed, why="Input/output error"):
        push(registry, "chat", adapters(1))
    assert registry.list() == ()


def test_what_stands_is_not_called_failed_when_sweeping_fails(
    registry: Registry,
    adapters: Callable[[int], Path],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref = push(registry, "chat", adapters(1)).record.ref

    def fail(self: Path, to: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        assert registry.delete("chat") == (ref.revision,)
    assert registry.list() == ()
    assert registry.needs_sweep
    assert registry.sweep() == 2
    assert staged(data) == []


def test_a_data_folder_that_is_made_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def record(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(os, "fsync", record)
    OwnerLock(tmp_path / "a" / "b").release()
    assert {tmp_path, tmp_path / "a"} <= set(synced)


def test_a_lock_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        lock = OwnerLock(tmp_path)
    with pytest.raises(StoreLocked):
        OwnerLock(tmp_path)
    lock.release()
    OwnerLock(tmp_path).release()


# ------------------------------------------------------------------- look-up, list


def test_unknown_names(registry: Registry, adapters: Callable[[int], Path]) -> None:
    push(registry, "chat", adapters(1))
    for use in (registry.resolve, registry.acquire, registry.get, registry.revisions):
        with pytest.raises(AdapterNotFound) as caught:
            use("chta")
        assert caught.value.metadata["did_you_mean"] == "chat"
    with pytest.raises(AdapterNotFound):
        registry.delete("chta")


@everywhere
def test_list(registry: Registry, adapters: Callable[[int], Path]) -> None:
    for number, name in enumerate(["b", "a2", "a1"]):
        push(registry, name, adapters(number), labels={"n": str(number), "all": "x"})
    names = lambda **options: [r.ref.name for r in registry.list(**options)]  # noqa: E731
    assert names() == ["a1", "a2", "b"]
    assert names(prefix="a") == ["a1", "a2"]
    assert names(after="a1", limit=1) == ["a2"]
    assert names(labels={"n": "0", "all": "x"}) == ["b"]
    for limit in (0, 1002, -1):
        with refused(InvalidField, field="page_size"):
            registry.list(limit=limit)


def test_between_a_delete_s_two_steps(
    registry: Registry, adapters: Callable[[int], Path]
) -> None:
    """The catalog has forgotten the name, the index has not yet: no spinning, no lease."""
    ref = push(registry, "chat", adapters(1)).record.ref
    with catalog_of(registry).change() as change:
        change.delete_name("chat")
    for use in (registry.acquire, registry.get):
        with refused(AdapterNotFound, cause="deleted"):
            use("chat")
    assert registry.leases(ref.weights_digest) == 0


# ------------------------------------------------------------------ leases, delete


@everywhere
def test_a_lease_keeps_what_was_deleted(
    registry: Registry, adapters: Callable[[int], Path]
) -> None:
    push(registry, "chat", adapters(1))
    lease = registry.acquire("chat")
    folder = registry.weights_folder(lease.ref)
    assert registry.leases(lease.ref.weights_digest) == 1
    assert registry.delete("chat") == (lease.ref.revision,)
    with pytest.raises(AdapterNotFound):
        registry.resolve("chat")
    verify_weights(folder, lease.ref.weights_digest)
    assert not registry.needs_sweep
    lease.release()
    lease.release()
    assert folder.exists(), "releasing must not touch the disk"
    assert registry.needs_sweep
    assert registry.sweep() == 2
    assert not folder.exists()
    assert registry.leases(lease.ref.weights_digest) == 0


@everywhere
def test_a_lease_keeps_what_was_superseded(data: Path, adapters: Callable[[int], Path]) -> None:
    with Registry.open(data, BASE, retain_superseded=0) as registry:
        push(registry, "chat", adapters(1))
        with registry.acquire("chat") as lease:
            push(registry, "chat", adapters(2), allow_replace=True)
            assert registry.resolve("chat") != lease.ref
            verify_weights(registry.weights_folder(lease.ref), lease.ref.weights_digest)
            # Deleted and pushed again meanwhile: the release must not take it away.
            push(registry, "other", adapters(1))
        registry.sweep()
        verify_weights(registry.weights_folder(lease.ref), lease.ref.weights_digest)


def test_delete(anywhere: Kept, registry: Registry, adapters: Callable[[int], Path]) -> None:
    first = push(registry, "chat", adapters(1)).record
    second = push(registry, "chat", adapters(2), allow_replace=True).record
    with pytest.raises(EtagMismatch) as caught:
        registry.delete("chat", first.etag)
    assert caught.value.metadata["etag"] == second.etag
    with refused(FailedPrecondition, adapter="chat", cause="current"):
        registry.delete(second.ref.short)
    assert registry.delete(first.ref.short, second.etag) == (first.ref.revision,)
    assert [r.ref for r in registry.revisions("chat")] == [second.ref]
    assert registry.get("chat").etag != second.etag
    assert registry.delete(second.ref.short) == (second.ref.revision,)
    assert len(registry) == 0
    assert anywhere.stored("weights") == set()
    assert anywhere.stored("revisions") == set()
    assert push(registry, "chat", adapters(1)).record.etag not in (first.etag, second.etag)


@everywhere
def test_weights_shared_by_names_stay(
    registry: Registry, adapters: Callable[[int], Path]
) -> None:
    one = push(registry, "one", adapters(1)).record.ref
    two = push(registry, "two", adapters(1)).record.ref
    assert (one.revision, one.weights_digest) == (two.revision, two.weights_digest)
    registry.delete("one")
    verify_weights(registry.weights_folder(two), two.weights_digest)
    with registry.acquire_weights(one.weights_digest) as lease:
        assert lease.ref == two
        registry.delete("two")
        verify_weights(registry.weights_folder(two), two.weights_digest)
        with pytest.raises(AdapterNotFound):
            registry.acquire_weights(one.weights_digest)


# ------------------------------------------------------------------ reopening, lock


@everywhere
def test_reopening(data: Path, adapters: Callable[[int], Path]) -> None:
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", adapters(1), labels={"a": "b"})
        push(registry, "chat", adapters(2), allow_replace=True)
        before = registry.revisions("chat")
    with Registry.open(data, BASE) as registry:
        assert registry.revisions("chat") == before
        assert registry.resolve("chat") == before[0].ref


@everywhere
def test_another_base(
    data: Path, adapters: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with Registry.open(data, BASE) as registry:
        record = push(registry, "chat", adapters(1)).record
    other = replace(BASE, name="other", fingerprint=BaseFingerprint("9" * 64, "8" * 64))
    assert "another base" not in caplog.text
    with Registry.open(data, other) as registry:
        assert "1 adapters were registered for another base" in caplog.text
        for use in (registry.resolve, registry.acquire):
            with refused(BaseModelMismatch, base="other"):
                use("chat")
        assert registry.list() == (replace(record, foreign=True),)
        again = push(registry, "chat", adapters(1))
        assert again.published, "it is checked against this base now"
        assert not again.replaced
        assert registry.resolve("chat") == record.ref
    with Registry.open(data, BASE) as registry, pytest.raises(BaseModelMismatch):
        registry.resolve("chat")


def test_serving_bytes_follow_the_dtype(data: Path, adapters: Callable[[int], Path]) -> None:
    with Registry.open(data, BASE) as registry:
        half = push(registry, "chat", adapters(1)).record.manifest.serving_bytes
    with Registry.open(data, replace(BASE, serving_dtype="float32")) as registry:
        assert registry.get("chat").manifest.serving_bytes == 2 * half


@everywhere
def test_one_owner(data: Path) -> None:
    with Registry.open(data, BASE):
        with pytest.raises(StoreLocked) as caught:
            Registry.open(data, BASE)
        assert caught.value.metadata == {"pid": str(os.getpid()), "data_dir": str(data)}
        assert str(data) in caught.value.message
        assert str(os.getpid()) in caught.value.message
    Registry.open(data, BASE).close()


def test_the_lock_of_another_process(data: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from veneer_registry.lock import OwnerLock\n"
        "held = OwnerLock(Path(sys.argv[1]))\n"
        "assert 'numpy' not in sys.modules and 'sqlite3' not in sys.modules\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(data)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with refused(StoreLocked, pid=owner.pid):
            OwnerLock(data)
        owner.kill()
    OwnerLock(data).release()


def test_a_lock_taken_before(data: Path) -> None:
    lock = OwnerLock(data)
    registry = Registry.open(data, BASE, lock=lock)
    with pytest.raises(StoreLocked):
        OwnerLock(data)
    registry.close()
    with OwnerLock(data), (data / "LOCK").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failed_open_gives_the_folder_back(data: Path) -> None:
    data.mkdir()
    (data / "catalog.sqlite").write_bytes(b"no database" * 1000)
    for _ in range(2):
        with refused(CatalogDamaged, file="catalog.sqlite"):
            Registry.open(data, BASE)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(InvalidField, field="data_dir"):
        OwnerLock(tmp_path / "file" / "data")


def test_errors_are_of_the_tree() -> None:
    assert issubclass(StoreLocked, VeneerError)


def test_ranks_and_dtypes_survive_the_catalog(registry: Registry, tmp_path: Path) -> None:
    tensors = make_tensors(8, projections=["q_proj"], dtype="F32")
    folder = make_adapter(tmp_path / "a", {"r": 8, "use_rslora": True}, tensors)
    manifest = push(registry, "chat", folder).record.manifest
    assert registry.acquire("chat").record.manifest == manifest
    assert manifest.max_rank == 8
    assert manifest.file_dtype == "F32"
