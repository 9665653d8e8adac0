"""A front process that is killed: the real `App` on real sockets and a real data folder,
with a FAKE engine. Uploads are checked in this process, since a separate process for this would
start too late for a front that lives for half a second.

``python -m tests.torture.killed_front BASE CACHE DATA`` imports everything, prints
``{"imported": seconds}`` and waits for a line ``POINT``. Then it starts and reports when it is
ready. At the POINT-th operation on the data folder (0 for none) it kills itself with SIGKILL,
before or after that operation; its parent kills it at any other time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import uvloop
from veneer_registry.catalog import Catalog
from veneer_registry.changes import Change
from veneer_registry.format import read_upload
from veneer_registry.rows import SERVER, Who
from veneer_registry.store import Store
from veneer_server.app import App
from veneer_server.config import load_config
from veneer_server.engine_client.resident_set import Resident
from veneer_server.serving.housekeeping import Housekeeping

from tests.unit.server.rpc.fake_engine import FakeEngine

RETAIN = 1
"""Number of superseded revisions that a name keeps."""

_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "shutil.rmtree"}


class RestoringEngine(FakeEngine):
    """FAKE, like `FakeEngine`; restores the last run's residents, as the real client does
    (which counts them as held as soon as they are expected)."""

    def resident_set(self) -> tuple[Resident, ...]:
        return super().resident_set() if self.starts else tuple(self.expected)

    async def start(self) -> Any:
        info = await super().start()
        for resident in self.expected:
            digest = resident.source.weights_digest
            self.sources[digest] = resident.source
            self._set_tier(digest, resident.tier, pinned=resident.pin is not None)
        return info


def die_at(point: int, data: Path) -> None:
    """Kill this process at the ``point``-th change: a system call that changes ``data``, or a
    statement that changes the catalog."""
    count, lock = 0, threading.Lock()
    root = str(data)

    def step() -> None:
        nonlocal count
        with lock:
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or event == "open":
            path = arguments[0]
            if isinstance(path, int | bytes) or not os.fspath(path).startswith(root):
                return
            if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                step()

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*arguments: Any) -> Any:
            step()
            result = real(*arguments)
            step()
            return result

        return stepping

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            if sql.startswith("SELECT"):
                return super().execute(sql, *rest)
            return around(super().execute)(sql, *rest)  # type: ignore[no-any-return]

    real_connect = sqlite3.connect
    sqlite3.connect = lambda *a, **k: real_connect(*a, factory=Connection, **k)  # type: ignore[assignment]
    os.fsync, os.write = around(os.fsync), around(os.write)
    sys.addaudithook(hook)


# ------------------------------------------------------------------- planted bugs


def _commit_later() -> None:
    """A planted bug: a change is acknowledged once its statements have run, but only the next
    change commits it."""
    right = Catalog.__init__

    def made(self: Catalog, path: Path, **options: Any) -> None:
        right(self, path, **options)
        for reader in (self._reader, self._urgent):
            reader._connection.close()  # private: reads must see uncommitted changes
            reader._connection = self._writer  # private: so they use the writer's

    @contextmanager
    def change(self: Catalog, who: Who = SERVER, time: float = 0.0) -> Iterator[Change]:
        with self._write_lock:
            if self._writer.in_transaction:
                self._writer.execute("COMMIT")
            self._writer.execute("BEGIN IMMEDIATE")
            sql = "UPDATE counter SET value = value + 1 RETURNING value"
            (number,) = self._writer.execute(sql).fetchone()
            yield Change(self._writer, number, who, time)

    @contextmanager
    def own(self: Catalog) -> Iterator[sqlite3.Connection]:
        with self._write_lock:
            if not self._writer.in_transaction:
                self._writer.execute("BEGIN IMMEDIATE")
            yield self._writer

    Catalog.__init__ = made  # type: ignore[method-assign]
    Catalog.change = change  # type: ignore[method-assign,assignment]
    Catalog._own = own  # type: ignore[method-assign,assignment]


def _empty_uploads() -> None:
    """A planted bug: a start removes interrupted uploads."""
    right = Store.__init__

    def made(self: Store, root: Path) -> None:
        shutil.rmtree(root / "uploads", ignore_errors=True)
        right(self, root)

    Store.__init__ = made  # type: ignore[method-assign]


def _pins_later() -> None:
    """A planted bug: pins are recorded only at the end of a run."""

    async def kept(self: Housekeeping) -> None:
        return None

    Housekeeping.keep_residents = kept  # type: ignore[method-assign]


PLANTED = {
    "acknowledged before the catalog's commit": _commit_later,
    "uploads are emptied at start": _empty_uploads,
    "pins are written down later": _pins_later,
}


async def serve(base: str, cache: str, data: Path) -> None:
    config = load_config(
        {
            "base": base,
            "cache_dir": cache,
            "data_dir": str(data),
            "listen": "127.0.0.1:0",
            "metrics_listen": "",
            "port_file": str(data.with_name("ports.json")),
            "retain_superseded": str(RETAIN),
        },
        {},
    )
    began = time.perf_counter()

    def ready(line: str) -> None:
        ports = json.loads(data.with_name("ports.json").read_text())
        told = {"ready": time.perf_counter() - began, "cpu": time.process_time()}
        print(json.dumps({**told, "grpc": ports["grpc"]}), flush=True)

    app = App(config, ready, RestoringEngine, read=read_upload)  # type: ignore[arg-type]
    await app.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("cache")
    parser.add_argument("data", type=Path)
    parser.add_argument("--planted", choices=sorted(PLANTED))
    given = parser.parse_args()
    if given.planted:
        PLANTED[given.planted]()
    imported = time.time() - psutil.Process().create_time()
    print(json.dumps({"imported": imported}), flush=True)
    if line := sys.stdin.readline():
        if point := int(line):
            die_at(point, given.data)
        uvloop.run(serve(given.base, given.cache, given.data))


if __name__ == "__main__":
    main()
