"""Which files of a folder a push reads and sends: regular ones, whole, none from elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry.bundle_files import ALLOWED_FILES
from veneer_registry.errors import AdapterInvalid
from veneer_registry.fingerprint import vocabulary_digest
from veneer_registry.format import read_adapter

from tests.refused import refused
from tests.unit.client.drivers import Driver
from tests.unit.client.fake_server import FakeServer

CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"


def sent(server: FakeServer) -> bytes:
    return b"".join(chunk.data for upload in server.uploads for chunk in upload.chunks)


def refusal(server: FakeServer, client: Driver, folder: Path) -> AdapterInvalid:
    """The refusal of a push, of which the server hears nothing."""
    with pytest.raises(AdapterInvalid) as caught:
        client.push(folder, "chat")
    assert SECRET not in sent(server)
    assert server.calls == []
    return caught.value


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "id_ed25519"
    path.write_bytes(SECRET)
    return path


# ------------------------------------------------------------------------------ links


@pytest.mark.parametrize(
    "name", [README, "chat_template.jinja", "training_manifest.json", CONFIG, WEIGHTS]
)
def test_a_link_out_of_the_folder_is_refused(
    name: str, server: FakeServer, client: Driver, adapter_folder: Path, secret: Path
) -> None:
    (adapter_folder / name).unlink(missing_ok=True)
    (adapter_folder / name).symlink_to(secret)
    error = refusal(server, client, adapter_folder)
    assert (error.metadata["file"], error.metadata["cause"]) == (name, "outside")
    with refused(AdapterInvalid, file=name, cause="outside"):
        read_adapter(adapter_folder, None)


def test_a_link_by_way_of_a_folder_is_refused(
    server: FakeServer, client: Driver, adapter_folder: Path, secret: Path
) -> None:
    """``README.md -> notes/id_ed25519``, and ``notes`` is a link to another folder."""
    (adapter_folder / "notes").symlink_to(secret.parent)
    (adapter_folder / README).symlink_to(Path("notes") / secret.name)
    assert refusal(server, client, adapter_folder).metadata["file"] == README


def test_a_link_to_nothing_is_refused(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    (adapter_folder / README).symlink_to("nowhere.md")
    assert "cannot be followed" in refusal(server, client, adapter_folder).metadata["why"]


def test_a_link_inside_the_folder_is_followed(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    (adapter_folder / "model-card.md").write_bytes(b"a card")
    (adapter_folder / README).symlink_to("model-card.md")
    assert client.push(adapter_folder, "chat").published
    assert b"a card" in sent(server)


def test_a_folder_by_a_link_is_a_folder(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    """``runs/latest -> runs/2026-11-26``."""
    latest = adapter_folder.parent / "latest"
    latest.symlink_to(adapter_folder)
    assert client.push(latest, "chat").published


def snapshot(folder: Path, hub: Path) -> Path:
    """``folder`` as the Hugging Face cache holds it: files are links into ``blobs``."""
    repository = hub / "models--me--chat"
    there, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    there.mkdir(parents=True), blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / f"sha{number}")
        (there / path.name).symlink_to(Path("../../blobs") / f"sha{number}")
    return there


def test_a_snapshot_of_the_hub_cache_is_followed(
    server: FakeServer, client: Driver, adapter_folder: Path, tmp_path: Path
) -> None:
    """Also by way of a cache that is itself a link to a larger disk."""
    snapshot(adapter_folder, tmp_path / "disk")
    (tmp_path / "hub").symlink_to(tmp_path / "disk")
    there = tmp_path / "hub" / "models--me--chat" / "snapshots" / "0123abcd"
    assert client.push(there, "chat").published
    assert (adapter_folder / WEIGHTS).read_bytes() in sent(server)


@pytest.mark.parametrize("how", ["past blobs", "blob is a link", "blobs is a link"])
def test_a_folder_that_only_looks_like_a_snapshot_reaches_nothing_else(
    how: str,
    server: FakeServer,
    client: Driver,
    adapter_folder: Path,
    tmp_path: Path,
    secret: Path,
) -> None:
    """As an archive from a stranger may be."""
    there = snapshot(adapter_folder, tmp_path / "hub")
    blobs = there.parent.parent / "blobs"
    target = Path("../../blobs") / secret.name
    if how == "past blobs":
        target = Path("../../../..") / secret.name
    elif how == "blob is a link":
        (blobs / secret.name).symlink_to(secret)
    else:
        shutil.copytree(blobs, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(blobs)
        blobs.symlink_to(tmp_path)
    (there / README).symlink_to(target)
    assert (there / README).read_bytes() == SECRET, "it would be sent if it were followed"
    assert refusal(server, client, there).metadata["cause"] == "outside"


# ------------------------------------------------------------------------------ kinds


def _fifo(path: Path) -> None:
    """With somebody who would write a secret into it."""
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb") as out:
            out.write(SECRET)

    threading.Thread(target=write, daemon=True).start()


def _socket(path: Path) -> None:
    # By a relative name: an absolute one may be longer than a socket's may be.
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


@pytest.mark.parametrize("name", [README, CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(_fifo, "a FIFO"), (_socket, "a socket"), (Path.mkdir, "a folder")],
    ids=["fifo", "socket", "folder"],
)
def test_what_is_no_regular_file_is_refused_at_once(
    make: Callable[[Path], None],
    kind: str,
    name: str,
    server: FakeServer,
    client: Driver,
    adapter_folder: Path,
) -> None:
    (adapter_folder / name).unlink(missing_ok=True)
    make(adapter_folder / name)
    error = refusal(server, client, adapter_folder)
    assert error.metadata["file"] == name
    assert f"is {kind}" in error.metadata["why"]


def test_a_device_is_not_opened(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    """By a link, since making one takes root. It has no end."""
    (adapter_folder / README).symlink_to("/dev/zero")
    refusal(server, client, adapter_folder)


# ------------------------------------------------------------------------------ sizes


def test_sizes_are_checked_before_anything_is_read(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    """The weights are no adapter either, which reading them would tell first."""
    (adapter_folder / WEIGHTS).write_bytes(b"junk")
    limit = ALLOWED_FILES[README]
    assert limit is not None
    with (adapter_folder / README).open("wb") as out:
        out.truncate(limit + 1)
    error = refusal(server, client, adapter_folder)
    assert error.metadata["file"] == README
    assert f"larger than {limit} bytes" in error.metadata["why"]


def test_an_empty_file_is_named(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    (adapter_folder / README).write_bytes(b"")
    error = refusal(server, client, adapter_folder)
    assert (error.metadata["file"], "is empty" in error.message) == (README, True)


# ---------------------------------------------------------------------- under way


def test_a_file_that_is_replaced_under_way_is_sent_as_it_was_hashed(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    before = (adapter_folder / WEIGHTS).read_bytes()
    left = [True]

    def replace(done: int, total: int) -> None:
        if left:
            left.pop()
            (adapter_folder / "new").write_bytes(SECRET * 100_000)
            (adapter_folder / "new").replace(adapter_folder / WEIGHTS)

    assert client.push(adapter_folder, "chat", progress=replace).published
    assert before in sent(server)
    assert SECRET not in sent(server)


def test_a_file_that_is_cut_short_under_way_is_named(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    left = [True]

    def cut(done: int, total: int) -> None:
        if left:
            left.pop()
            os.truncate(adapter_folder / WEIGHTS, 1000)

    with refused(AdapterInvalid, file=WEIGHTS, cause="changed"):
        client.push(adapter_folder, "chat", progress=cut)


def test_a_push_leaves_no_file_open(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    def open_files() -> set[str]:
        found = set()
        for number in Path("/proc/self/fd").iterdir():
            try:
                found.add(os.readlink(number))
            except OSError:  # the listing's own
                continue
        return {path for path in found if path.startswith(str(adapter_folder))}

    client.push(adapter_folder, "chat")
    assert not open_files()
    (adapter_folder / WEIGHTS).write_bytes(b"junk")
    with pytest.raises(AdapterInvalid):
        client.push(adapter_folder, "chat")
    assert not open_files()


# ------------------------------------------------------------- what is said of the base


def test_the_publisher_s_word_and_the_tokenizer_s_digest_are_sent(
    server: FakeServer, client: Driver, adapter_folder: Path
) -> None:
    client.push(adapter_folder, "chat")
    tokenizer = b'{"model": {"vocab": {"a": 0}, "merges": []}}'
    (adapter_folder / "tokenizer.json").write_bytes(tokenizer)
    client.push(adapter_folder, "chat", same_base=True)
    plain, said = (upload.spec for upload in server.uploads)
    assert (plain.same_base, plain.vocabulary) == (False, "")
    assert (said.same_base, said.vocabulary) == (True, vocabulary_digest(tokenizer))
    assert len(said.vocabulary) == 64
    assert {file.name for file in said.files} == {CONFIG, WEIGHTS}, "the file itself is not"


def test_a_tokenizer_that_cannot_be_read_does_not_stop_a_push(
    server: FakeServer, client: Driver, adapter_folder: Path, secret: Path
) -> None:
    path = adapter_folder / "tokenizer.json"
    for make in (
        lambda: path.write_text("no JSON"),
        lambda: path.symlink_to(secret),
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
    ):
        make()
        client.push(adapter_folder, "chat")
        path.rmdir() if path.is_dir() else path.unlink()
    assert [upload.spec.vocabulary for upload in server.uploads] == [""] * 4
