"""`veneer-server store`: reports damaged content and removes unneeded content."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry.bundle_files import TEMPLATE_FILE
from veneer_registry.errors import (
    AdapterCorrupt,
    CatalogDamaged,
    FailedPrecondition,
    InvalidField,
    StoreLocked,
)
from veneer_registry.registry import Registry
from veneer_registry.upkeep import collect, quarantine, verify
from veneer_registry.weights import WEIGHTS_FILE

from tests.refused import refused
from tests.unit.registry.kit import BASE, announce, bundle_files, make_adapter, push

Adapters = Callable[[int], Path]
GC = {"uploads_older_than": 0.0, "quarantine": False, "dry_run": False}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture
def filled(data: Path, tmp_path: Path, adapters: Adapters) -> dict[str, Path]:
    """Three adapters, two of the same weights; folders by what they are."""
    with_template = make_adapter(tmp_path / "t", seed=1)
    (with_template / TEMPLATE_FILE).write_text("{{ x }}")
    with Registry.open(data, BASE) as registry:
        first = push(registry, "chat", adapters(1)).record.ref
        twin = push(registry, "twin", with_template).record.ref
        other = push(registry, "code", adapters(2)).record.ref
    assert first.weights_digest == twin.weights_digest
    store = data / "store"
    return {
        "shared": store / "weights" / first.weights_digest,
        "own": store / "weights" / other.weights_digest,
        "template": store / "revisions" / twin.revision,
    }


def test_whole(data: Path, filled: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(data, lambda at, of: seen.append((at, of)))
    assert (found.names, found.revisions, found.weights) == (3, 3, 2)
    assert found.damaged == []
    assert found.bytes > 10_000
    assert seen[-1] == (5, 5)


def test_a_folder_whose_name_means_something_in_a_uri(
    tmp_path: Path, adapters: Adapters
) -> None:
    data = tmp_path / "50%3f of it?mode=rw#1"
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", adapters(1))
    assert verify(data).names == 1
    assert collect(data, **GC).unreferenced == 0


def test_beside_a_server(data: Path, filled: dict[str, Path]) -> None:
    with Registry.open(data, BASE):
        assert verify(data).damaged == []
        with pytest.raises(StoreLocked):
            collect(data, **GC)
        with pytest.raises(StoreLocked):
            quarantine(data, [])


def test_every_damage_is_named(data: Path, filled: dict[str, Path]) -> None:
    flip(filled["shared"] / WEIGHTS_FILE)
    flip(filled["template"] / TEMPLATE_FILE)
    (filled["own"] / WEIGHTS_FILE).unlink()
    found = {damage.digest: damage for damage in verify(data).damaged}
    assert found.keys() == {path.name for path in filled.values()}
    shared = found[filled["shared"].name]
    assert [adapter.split("@")[0] for adapter in shared.adapters] == ["chat", "twin"]
    assert TEMPLATE_FILE in found[filled["template"].name].why


def test_quarantine_by_hand(data: Path, filled: dict[str, Path], adapters: Adapters) -> None:
    flip(filled["shared"] / WEIGHTS_FILE)
    assert quarantine(data, verify(data).damaged) == 1
    assert verify(data).damaged == []
    assert list(verify(data).quarantined) == [filled["shared"].name]
    with Registry.open(data, BASE) as registry:
        for name in ("chat", "twin"):
            with pytest.raises(AdapterCorrupt):
                registry.resolve(name)
            line, published = registry.history(name)
            assert (line.event, line.who.peer) == ("quarantined", "command line")
            assert line.revision == published.revision
        push(registry, "chat", adapters(1))
        assert registry.resolve("twin")
    assert collect(data, **{**GC, "quarantine": True}).quarantined == 1
    assert verify(data).quarantined == {}


def test_collecting(data: Path, filled: dict[str, Path], adapters: Adapters) -> None:
    with Registry.open(data, BASE) as registry:
        upload = registry.begin_upload(announce("new", bundle_files(adapters(3))))
        upload.write(WEIGHTS_FILE, 0, b"x" * 5000)
    with sqlite3.connect(data / "catalog.sqlite") as catalog:
        catalog.execute("PRAGMA foreign_keys=ON")
        catalog.execute("DELETE FROM names WHERE name = 'code'")
    assert verify(data).unreferenced == 2
    later = {**GC, "uploads_older_than": time.time() + 1}
    planned = collect(data, **{**later, "dry_run": True})
    assert (planned.unreferenced, planned.uploads) == (2, 1)
    assert filled["own"].exists()
    assert planned.bytes > 5000
    assert collect(data, **later) == planned
    assert not filled["own"].exists()
    assert collect(data, **later).bytes == 0
    assert verify(data).damaged == []


def test_what_is_no_data_folder(tmp_path: Path, data: Path, filled: dict[str, Path]) -> None:
    for call in (lambda: verify(tmp_path / "x"), lambda: collect(tmp_path / "x", **GC)):
        with refused(InvalidField, field="data_dir"):
            call()
    assert not (tmp_path / "x").exists()
    with sqlite3.connect(data / "catalog.sqlite") as catalog:
        catalog.execute("PRAGMA user_version = 1")
    with refused(FailedPrecondition, schema=1):
        verify(data)
    for path in data.glob("catalog.sqlite-*"):
        path.unlink()
    (data / "catalog.sqlite").write_bytes(os.urandom(4096))
    with refused(CatalogDamaged, file="catalog.sqlite"):
        verify(data)
