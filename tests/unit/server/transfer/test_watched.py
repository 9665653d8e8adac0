"""Watched folders: what appears is published once it is whole, and never before."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_server.serving import watched
from veneer_server.serving.watched import WatchedFolder
from veneer_server.telemetry.watched_series import WatchedSeries

from tests.planted import planted
from tests.unit.server.rpc.front_harness import Front, make_adapter, running, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Watch:
    """A watched folder, looked at by hand."""

    front: Front
    root: Path
    state: Path

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """As a restart of the server does."""
        self.metrics = CollectorRegistry()
        self.folder = WatchedFolder(
            self.root,
            lambda: self.front.home,
            state=self.state,
            most_bytes=1 << 20,
            series=WatchedSeries(self.metrics),
        )
        self.folder.read_state()

    async def look(self, times: int = 2) -> dict[str, str]:
        """Look; returns the revision of each name."""
        for _ in range(times):
            await self.folder.look()
        listed = await self.front.adapters.ListAdapters(pb.ListAdaptersRequest())
        return {found.name: found.revision for found in listed.adapters}

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.get_sample_value(f"veneer_watch_dir_{name}", labels) or 0.0

    async def revisions(self, name: str) -> int:
        return len(
            (await self.front.adapters.GetAdapter(pb.GetAdapterRequest(name=name))).revisions
        )


@pytest_asyncio.fixture(loop_scope="module")
async def watch(front: Front, tmp_path: Path) -> AsyncIterator[Watch]:
    root = tmp_path / "drop"
    root.mkdir()
    yield Watch(front, root, tmp_path / "watched.json")


def dropped(watch: Watch, name: str = "sql", seed: int = 0) -> Path:
    """An adapter that is copied beside the folder and renamed."""
    hidden = make_adapter(watch.root / f".{name}", seed=seed)
    if (watch.root / name).exists():
        shutil.rmtree(watch.root / name)
    return hidden.rename(watch.root / name)


async def test_dropped_replaced_removed(watch: Watch) -> None:
    make_adapter(watch.root / ".hidden")
    (watch.root / "file").write_text("no folder")
    folder = dropped(watch)
    assert await watch.look(1) == {}, "one look is not enough"
    first = await watch.look(1)
    assert [*first] == ["sql"]
    assert await watch.look(3) == first
    assert watch.count("publications_total") == 1
    dropped(watch, seed=1)
    second = await watch.look()
    assert second.keys() == {"sql"}
    assert second != first
    assert await watch.revisions("sql") == 2
    history = await watch.front.adapters.GetHistory(pb.GetHistoryRequest(name="sql"))
    assert {line.actor for line in history.entries} == {"watch-dir"}
    shutil.rmtree(folder)
    assert await watch.look(3) == second, "a folder that goes leaves its adapter"
    assert watch.count("folders", state="published") == 0


async def test_a_restart_repeats_nothing(watch: Watch) -> None:
    """Neither for the same content nor against what was done by hand meanwhile."""
    dropped(watch)
    dropped(watch, "gone", seed=5)
    old = (await watch.look())["sql"]
    dropped(watch, seed=1)
    new = (await watch.look())["sql"]
    adapters = watch.front.adapters
    back = pb.UpdateAdapterRequest(name=f"sql@{old}", current=True)
    await adapters.UpdateAdapter(back)
    await adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="gone"))
    for _ in range(2):
        watch.restart()
        os.utime(watch.root / "sql" / CONFIG)  # touched, but the same
        assert await watch.look(3) == {"sql": old}
        assert watch.count("publications_total") == 0
        assert watch.count("folders", state="published") == 2
    dropped(watch, seed=2)
    assert (await watch.look())["sql"] not in (old, new)
    watch.state.write_text("{")  # damaged: publishing again is harmless
    watch.restart()
    assert await watch.look(3)


async def test_half_written_folders(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_adapter(watch.root.parent / "whole")
    config, weights = (whole / CONFIG).read_bytes(), (whole / WEIGHTS).read_bytes()
    folder = watch.root / "sql"
    folder.mkdir()
    for written in (
        {CONFIG: config},
        {WEIGHTS: weights},
        {CONFIG: b"", WEIGHTS: weights},
        {CONFIG: config[:-5], WEIGHTS: weights},
        {CONFIG: config, WEIGHTS: b""},
        {CONFIG: config, WEIGHTS: weights[:6]},
        {CONFIG: config, WEIGHTS: weights[:40]},
        {CONFIG: config, WEIGHTS: weights[:-1]},
    ):
        for path in folder.iterdir():
            path.unlink()
        for name, data in written.items():
            (folder / name).write_bytes(data)
        assert await watch.look(3) == {}, {name: len(data) for name, data in written.items()}
        assert watch.count("failures_total", reason="ADAPTER_INVALID") == 0, (
            "it may be whole soon"
        )
    monkeypatch.setattr(watched, "STALE_S", 0.0)
    assert await watch.look(3) == {}
    assert watch.count("failures_total", reason="ADAPTER_INVALID") == 1, "once"
    assert watch.count("folders", state="waiting") == 1
    (folder / WEIGHTS).write_bytes(weights)
    assert [*await watch.look()] == ["sql"]


async def test_while_somebody_writes(watch: Watch) -> None:
    """Whole by its length already, and its bytes still come."""
    whole = make_adapter(watch.root.parent / "whole")
    data = (whole / WEIGHTS).read_bytes()
    folder = watch.root / "sql"
    folder.mkdir()
    shutil.copy(whole / CONFIG, folder)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(data[:-100] + b"\0" * 100)
        file.flush()
        assert await watch.look(4) == {}
        file.seek(-100, os.SEEK_END)
        file.write(data[-100:])
    assert [*await watch.look()] == ["sql"]


async def test_a_change_between_reading_and_publishing(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dropped(watch)
    real, changes = watched.look_at, iter(range(1, 3))

    def changing(path: Path) -> watched.FolderSeen:
        if next(changes, None) is not None:
            (folder / "README.md").write_text("new")
            os.utime(folder / "README.md", ns=(next(iter([1])), os.stat(path).st_mtime_ns))
        return real(path)

    monkeypatch.setattr(watched, "look_at", changing)
    assert await watch.look(2) == {}
    monkeypatch.undo()
    assert [*await watch.look(2)] == ["sql"]


async def test_links_are_not_followed_out(watch: Watch) -> None:
    outside = make_adapter(watch.root.parent / "outside", seed=7)
    (watch.root / "linked").symlink_to(outside)
    (watch.root / "circle").symlink_to("circle")
    mixed = dropped(watch, "mixed", seed=8)
    (mixed / WEIGHTS).unlink()
    (mixed / WEIGHTS).symlink_to(outside / WEIGHTS)
    fifo = dropped(watch, "fifo")
    (fifo / WEIGHTS).unlink()
    os.mkfifo(fifo / WEIGHTS)
    (watch.root / "Not A Name").mkdir()
    shutil.copytree(outside, watch.root / "Not A Name", dirs_exist_ok=True)
    dropped(watch, "real", seed=9)
    (watch.root / "inside").symlink_to("real")
    assert sorted(await watch.look(3)) == ["inside", "real"]
    assert watch.count("folders", state="refused") == 4
    assert watch.count("failures_total", reason="INVALID_FIELD") == 2
    assert watch.count("failures_total", reason="ADAPTER_INVALID") == 2


async def test_errors_are_told_once_for_a_content(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = dropped(watch)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "use_dora": "maybe"}))
    with caplog.at_level(logging.ERROR):
        assert await watch.look(5) == {}
        assert len(caplog.records) == 1
        os.utime(folder / CONFIG)
        assert await watch.look(5) == {}
        assert len(caplog.records) == 1, "the same content"
        (folder / CONFIG).write_text(json.dumps({**config, "use_dora": "never"}))
        assert await watch.look(5) == {}
        assert len(caplog.records) == 2
    (folder / CONFIG).write_text(json.dumps(config))
    assert [*await watch.look()] == ["sql"]


async def test_a_disk_that_is_away(watch: Watch) -> None:
    dropped(watch)
    first = await watch.look()
    watch.root.rename(watch.root.parent / "away")
    assert await watch.look(3) == first
    assert watch.count("failures_total", reason="UNREADABLE") == 1
    (watch.root.parent / "away").rename(watch.root)
    assert await watch.look(3) == first
    assert watch.count("publications_total") == 1


async def test_a_check_that_is_left_out_is_seen(watch: Watch) -> None:
    """Without it, a folder that is being written is published."""
    folder = dropped(watch)
    with (
        (folder / WEIGHTS).open("r+b") as file,
        planted(
            watched, "if any(_is_written(file.descriptor) for file in files):", "if False:"
        ),
    ):
        file.flush()
        assert [*await watch.look()] == ["sql"]


@pytest.mark.push
async def test_the_flag(base_folder: Path, front_cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "drop"
    make_adapter(root / "sql")
    async with running(base_folder, front_cache, tmp_path, watch_dir=str(root)) as front:
        await until(lambda: "sql" in front.home.registry)
        assert 'veneer_watch_dir_folders{state="published"}' in await front.metrics()
