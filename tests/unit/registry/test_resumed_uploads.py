"""Interrupted uploads: received bytes are reported, kept, resumed from, and finally removed."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry.bundle_files import TEMPLATE_FILE
from veneer_registry.core import Core
from veneer_registry.errors import Aborted, ChecksumMismatch, InvalidField
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.records import UploadRequest
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.upload import Upload
from veneer_registry.weights import WEIGHTS_FILE

from tests.refused import refused
from tests.unit.registry.kit import BASE, announce, bundle_files, kill, push, send

everywhere = pytest.mark.usefixtures("anywhere")
Adapters = Callable[[int], Path]


def rest(upload: Upload, files: dict[str, bytes], there: dict[str, int]) -> None:
    """Send what is missing."""
    for name, data in files.items():
        if there[name] < len(data):
            upload.write(name, there[name], data[there[name] :])


def parts(data: Path) -> list[str]:
    return [path.name for path in data.glob("[sc]*e/uploads/*")]  # store/, or cache/


@pytest.fixture
def files(adapters: Adapters) -> dict[str, bytes]:
    return bundle_files(adapters(1))


@pytest.fixture
def request_(files: dict[str, bytes]) -> UploadRequest:
    return announce("chat", files)


def broken_off(registry: Registry, request: UploadRequest, files: dict[str, bytes]) -> None:
    upload = registry.begin_upload(request)
    upload.write(CONFIG_FILE, 0, files[CONFIG_FILE])
    upload.write(WEIGHTS_FILE, 0, files[WEIGHTS_FILE][:1000])
    upload.suspend()


@pytest.mark.push
@everywhere
@pytest.mark.parametrize("restart", [False, True])
def test_goes_on_where_it_broke_off(
    data: Path, files: dict[str, bytes], request_: UploadRequest, restart: bool
) -> None:
    registry = Registry.open(data, BASE)
    broken_off(registry, request_, files)
    if restart:
        registry.close()
        registry = Registry.open(data, BASE)
    there = registry.committed(request_)
    assert there == {CONFIG_FILE: len(files[CONFIG_FILE]), WEIGHTS_FILE: 1000}
    upload = registry.begin_upload(request_, resume=True)
    rest(upload, files, dict(there))
    published = registry.publish(upload)
    folder = registry.weights_folder(published.record.ref)
    assert (folder / WEIGHTS_FILE).read_bytes() == files[WEIGHTS_FILE]
    assert parts(data) == []
    registry.close()


def test_a_server_that_is_killed_keeps_what_arrived(
    data: Path, files: dict[str, bytes], request_: UploadRequest
) -> None:
    registry = Registry.open(data, BASE)
    upload = registry.begin_upload(request_)
    upload.write(WEIGHTS_FILE, 0, files[WEIGHTS_FILE][:5000])
    kill(registry)
    with Registry.open(data, BASE) as successor:
        assert successor.committed(request_)[WEIGHTS_FILE] == 5000


def test_nothing_is_told_of_an_upload_that_never_was(
    registry: Registry, request_: UploadRequest, data: Path
) -> None:
    assert set(registry.committed(request_).values()) == {0}
    registry.begin_upload(request_).suspend()
    assert parts(data) == [], "nothing had arrived: there is nothing to keep"


def test_another_adapter_under_that_name_is_another_upload(
    registry: Registry, files: dict[str, bytes], request_: UploadRequest, adapters: Adapters
) -> None:
    broken_off(registry, request_, files)
    other = announce("chat", bundle_files(adapters(2)))
    assert registry.committed(other)[WEIGHTS_FILE] == 0
    assert registry.committed(announce("code", files))[WEIGHTS_FILE] == 0


def test_without_resume_it_begins_anew(
    registry: Registry, files: dict[str, bytes], request_: UploadRequest
) -> None:
    broken_off(registry, request_, files)
    upload = registry.begin_upload(request_)
    assert upload.received_bytes == 0
    with refused(InvalidField, field="offset", expected=0):
        upload.write(WEIGHTS_FILE, 1000, files[WEIGHTS_FILE][1000:])


def test_what_is_there_may_be_sent_again(
    registry: Registry, files: dict[str, bytes], request_: UploadRequest
) -> None:
    broken_off(registry, request_, files)
    upload = registry.begin_upload(request_, resume=True)
    upload.write(WEIGHTS_FILE, 600, files[WEIGHTS_FILE][600:2000])
    with refused(InvalidField, field="offset", expected=2000):
        upload.write(WEIGHTS_FILE, 2001, b"x")
    upload.write(WEIGHTS_FILE, 2000, files[WEIGHTS_FILE][2000:])
    assert registry.publish(upload).published


def test_damaged_parts_are_noticed(
    registry: Registry, files: dict[str, bytes], request_: UploadRequest, data: Path
) -> None:
    broken_off(registry, request_, files)
    (part,) = (data / "store" / "uploads").iterdir()
    (part / CONFIG_FILE).write_bytes(b"\0" * len(files[CONFIG_FILE]))  # as after a power cut
    with refused(ChecksumMismatch, file=CONFIG_FILE):
        registry.begin_upload(request_, resume=True)
    assert registry.committed(request_)[WEIGHTS_FILE] == 0, "the next one begins anew"
    assert registry.publish(send(registry.begin_upload(request_), files)).published


@everywhere
def test_content_that_is_stored_is_not_asked_for(
    registry: Registry, files: dict[str, bytes], adapters: Adapters, data: Path
) -> None:
    first = push(registry, "chat", adapters(1)).record.ref
    request = announce("twin", files)
    there = registry.committed(request)
    assert there == {name: len(content) for name, content in files.items()}
    published = registry.publish(registry.begin_upload(request, resume=True))
    assert published.record.ref.weights_digest == first.weights_digest
    assert registry.resolve("twin").revision == first.revision
    verify_weights(registry.weights_folder(first), first.weights_digest)
    assert parts(data) == []


@everywhere
def test_a_new_template_on_old_weights_is_all_that_is_sent(
    registry: Registry, files: dict[str, bytes], adapters: Adapters
) -> None:
    push(registry, "chat", adapters(1))
    changed = {**files, TEMPLATE_FILE: b"{{ x }}"}
    request = announce("chat", changed, allow_replace=True)
    there = registry.committed(request)
    assert there[WEIGHTS_FILE] == len(files[WEIGHTS_FILE])
    assert there[TEMPLATE_FILE] == 0
    upload = registry.begin_upload(request, resume=True)
    rest(upload, changed, dict(there))
    published = registry.publish(upload)
    assert published.replaced
    assert published.record.manifest.chat_template == "{{ x }}"


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_damaged_stored_content_is_never_taken_nor_written_to(
    registry: Registry, files: dict[str, bytes], adapters: Adapters, damage: str
) -> None:
    ref = push(registry, "chat", adapters(1)).record.ref
    stored = registry.weights_folder(ref) / WEIGHTS_FILE
    rotten = bytearray(stored.read_bytes())
    if damage == "flip":
        rotten[-1] ^= 1
    elif damage == "cut":
        del rotten[-500:]
    else:
        rotten += b"x" * 500
    stored.write_bytes(bytes(rotten))
    request = announce("twin", files)
    if damage == "flip":
        with pytest.raises(ChecksumMismatch):
            registry.begin_upload(request, resume=True)
    else:
        upload = registry.begin_upload(request, resume=True)
        assert upload.committed[WEIGHTS_FILE] == 0
        upload.write(WEIGHTS_FILE, 0, b"y" * 100)
        upload.abort()
    assert stored.read_bytes() == bytes(rotten)
    assert registry.publish(send(registry.begin_upload(request), files)).published
    verify_weights(registry.weights_folder(ref), ref.weights_digest)  # repaired


@everywhere
def test_what_was_removed_is_asked_for_again(
    registry: Registry, files: dict[str, bytes], adapters: Adapters
) -> None:
    push(registry, "chat", adapters(1))
    registry.delete("chat")
    assert set(registry.committed(announce("chat", files)).values()) == {0}


def test_a_second_connection_takes_a_resumed_upload_over(
    registry: Registry, files: dict[str, bytes], request_: UploadRequest
) -> None:
    first = registry.begin_upload(request_)
    first.write(CONFIG_FILE, 0, files[CONFIG_FILE])
    first.write(WEIGHTS_FILE, 0, files[WEIGHTS_FILE][:3000])
    second = registry.begin_upload(request_, resume=True)
    assert second.committed[WEIGHTS_FILE] == 3000
    with refused(Aborted, cause="taken_over"):
        first.write(WEIGHTS_FILE, 3000, files[WEIGHTS_FILE][3000:])
    first.abort()  # its handler ends: the second one's bytes stay
    second.write(WEIGHTS_FILE, 3000, files[WEIGHTS_FILE][3000:])
    assert registry.publish(second).published


def test_two_that_begin_anew_do_not_disturb_each_other(
    registry: Registry, files: dict[str, bytes], request_: UploadRequest, data: Path
) -> None:
    first, second = registry.begin_upload(request_), registry.begin_upload(request_)
    for upload in (first, second):
        send(upload, files)
    assert registry.publish(first).published
    assert not registry.publish(second).published, "it holds that content already"
    assert parts(data) == []


def test_left_uploads_are_swept(
    registry: Registry, files: dict[str, bytes], request_: UploadRequest, data: Path
) -> None:
    broken_off(registry, request_, files)
    assert registry.sweep_uploads(idle_s=3600) == 0
    (part,) = (data / "store" / "uploads").iterdir()
    for path in (*part.iterdir(), part):
        os.utime(path, (1, 1))
    running = registry.begin_upload(announce("code", files))
    running.write(CONFIG_FILE, 0, files[CONFIG_FILE])
    assert registry.sweep_uploads(idle_s=3600) == 1
    assert registry.sweep_uploads(idle_s=-1) == 0, "one that runs stays"
    assert registry.committed(request_)[WEIGHTS_FILE] == 0


def test_an_upload_ends_at_the_limit_of_one_name(registry: Registry) -> None:
    """Sanity of the id: it is of names and content, not of labels or order."""
    a = announce("chat", {CONFIG_FILE: b"1", WEIGHTS_FILE: b"2"}, labels={"x": "y"})
    b = announce("chat", {WEIGHTS_FILE: b"2", CONFIG_FILE: b"1"}, allow_replace=True)
    assert a.upload_id == b.upload_id
    assert announce("code", {CONFIG_FILE: b"1", WEIGHTS_FILE: b"2"}).upload_id != a.upload_id


def test_sums_of_stored_files_follow_the_store(
    data: Path, registry: Registry, adapters: Adapters
) -> None:
    push(registry, "chat", adapters(1))
    push(registry, "chat", adapters(2), allow_replace=True)
    registry.delete("chat")
    with sqlite3.connect(data / "catalog.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM files").fetchone() == (0,)


def test_a_server_that_is_killed_while_it_publishes_keeps_what_arrived(
    data: Path,
    files: dict[str, bytes],
    request_: UploadRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        """As with kill -9, nothing is cleaned up after it."""

    registry = Registry.open(data, BASE)
    upload = send(registry.begin_upload(request_), files)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: (_ for _ in ()).throw(Killed()))
        patch.setattr(Upload, "abort", lambda self: None)
        patch.setattr(Core, "sweep", lambda self: 0)
        with pytest.raises(Killed):
            registry.publish(upload)
    kill(registry)
    with Registry.open(data, BASE) as successor:
        assert successor.committed(request_) == {n: len(d) for n, d in files.items()}
        assert successor.publish(successor.begin_upload(request_, resume=True)).published


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_links(
    registry: Registry,
    files: dict[str, bytes],
    adapters: Adapters,
    monkeypatch: pytest.MonkeyPatch,
    error: int,
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    ref = push(registry, "chat", adapters(1)).record.ref
    request = announce("twin", files)
    published = registry.publish(registry.begin_upload(request, resume=True))
    assert published.record.ref.revision == ref.revision
