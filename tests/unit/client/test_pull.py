"""Pulls from a server that breaks, or lies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_client.download import Download
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_registry.bundle import Bundle
from veneer_registry.errors import (
    Aborted,
    AdapterInvalid,
    ChecksumMismatch,
    InternalError,
    InvalidField,
    VeneerError,
)
from veneer_registry.format import read_adapter

from tests.refused import refused
from tests.unit.client.drivers import Driver
from tests.unit.client.fake_server import FakeServer
from tests.unit.client.refusals import Refusal

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Message = pb.DownloadAdapterResponse


@pytest.fixture
def folder(adapter_folder: Path) -> Path:
    """With the files of a bundle only."""
    for path in adapter_folder.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            path.unlink()
    return adapter_folder


def started(folder: Path) -> Message:
    """The first message of a server that has this folder."""
    revision = Bundle(read_adapter(folder, None).weights_digest, {}).revision
    message = Message(start=pb.DownloadStart(adapter=pb.Adapter(name="sql", revision=revision)))
    for name in (CONFIG, WEIGHTS):
        data = (folder / name).read_bytes()
        message.start.files.add(
            name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
    return message


def sent(folder: Path, piece: int = 1 << 18) -> Iterator[Message]:
    """All messages."""
    yield started(folder)
    for name in (CONFIG, WEIGHTS):
        data = (folder / name).read_bytes()
        for at in range(0, len(data), piece):
            yield chunk(name, at, data[at : at + piece])


def chunk(file: str, offset: int, data: bytes) -> Message:
    return Message(chunk=pb.UploadChunk(file=file, offset=offset, data=data))


def pulled(out: Path, messages: Iterable[Message], name: str = "sql") -> Any:
    with Download(name, out, force=False, progress=lambda done, total: None) as download:
        download.begin()
        for message in messages:
            download.receive(message)
        return download.finish()


def test_a_whole_download(folder: Path, tmp_path: Path) -> None:
    done = pulled(tmp_path / "out", sent(folder))
    assert sorted(done.files) == sorted(os.listdir(tmp_path / "out"))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (tmp_path / "out" / WEIGHTS).stat().st_mode & 0o777 == 0o644


def lies(folder: Path) -> Iterator[tuple[str, list[Message], type[VeneerError]]]:
    """What a server may send, and the error."""
    first, *rest = sent(folder)

    def changed(change: Callable[[pb.DownloadStart], object]) -> Message:
        message = Message()
        message.CopyFrom(first)
        change(message.start)
        return message

    yield "nothing", [], Aborted
    yield "no start", rest, InternalError
    yield "an empty message", [Message()], InternalError
    yield "two starts", [first, first], InternalError
    yield "no end", [first, *rest[:-1]], Aborted
    yield "out of order", [first, rest[0], *reversed(rest[1:])], InternalError
    yield "twice", [first, rest[0], rest[0]], InternalError
    yield (
        "more",
        [first, *rest, chunk(WEIGHTS, (folder / WEIGHTS).stat().st_size, b"x")],
        InternalError,
    )
    yield "an unknown file", [first, chunk("README.md", 0, b"x")], InternalError
    yield (
        "other bytes",
        [first, chunk(CONFIG, 0, b"{" * len(rest[0].chunk.data)), *rest[1:]],
        ChecksumMismatch,
    )
    yield (
        "another revision",
        [changed(lambda s: setattr(s.adapter, "revision", "0" * 64)), *rest],
        ChecksumMismatch,
    )
    for name in ("../evil", "/etc/evil", "evil.bin", "a/b", "", CONFIG):
        yield name, [changed(lambda s, n=name: s.files.add(name=n, size=1))], InternalError  # type: ignore[misc]
    yield "no weights", [changed(lambda s: s.files.pop())], InternalError
    junk = b"junk"
    bad = changed(lambda s: s.files.pop())
    bad.start.files.add(name=WEIGHTS, size=4, sha256=hashlib.sha256(junk).hexdigest())
    yield "junk with its hash", [bad, rest[0], chunk(WEIGHTS, 0, junk)], AdapterInvalid


def test_lies(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for what, messages, error in lies(folder):
        with pytest.raises(VeneerError) as caught:
            pulled(place / "out", messages)
        assert type(caught.value) is error, what
        assert os.listdir(place) == [], what
    with refused(InternalError, cause="download"):
        pulled(place / "out", sent(folder), name="sql@" + "f" * 12)


def test_a_folder_with_other_files_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("b.txt", "a.txt", CONFIG):
        (out / name).touch()
    with (
        refused(InvalidField, field="folder", cause="others") as caught,
        Download("sql", out, force=True, progress=lambda done, total: None) as download,
    ):
        download.begin()
    assert f"{out} holds other files (a.txt, b.txt), which" in str(caught.value)


def test_a_connection_that_breaks(
    folder: Path, tmp_path: Path, client: Driver, server: FakeServer
) -> None:
    """The pull begins anew, with the revision that it began with."""
    broken = Refusal(grpc.StatusCode.UNAVAILABLE, "away", "UNAVAILABLE", retry_s=0.01)
    asked: list[str] = []

    def answer(request: pb.DownloadAdapterRequest, context: Any) -> Iterator[Message]:
        asked.append(request.name)
        messages = sent(folder)
        yield next(messages)
        yield next(messages)
        if len(asked) < 3:
            broken.end(context)
        yield from messages

    server.download = answer
    done = client.pull("sql/prod", tmp_path / "out")
    full = f"sql@{done.adapter.revision}"
    assert asked == ["sql/prod", full, full]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert [p for p in os.listdir(tmp_path) if p.startswith(".")] == []
