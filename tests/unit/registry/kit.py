"""Tiny adapters and bases for the registry's tests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from veneer_registry import schema
from veneer_registry.adapter import PROJECTIONS, BaseFingerprint, BaseSpec, Projection
from veneer_registry.bundle_files import ALLOWED_FILES
from veneer_registry.catalog import Catalog
from veneer_registry.core import Core
from veneer_registry.errors import VeneerError
from veneer_registry.format import check_adapter, read_adapter
from veneer_registry.records import Published, UploadFile, UploadRequest
from veneer_registry.registry import Registry
from veneer_registry.shared.catalog import PostgresCatalog
from veneer_registry.tensor_names import tensor_keys
from veneer_registry.upload import Upload
from veneer_registry.values import to_bfloat16

from tests.adapter_files import write_adapter

SHAPES: dict[Projection, tuple[int, int]] = {
    "q_proj": (32, 32),
    "k_proj": (16, 32),
    "v_proj": (16, 32),
    "o_proj": (32, 32),
    "gate_proj": (64, 32),
    "up_proj": (64, 32),
    "down_proj": (32, 64),
}
BASE = BaseSpec(
    name="tiny",
    num_layers=2,
    shapes=SHAPES,
    fingerprint=BaseFingerprint("a" * 64, "b" * 64, "c" * 64, "d" * 64),
    names=("someone/base",),
)
Tensors = dict[str, np.ndarray[Any, Any]]


def make_tensors(
    rank: int = 4,
    *,
    seed: int = 0,
    dtype: str = "BF16",
    layers: Iterable[int] = (0, 1),
    projections: Iterable[Projection] = PROJECTIONS,
) -> Tensors:
    """Random non-zero A and B for every given layer and projection."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in layers:
        for projection in projections:
            out_features, in_features = SHAPES[projection]
            shapes = ((rank, in_features), (out_features, rank))
            for key, shape in zip(tensor_keys(layer, projection), shapes, strict=True):
                array = random.standard_normal(shape).astype(np.float32)
                if dtype == "BF16":
                    tensors[key] = to_bfloat16(array)
                else:
                    tensors[key] = array.astype({"F32": np.float32, "F16": np.float16}[dtype])
    return tensors


def make_adapter(
    folder: Path,
    config: Mapping[str, object] | None = None,
    tensors: Tensors | None = None,
    *,
    seed: int = 0,
) -> Path:
    """An adapter folder: rank 4, alpha 8, all projections, unless given otherwise."""
    whole = {"r": 4, "lora_alpha": 8, **(config or {})}
    write_adapter(folder, whole, make_tensors(seed=seed) if tensors is None else tensors)
    return folder


def assert_checks_agree(folder: Path) -> None:
    """Check that the check without a digest agrees with the full one without a base."""

    def outcome(check: Callable[[], tuple[str, ...]]) -> object:
        try:
            return check()
        except VeneerError as error:
            return type(error), error.message, error.metadata

    local = outcome(lambda: check_adapter(folder))
    assert local == outcome(lambda: read_adapter(folder, None).warnings)


def raw_file(header: object, data: bytes) -> bytes:
    """A safetensors file with any header: an object, or the JSON text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def bundle_files(folder: Path) -> dict[str, bytes]:
    """Bytes of the folder's bundle files."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name in ALLOWED_FILES
    }


def announce(name: str, files: Mapping[str, bytes], **options: Any) -> UploadRequest:
    """A request that announces ``files`` correctly."""
    listed = tuple(
        UploadFile(file, len(data), hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    )
    return UploadRequest(name, listed, **options)


def send(upload: Upload, files: Mapping[str, bytes], chunk: int = 4096) -> Upload:
    """Write all files in chunks."""
    for name, data in files.items():
        for at in range(0, len(data), chunk):
            upload.write(name, at, data[at : at + chunk])
    return upload


def push(registry: Registry, name: str, folder: Path, **options: Any) -> Published:
    """Upload and publish a folder."""
    files = bundle_files(folder)
    return registry.publish(
        send(registry.begin_upload(announce(name, files, **options)), files)
    )


class Kept:
    """What the registry of a data folder has stored."""

    local = "store"
    """Folder of uploads and staging."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def stored(self, kind: str) -> set[str]:
        """Digests of the ``weights`` or ``revisions`` that a name or a lease needs."""
        return {path.name for path in (self.data / "store" / kind).iterdir()}

    def staged(self) -> list[str]:
        """What uploads and publications have left so far."""
        root = self.data / self.local
        return [
            path.name for part in ("staging", "uploads") for path in (root / part).iterdir()
        ]


def core_of(registry: Registry) -> Core:
    """For ends without a cleanup, and to stop between catalog and index."""
    return registry._core  # private: whoever closes a registry cleans up


def kill(registry: Registry) -> None:
    """Like kill -9: only release the lock. (A copy of a catalog is lost with its process.)"""
    core = core_of(registry)
    if isinstance(core.catalog, PostgresCatalog):
        core.catalog.close()
        core.close()
    core.lock.release()


def limit_pages(catalog: Catalog, most: int) -> None:
    """Simulate a full disk beyond this many pages; the limit is per connection."""
    catalog._writer.execute(f"PRAGMA max_page_count={most}")  # private: this connection


def catalog_of(registry: Registry) -> Catalog:
    return core_of(registry).catalog


def make_older(catalog: Path, version: int) -> None:
    """Turn a closed data folder into one of an older Veneer: its tables, filled from the
    present ones, and nothing in the store that it did not write."""
    store = catalog.parent / "store"
    for path in (store / "id", store / "changes", *store.glob("revisions/*/registered-*")):
        path.unlink(missing_ok=True)
    today = catalog.with_name("today")
    catalog.rename(today)
    with contextlib.closing(sqlite3.connect(catalog, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript("".join(schema.STEPS[:version]))
        db.execute("ATTACH ? AS today", (str(today),))
        tables = db.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")
        db.execute("BEGIN")
        for (table,) in tables.fetchall():
            if table.startswith("sqlite_"):
                continue
            columns = ", ".join(
                row[1] for row in db.execute(f"PRAGMA main.table_info({table})").fetchall()
            )
            db.execute(f"DELETE FROM main.{table}")
            db.execute(
                f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM today.{table}"
            )
        db.execute("COMMIT")
        db.execute(f"PRAGMA user_version = {version}")
    today.unlink()
