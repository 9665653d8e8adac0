"""Folder drops: writers that copy in pieces, rename, replace, link and remove."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry
from veneer_registry.records import Published
from veneer_registry.registry import Registry
from veneer_registry.rows import Who
from veneer_registry.upload import Upload
from veneer_server.serving.uploads import Uploads
from veneer_server.serving.watched import WatchedFolder
from veneer_server.telemetry.watched_series import WatchedSeries

from tests.fetching.world import CONFIG, WEIGHTS, World
from tests.unit.registry.kit import BASE, make_adapter

Files = dict[str, bytes]

QUICK = "quick"
"""The next step comes before a second look."""


class Drops:
    """A watched folder, writers, and what they have finished so far."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self._root = folder / "drop"
        self._root.mkdir(parents=True)
        self._away = folder / "away"
        self._registry = Registry.open(folder / "data", BASE)
        self._finished: dict[str, set[str]] = {}
        """Digests of the adapters that a writer had finished, by name."""
        self.published = 0
        uploads = Uploads(self._registry)

        async def publish(upload: Upload, *, activate: bool, who: Who) -> Published:
            self._check(upload)
            return self._registry.publish(upload, who=who)

        home: Any = SimpleNamespace(uploads=uploads, changes=SimpleNamespace(publish=publish))
        self._watch = WatchedFolder(
            self._root,
            lambda: home,
            state=folder / "watched.json",
            most_bytes=1 << 20,
            series=WatchedSeries(CollectorRegistry()),
        )
        self._number = 0

    def close(self) -> None:
        self._registry.close()

    async def case(self, random_: random.Random) -> bool:
        """One writer's history, with looks in between. Returns whether it was published."""
        before, self._number = self.published, self._number + 1
        name = f"a{self._number}"
        await self._look(random_)
        for step in self._history(name, random_):
            await self._look(random_, most=1 if step() == QUICK else 3)
        for _ in range(2):
            await self._watch.look()
        for left in self._root.iterdir():
            if left.is_symlink() or not left.is_dir():
                left.unlink()
            else:
                shutil.rmtree(left)
        return self.published > before

    async def _look(self, random_: random.Random, most: int = 3) -> None:
        for _ in range(random_.randint(0, most)):
            with self._world.watched():
                await self._watch.look()

    def _check(self, upload: Upload) -> None:
        self.published += 1
        name = upload.request.name
        found = _digest({path.name: path.read_bytes() for path in upload.folder.iterdir()})
        if found not in self._finished.get(name, set()):
            self._world.broken.append(f"{name} was published before it was whole")

    def _finish(self, name: str, files: Files) -> None:
        self._finished.setdefault(name, set()).add(_digest(files))

    def _adapter(self, random_: random.Random) -> Files:
        folder = make_adapter(self._away, seed=random_.randrange(1 << 30))
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        shutil.rmtree(folder)
        if random_.random() < 0.3:
            files["README.md"] = b"# one\n" * random_.randrange(1, 50)
        return files

    def _history(self, name: str, random_: random.Random) -> Iterator[Any]:
        """Steps of a writer; the watcher may look after each."""
        target, files = self._root / name, self._adapter(random_)
        kind = random_.choice(
            ("rename", "held", "appended", "linked", "truncated", "swap", "in place")
        )
        if kind == "rename":
            hidden = self._root / f".{name}"
            yield hidden.mkdir
            for file, data in _shuffled(files, random_):
                yield lambda file=file, data=data: (hidden / file).write_bytes(data)
            self._finish(name, files)
            yield lambda: hidden.rename(target)
        elif kind == "linked":
            place = random_.choice(
                (self._world.secret, self._world.root / "sql", Path("nowhere"))
            )
            if random_.random() < 0.5:
                yield lambda: target.symlink_to(place)
            else:
                yield target.mkdir
                yield lambda: (target / CONFIG).write_bytes(files[CONFIG])
                yield lambda: (target / WEIGHTS).symlink_to(place / WEIGHTS)
        elif kind == "truncated":  # the writer dies in the middle
            yield target.mkdir
            yield lambda: (target / CONFIG).write_bytes(files[CONFIG])
            cut = random_.randrange(len(files[WEIGHTS]))
            yield lambda: (target / WEIGHTS).write_bytes(files[WEIGHTS][:cut])
        else:
            yield target.mkdir
            for file, data in _shuffled(files, random_):
                optional = file not in (CONFIG, WEIGHTS)
                if not optional:
                    self._finish_after(name, files, file, target)
                yield from _written(target / file, data, random_, held=kind != "appended")
            self._finish(name, files)
            yield lambda: None
            if kind == "in place":  # file by file, without a pause of two looks
                new = self._adapter(random_)
                new.pop("README.md", None)
                config = json.loads(new[CONFIG])
                new[CONFIG] = json.dumps({**config, "lora_alpha": 16}).encode()
                self._finish(name, files | new)
                for file, data in new.items():
                    yield lambda file=file, data=data: _replaced(target / file, data)
                yield lambda: None
            if kind == "swap":
                new = self._adapter(random_)
                self._finish(name, new)
                made = self._root / f".{name}-new"
                yield made.mkdir
                for file, data in new.items():
                    (made / file).write_bytes(data)
                yield lambda: (shutil.rmtree(target), made.rename(target))
        if random_.random() < 0.2:
            yield lambda: os.utime(target / CONFIG) if (target / CONFIG).exists() else None

    def _finish_after(self, name: str, files: Files, file: str, target: Path) -> None:
        """Without its optional files an adapter is whole too, if they come later."""
        there = {path.name for path in target.iterdir()} | {file}
        if {CONFIG, WEIGHTS} <= there:
            self._finish(name, {each: files[each] for each in there})


def _replaced(path: Path, data: bytes) -> str:
    draft = path.with_name(f".{path.name}")
    draft.write_bytes(data)
    draft.replace(path)
    return QUICK


def _written(path: Path, data: bytes, random_: random.Random, *, held: bool) -> Iterator[Any]:
    """Write in pieces: in one go, perhaps to a file of full length; or opened anew for each."""
    cuts = sorted(random_.choices(range(len(data) + 1), k=random_.choice((0, 1, 3))))
    bounds = list(zip([0, *cuts], [*cuts, len(data)], strict=True))
    if not held:
        for at, to in bounds:
            with path.open("ab") as file:
                file.write(data[at:to])
            yield lambda: None
        return
    with path.open("wb") as file:
        if random_.random() < 0.5:
            file.truncate(len(data))
        for at, to in bounds:
            file.seek(at)
            file.write(data[at:to])
            file.flush()
            yield lambda: None


def _shuffled(files: Files, random_: random.Random) -> list[tuple[str, bytes]]:
    """Files in any order; optional ones before the weights, or they would come too late."""
    names = [*files]
    random_.shuffle(names)
    with contextlib.suppress(ValueError):
        names.remove("README.md")
        names.insert(0, "README.md")
    return [(name, files[name]) for name in names]


def _digest(files: Files) -> str:
    """Of a config, what it says: without the line's end it is whole too."""
    means = dict(files)
    with contextlib.suppress(ValueError):
        means[CONFIG] = json.dumps(json.loads(files[CONFIG]), sort_keys=True).encode()
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(means.items())}
    return json.dumps(sums)
