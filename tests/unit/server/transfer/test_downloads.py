"""Downloads: what went in comes out, from a real front to the real client."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_client import AsyncClient, Client
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_registry.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    ChecksumMismatch,
    InvalidField,
    QuotaExceeded,
)
from veneer_server.serving import downloads

from tests.planted import planted
from tests.refused import refused
from tests.unit.server.rpc.front_harness import Front, failure, make_adapter, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def full(folder: Path, seed: int = 0) -> Path:
    """An adapter with every file that a bundle may have but one."""
    make_adapter(folder, seed=seed, template="{{ messages[0].content }}\n")
    (folder / "README.md").write_bytes(b"# \xff not UTF-8\r\n")
    return folder


async def test_what_went_in_comes_out(front: Front, tmp_path: Path) -> None:
    folder = full(tmp_path / "a")
    await front.push(folder, "sql")
    told: list[tuple[int, int]] = []
    async with AsyncClient(front.addresses["grpc"]) as client:
        pulled = await client.pull(
            "sql", tmp_path / "deep" / "b", progress=lambda *at: told.append(at)
        )
    out = tmp_path / "deep" / "b"
    assert contents(out) == contents(folder)
    total = sum(map(len, contents(folder).values()))
    assert (told[0], told[-1]) == ((0, total), (total, total))
    assert pulled.files == {name: len(data) for name, data in contents(folder).items()}
    assert [path.name for path in out.parent.iterdir()] == ["b"], "nothing hidden is left"
    assert await front.push(out, "copy"), "and it can be pushed again"


async def test_the_synchronous_client_pulls_an_old_revision(
    front: Front, tmp_path: Path
) -> None:
    old = full(tmp_path / "old")
    first = (await front.push(old, "sql")).adapter
    await front.push(full(tmp_path / "new", seed=1), "sql", allow_replace=True)

    def pull() -> None:
        with Client(front.addresses["grpc"]) as client:
            client.pull(f"sql@{first.revision[:12]}", tmp_path / "out")

    await asyncio.to_thread(pull)
    assert contents(tmp_path / "out") == contents(old)


async def test_a_folder_in_the_way(front: Front, tmp_path: Path) -> None:
    folder = full(tmp_path / "a")
    await front.push(folder, "sql")
    out = make_adapter(tmp_path / "out", seed=9)
    kept = contents(out)
    async with AsyncClient(front.addresses["grpc"]) as client:
        with refused(InvalidField, field="folder", cause="exists"):
            await client.pull("sql", out)
        assert contents(out) == kept
        (out / "notes.txt").write_text("mine")
        with refused(InvalidField, field="folder", cause="others"):
            await client.pull("sql", out, force=True)
        (out / "notes.txt").unlink()
        (tmp_path / "link").symlink_to(out)
        with refused(InvalidField, field="folder", cause="exists"):
            await client.pull("sql", tmp_path / "link", force=True)
        await client.pull("sql", out, force=True)
        assert contents(out) == contents(folder)
        (tmp_path / "empty").mkdir()
        await client.pull("sql", tmp_path / "empty")
        assert contents(tmp_path / "empty") == contents(folder)
        with refused(AdapterNotFound, did_you_mean="sql"):
            await client.pull("sqk", tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["a", "empty", "link", "out"]


async def test_damage_is_not_handed_out(front: Front, tmp_path: Path) -> None:
    """Bytes that changed on the server's disk do not pass for the upload."""
    await front.push(full(tmp_path / "a"), "sql")
    weights = next(front.data_dir.glob("store/weights/*/adapter_model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    async with AsyncClient(front.addresses["grpc"]) as client:
        with refused(ChecksumMismatch):
            await client.pull("sql", tmp_path / "out")
        weights.rename(tmp_path / "kept")
        with refused(AdapterCorrupt, cause="files"):
            await client.pull("sql", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    data[-1] ^= 1
    weights.write_bytes(data)


async def test_a_file_whose_state_cannot_be_read_is_closed(
    front: Front, tmp_path: Path
) -> None:
    """A FAKE fault: the system, such as a network disk, refuses to describe an open file."""
    await front.push(full(tmp_path / "a"), "sql")

    def held() -> list[str]:
        files = (Path("/proc/self/fd") / each for each in os.listdir("/proc/self/fd"))
        links = [os.path.realpath(file) for file in files]
        return sorted(link for link in links if link.startswith(str(front.data_dir)))

    before = held()
    with planted(downloads, "os.fstat(descriptor)", "os.fstat(-1)"):
        async with AsyncClient(front.addresses["grpc"]) as client:
            with refused(AdapterCorrupt, cause="files"):
                await client.pull("sql", tmp_path / "out")
    assert held() == before


async def test_content_stays_while_it_is_sent(front: Front, tmp_path: Path) -> None:
    """The name is deleted after the first message: the rest arrives all the same."""
    folder = full(tmp_path / "a")
    await front.push(folder, "sql")
    call = front.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="sql"))
    start = (await call.read()).start
    await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="sql"))
    got: dict[str, bytearray] = {file.name: bytearray() for file in start.files}
    while (message := await call.read()) is not grpc.aio.EOF:
        assert message.chunk.offset == len(got[message.chunk.file])
        assert len(message.chunk.data) <= downloads.PIECE
        got[message.chunk.file] += message.chunk.data
    assert got == {name: bytearray(data) for name, data in contents(folder).items()}
    assert {f.name: f.sha256 for f in start.files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()
    }
    weights = front.data_dir / "store" / "weights"
    await until(lambda: not any(weights.iterdir()))  # nothing holds it any more


async def test_a_reader_that_leaves_frees_the_content(front: Front, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", rank=64)
    (folder / "README.md").write_bytes(b"x" * (1 << 20))
    shown = (await front.push(folder, "big")).adapter
    call = front.adapters.DownloadAdapter(pb.DownloadAdapterRequest(name="big"))
    await call.read()
    registry = front.home.registry
    assert registry.leases(shown.weights_digest) == 1
    call.cancel()
    await until(lambda: registry.leases(shown.weights_digest) == 0)
    await until(lambda: front.calls == 0)


async def test_no_more_downloads_at_once_than_there_are_places(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_AT_ONCE", 1)
    folder = make_adapter(tmp_path / "a")
    (folder / "README.md").write_bytes(b"x" * (1 << 20))
    await front.push(folder, "sql")
    request = pb.DownloadAdapterRequest(name="sql")
    first = front.adapters.DownloadAdapter(request)
    await first.read()
    refusal = await failure(front.adapters.DownloadAdapter(request))
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal.reason == QuotaExceeded.reason
    assert "RetryInfo" in refusal.details
    first.cancel()
    await until(lambda: front.calls == 0)
    async with AsyncClient(front.addresses["grpc"]) as client:
        await client.pull("sql", tmp_path / "out")


async def test_a_client_that_checks_nothing_is_caught(front: Front, tmp_path: Path) -> None:
    """The test of damage can fail."""
    import veneer_client.download as module

    await front.push(full(tmp_path / "a"), "sql")
    weights = next(front.data_dir.glob("store/weights/*/adapter_model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    async def pull(name: str) -> Any:
        async with AsyncClient(front.addresses["grpc"]) as client:
            return await client.pull("sql", tmp_path / name)

    with planted(module, "if found != info.revision:", "if False:"):
        await pull("out")
    with refused(ChecksumMismatch):
        await pull("out2")
    data[-1] ^= 1
    weights.write_bytes(data)
