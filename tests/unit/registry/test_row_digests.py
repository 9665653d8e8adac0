"""Bit flips in the catalog: a damaged row's adapter is refused, all others are served."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry import rebuild
from veneer_registry.errors import AdapterCorrupt, AdapterNotFound, CatalogDamaged, VeneerError
from veneer_registry.registry import Registry
from veneer_registry.upkeep import collect, verify

from tests.refused import refused
from tests.unit.registry.kit import BASE, push

Adapters = Callable[[int], Path]


@pytest.fixture
def filled(data: Path, adapters: Adapters) -> Path:
    with Registry.open(data, BASE) as registry:
        old = push(registry, "chat", adapters(1), labels={"team": "a"}).record.ref
        push(registry, "chat", adapters(2), allow_replace=True)
        registry.set_alias("chat/prod", [(old.revision, 1)])
        push(registry, "code", adapters(3))
        push(registry, "other", adapters(4))
    return data


def spoil(data: Path, sql: str, *values: object) -> None:
    """Change a row behind its digest's back."""
    with sqlite3.connect(data / "catalog.sqlite") as db:
        assert db.execute(sql, values).rowcount == 1
    db.close()


def damage_is_told(registry: Registry, spec: str) -> None:
    with pytest.raises(AdapterCorrupt) as caught:
        registry.acquire(spec)
    assert caught.value.code == "DATA_LOSS"
    assert caught.value.metadata["fix"] == "veneer-server store recover"


OTHER = "SET {} = (SELECT {} FROM revisions WHERE name = 'other') WHERE name = 'code'"


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE revisions " + OTHER.format("weights", "weights"),
        "UPDATE revisions " + OTHER.format("revision", "'" + "0" * 64 + "'"),
        "UPDATE revisions " + OTHER.format("manifest", "manifest"),
        "UPDATE revisions SET manifest = replace(manifest, '2.0', '3.0') WHERE name = 'code'",
        "UPDATE revisions SET created = created + 1 WHERE name = 'code'",
        "UPDATE revisions SET bytes = x'00' WHERE name = 'code'",
        "UPDATE revisions SET labels = '{}}' WHERE name = 'code'",
        """UPDATE revisions SET labels = '{"a": "1", "a": "2"}' WHERE name = 'code'""",
        "UPDATE revisions SET labels = CAST(x'ff41' AS TEXT) WHERE name = 'code'",
        "UPDATE revisions SET digest = '' WHERE name = 'code'",
        "UPDATE names " + OTHER.format("current", "revision"),
        "UPDATE names SET generation = generation + 4 WHERE name = 'code'",
        "UPDATE names SET name = 'codf' WHERE name = 'code'",
        "UPDATE names SET name = CAST(x'ff41' AS TEXT) WHERE name = 'code'",
    ],
)
def test_a_damaged_row_is_refused_and_the_others_are_served(
    filled: Path, adapters: Adapters, sql: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = sorted(path.name for path in (filled / "store").rglob("*"))
    spoil(filled, sql)
    with Registry.open(filled, BASE) as registry:
        damage_is_told(registry, "code")
        for spec in ("chat", "chat/prod", "other"):
            registry.acquire(spec).release()
        assert {"chat", "other"} <= {record.ref.name for record in registry.list()}
        assert "store recover" in caplog.text
        assert sorted(path.name for path in (filled / "store").rglob("*")) == store
        # Pushing it again is the other way to repair it.
        push(registry, "code", adapters(3), allow_replace=True)
        registry.acquire("code").release()
    with Registry.open(filled, BASE) as registry:
        registry.acquire("code").release()


def test_a_row_that_is_damaged_while_the_server_runs(filled: Path, adapters: Adapters) -> None:
    with Registry.open(filled, BASE) as registry:
        spoil(filled, "UPDATE revisions SET created = created + 1 WHERE name = 'code'")
        with pytest.raises(AdapterCorrupt):
            registry.acquire("code")
        assert [r.ref.name for r in registry.list(limit=2)] == ["chat", "other"]
        assert registry.leases(registry.resolve("code").weights_digest) == 0
        push(registry, "code", adapters(3))
        registry.acquire("code").release()


def test_a_change_does_not_make_a_damaged_row_look_whole(filled: Path) -> None:
    with Registry.open(filled, BASE) as registry:
        spoil(filled, "UPDATE names SET retain = 900 WHERE name = 'code'")
        with pytest.raises(AdapterCorrupt):
            registry.update("code", labels={"a": "b"})
    with Registry.open(filled, BASE) as registry:
        damage_is_told(registry, "code")


def test_a_damaged_alias_is_refused_alone(filled: Path) -> None:
    spoil(filled, "UPDATE aliases SET targets = previous")
    with Registry.open(filled, BASE) as registry:
        damage_is_told(registry, "chat/prod")
        registry.acquire("chat").release()
        assert registry.aliases("chat") == ()


def test_a_damaged_line_of_history_is_not_shown_as_true(filled: Path) -> None:
    spoil(filled, "UPDATE history SET actor = 'mallory' WHERE name = 'code'")
    with Registry.open(filled, BASE) as registry:
        assert [line.event for line in registry.history("code")] == ["damaged"]


def test_nothing_is_collected_where_a_row_is_damaged(filled: Path) -> None:
    spoil(filled, "UPDATE revisions SET weights = ? WHERE name = 'code'", "0" * 64)
    before = sorted(path.name for path in (filled / "store").rglob("*"))
    with pytest.raises(VeneerError) as caught:
        collect(filled, uploads_older_than=0, quarantine=False, dry_run=False)
    assert caught.value.reason == "CATALOG_DAMAGED"
    assert sorted(path.name for path in (filled / "store").rglob("*")) == before


def content(data: Path) -> set[str]:
    """Digests of all content below the store, wherever it lies."""
    folders = (p.name for p in (data / "store").rglob("*") if p.is_dir())
    return {name.rpartition("-")[2] for name in folders if len(name) >= 64}


@pytest.mark.parametrize("table", ["names", "facts", "aliases"])
def test_a_schema_that_is_no_text_is_damage_and_can_be_recovered(
    filled: Path, table: str
) -> None:
    """SQLite quotes it in its error, which Python then cannot decode."""
    stored, path = content(filled), filled / "catalog.sqlite"
    whole = path.read_bytes()
    for old in (b"CREATE TABLE " + table.encode(), b"CREATE TABLE"):
        assert old in whole
        path.write_bytes(whole.replace(old, old[:-1] + b"\xa0"))
        with pytest.raises(VeneerError) as caught:
            Registry.open(filled, BASE)
        assert caught.value.reason == "CATALOG_DAMAGED"
        assert "store recover" in caught.value.message
        with refused(CatalogDamaged, fix="veneer-server store recover"):
            verify(filled)
    assert content(filled) == stored
    rebuild.recover(filled)
    with Registry.open(filled, BASE) as registry:
        assert registry.get("chat").ref.name == "chat"


def test_bits_that_flip_anywhere_in_the_database(filled: Path, tmp_path: Path) -> None:
    """Each either changes nothing that is served, or is refused; no content is deleted."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = random.Random(seed)
    with Registry.open(filled, BASE) as registry:
        good = {spec: registry.get(spec) for spec in ("chat", "chat/prod", "code", "other")}
    whole, stored = (filled / "catalog.sqlite").read_bytes(), content(filled)
    outcomes = {"served": 0, "refused": 0, "start": 0}
    for number in range(60):
        data = tmp_path / f"flip-{number}"
        shutil.copytree(filled, data)
        flipped, at, bit = bytearray(whole), draw.randrange(len(whole)), draw.randrange(8)
        flipped[at] ^= 1 << bit
        (data / "catalog.sqlite").write_bytes(flipped)
        stopped = None
        try:
            with Registry.open(data, BASE) as registry:
                for spec, record in good.items():
                    try:
                        with registry.acquire(spec) as lease:
                            found = lease.record
                        assert (found.ref, found.manifest) == (record.ref, record.manifest)
                        outcomes["served"] += 1
                    except (AdapterCorrupt, AdapterNotFound):
                        outcomes["refused"] += 1
        except VeneerError as error:
            stopped = error
        if stopped is not None:
            known = ("CATALOG_DAMAGED", "STORE_MISMATCH", "FAILED_PRECONDITION")
            assert stopped.reason in known, (at, bit)
            assert "store recover" in stopped.message, (at, bit)
            outcomes["start"] += 1
        assert content(data) == stored, (at, bit)
        shutil.rmtree(data)
    print(outcomes)
    assert outcomes["served"]
