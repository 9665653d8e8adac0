"""Play a history of uploads, replaces, aliases and deletes, and record what was acknowledged.

Row 4 records ``python -m tests.torture.history DATA ADAPTERS --seed 7``. It writes ``begin``
before each change, and one JSON line after it: the state that must be on disk from then on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from veneer_registry.registry import Registry

from tests.unit.registry.kit import BASE, announce, bundle_files, make_adapter, push

CONTENTS = 5
"""Number of adapters with different content."""

BROKEN_OFF = "broken-off"
"""Name and content of an upload that a history never finishes."""

Promise = dict[str, list[str]]
"""Name -> kept revisions, the current one first; ``name/alias`` -> its targets."""


def make_contents(folder: Path) -> None:
    """Make the adapters that histories publish."""
    for number, name in enumerate([*map(str, range(CONTENTS)), BROKEN_OFF]):
        made = make_adapter(folder / name, seed=number)
        (made / "chat_template.jinja").write_text(f"{{{{ messages }}}} {number}")


def open_registry(data: Path) -> Registry:
    """Open the registry as histories and their judge do."""
    return Registry.open(data, BASE, retain_superseded=1)


def say(word: str) -> None:
    """Print one line in one system call, so that a trace shows when it was printed."""
    os.write(1, f"{word}\n".encode())


def break_off(registry: Registry, folder: Path) -> None:
    """Send half of each file, then suspend the upload."""
    files = bundle_files(folder)
    upload = registry.begin_upload(announce(BROKEN_OFF, files), resume=True)
    for name, data in files.items():
        upload.write(name, 0, data[: len(data) // 2])
    upload.suspend()


def resume(registry: Registry, name: str, folder: Path) -> str:
    """Send the missing rest of an upload and publish it; return the revision."""
    files = bundle_files(folder)
    request = announce(name, files, allow_replace=True)
    upload = registry.begin_upload(request, resume=True)
    for file, at in registry.committed(request).items():
        upload.write(file, at, files[file][at:])
    return registry.publish(upload).record.ref.revision


class Teller:
    """Makes random changes and records what each one acknowledged."""

    def __init__(self, data: Path, adapters: Path, rng: random.Random) -> None:
        self.data = data
        self.adapters = adapters
        self.rng = rng
        self.registry = open_registry(data)
        self.promised: Promise = {}

    def publish(self, name: str, content: int) -> None:
        folder = self.adapters / str(content)
        if self.rng.random() < 0.5:
            revision = resume(self.registry, name, folder)
        else:
            published = push(self.registry, name, folder, allow_replace=True)
            revision = published.record.ref.revision
        others = [other for other in self.promised.get(name, []) if other != revision]
        self.promised[name] = [revision, *others[:1]]

    def delete(self, name: str) -> None:
        self.registry.delete(name)
        for kept in [kept for kept in self.promised if kept.partition("/")[0] == name]:
            del self.promised[kept]

    def move_alias(self, name: str) -> None:
        revision = self.rng.choice(self.promised[name])
        self.registry.set_alias(f"{name}/prod", [(revision, 1)])
        self.promised[f"{name}/prod"] = [revision]

    def step(self, number: int) -> None:
        """Make one change. The first two publish, so that even the shortest history
        replaces."""
        name = self.rng.choice(("chat", "code", "legal"))
        chance = self.rng.random() if number > 1 and name in self.promised else 1
        if chance < 0.2:
            self.delete(name)
        elif chance < 0.45:
            self.move_alias(name)
        elif chance < 0.55:
            break_off(self.registry, self.adapters / BROKEN_OFF)
        else:
            self.publish(name, self.rng.randrange(CONTENTS))

    def play(self, steps: int) -> None:
        """Make all changes, with restarts in between."""
        say(json.dumps(self.promised))
        for number in range(steps):
            say("begin")
            self.step(number)
            say(json.dumps(self.promised))
            if number % 5 == 4:
                self.registry.close()
                self.registry = open_registry(self.data)
        self.registry.close()


@contextlib.contextmanager
def no_fsync_of(kind: Any) -> Iterator[None]:
    """A planted bug: `os.fsync` skips folders, or files."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if not kind(os.fstat(fd).st_mode):
            real(fd)

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = real


@contextlib.contextmanager
def other_sqlite(words: Mapping[str, str]) -> Iterator[None]:
    """A planted bug: words in the product's SQL are replaced."""
    real = sqlite3.connect

    class Other(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            for old, new in words.items():
                sql = sql.replace(old, new)
            return super().execute(sql, *rest)

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        return real(*args, factory=Other, **kwargs)

    sqlite3.connect = connect
    try:
        yield
    finally:
        sqlite3.connect = real


def careless_sqlite() -> AbstractContextManager[None]:
    """A planted bug: a commit is not durable."""
    return other_sqlite({"synchronous=FULL": "synchronous=OFF"})


PLANTED = {
    "folders are not fsynced": lambda: no_fsync_of(stat.S_ISDIR),
    "files are not fsynced": lambda: no_fsync_of(stat.S_ISREG),
    "SQLite commits without fsync": careless_sqlite,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--planted", choices=sorted(PLANTED))
    given = parser.parse_args()
    with PLANTED[given.planted]() if given.planted else contextlib.nullcontext():
        teller = Teller(given.data, given.adapters, random.Random(given.seed))
        teller.play(given.steps)


if __name__ == "__main__":
    main()
