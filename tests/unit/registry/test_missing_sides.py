"""Catalog or store of a data folder is missing, empty, old or from another folder: nothing is
deleted, and the error says what to do."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from veneer_registry.bundle import Bundle
from veneer_registry.catalog import Catalog
from veneer_registry.errors import AdapterCorrupt, FailedPrecondition, VeneerError
from veneer_registry.registry import Registry
from veneer_registry.store import Store
from veneer_registry.stored_adapter import verify_weights

from tests.unit.registry.kit import (
    BASE,
    announce,
    bundle_files,
    make_adapter,
    make_older,
    push,
    send,
)

Adapters = Callable[[int], Path]


def tree(data: Path) -> dict[str, bytes]:
    """What the store holds, but for its own marks."""
    store = data / "store"
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.parent != store
    }


def refused(data: Path) -> VeneerError:
    """The error of a start that changes nothing in the store, twice."""
    before = tree(data)
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as caught:
            Registry.open(data, BASE).close()
        assert tree(data) == before
    return caught.value


@pytest.fixture
def filled(data: Path, adapters: Adapters) -> Path:
    """Two names, one with an alias, labels and a superseded revision."""
    with Registry.open(data, BASE) as registry:
        first = push(registry, "chat", adapters(1), labels={"team": "a"}).record.ref
        push(registry, "chat", adapters(2), allow_replace=True)
        registry.set_alias("chat/prod", [(first.revision, 1)])
        push(registry, "code", adapters(3))
    return data


def catalog_files(data: Path) -> Iterator[Path]:
    return data.glob("catalog.sqlite*")


def remove(data: Path) -> None:
    for path in catalog_files(data):
        path.unlink()


def empty(data: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (data / f"catalog.sqlite{suffix}").write_bytes(b"")


def only_main_removed(data: Path) -> None:
    (data / "catalog.sqlite-wal").write_bytes(b"what is left of a log")
    (data / "catalog.sqlite").unlink()


def new_one(data: Path) -> None:
    remove(data)
    Catalog(data / "catalog.sqlite").close()


def no_tables(data: Path) -> None:
    remove(data)
    with sqlite3.connect(data / "catalog.sqlite") as db:
        db.execute("PRAGMA journal_mode=WAL")


def of_another_folder(data: Path) -> None:
    other = data.with_name("other")
    Registry.open(other, BASE).close()
    remove(data)
    shutil.copy(other / "catalog.sqlite", data)


def without_rows(data: Path) -> None:
    with sqlite3.connect(data / "catalog.sqlite") as db:
        db.execute("PRAGMA foreign_keys=ON")
        db.execute("DELETE FROM names")


@pytest.mark.parametrize(
    "spoil",
    [remove, empty, only_main_removed, new_one, no_tables, of_another_folder, without_rows],
    ids=lambda f: f.__name__,
)
def test_a_catalog_that_is_gone_does_not_take_the_adapters_along(
    filled: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(filled)
    error = refused(filled)
    assert error.reason == "STORE_MISMATCH"
    assert "store recover" in error.metadata["fix"]
    assert "veneer-server store recover" in error.message


@pytest.mark.parametrize("spoil", [remove, empty, without_rows], ids=lambda f: f.__name__)
def test_the_same_for_a_folder_of_an_older_veneer(
    filled: Path, spoil: Callable[[Path], None]
) -> None:
    make_older(filled / "catalog.sqlite", 3)
    spoil(filled)
    assert refused(filled).reason == "STORE_MISMATCH"


def test_an_old_copy_of_the_catalog_is_refused(filled: Path, adapters: Adapters) -> None:
    kept = (filled / "catalog.sqlite").read_bytes()
    with Registry.open(filled, BASE) as registry:
        push(registry, "later", adapters(4))
    (filled / "catalog.sqlite").write_bytes(kept)
    error = refused(filled)
    assert error.metadata["found"] == "catalog older than store"


KILLED = """
import os, sys
from pathlib import Path
from tests.unit.registry.kit import BASE, push
from veneer_registry.registry import Registry
registry = Registry.open(Path(sys.argv[1]), BASE)
for number, folder in enumerate(sys.argv[2:]):
    push(registry, f"killed-{number}", Path(folder))
os._exit(0)
"""


def end_without_closing(data: Path, *folders: Path) -> None:
    """Publish in a process that ends as if killed: the log is not put into the database."""
    command = [sys.executable, "-c", KILLED, str(data), *map(str, folders)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])


def test_a_write_ahead_log_that_is_gone_is_noticed(
    filled: Path, data: Path, adapters: Adapters
) -> None:
    end_without_closing(data, adapters(5), adapters(6))
    wal = data / "catalog.sqlite-wal"
    assert wal.stat().st_size > 0
    wal.unlink()
    assert refused(data).metadata["found"] == "catalog older than store"


def test_a_folder_whose_first_log_is_gone(data: Path, adapters: Adapters) -> None:
    """All that the catalog ever had was in the log."""
    end_without_closing(data, adapters(1))
    (data / "catalog.sqlite-wal").unlink()
    assert refused(data).reason == "STORE_MISMATCH"


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_store_that_is_mounted_late(filled: Path, how: str) -> None:
    store = filled / "store"
    store.rename(filled / "elsewhere")
    if how == "empty":
        store.mkdir()
    with pytest.raises(FailedPrecondition) as caught:
        Registry.open(filled, BASE)
    assert caught.value.metadata["found"] == f"store {how}"
    assert list(store.iterdir() if store.exists() else ()) == []
    if how == "empty":
        store.rmdir()
    (filled / "elsewhere").rename(store)
    with Registry.open(filled, BASE) as registry:
        for name in ("chat", "code", "chat/prod"):
            ref = registry.resolve(name)
            verify_weights(registry.weights_folder(ref), ref.weights_digest)


# ---------------------------------------------------------------- what must start


def test_a_folder_whose_adapters_were_all_deleted(filled: Path) -> None:
    with Registry.open(filled, BASE) as registry:
        registry.delete("chat")
        registry.delete("code")
    for _ in range(2):
        with Registry.open(filled, BASE) as registry:
            assert len(registry) == 0


def test_a_delete_that_was_cut_short_before_its_files_went(filled: Path) -> None:
    with Registry.open(filled, BASE) as registry:
        leases = [registry.acquire(name) for name in ("chat", "code", "chat/prod")]
        registry.delete("chat")
        registry.delete("code")
        assert leases
    with Registry.open(filled, BASE) as registry:
        assert len(registry) == 0


def commit_only(data: Path, adapter: Path) -> Bundle:
    """Leave the store as a first publish does that is killed before the catalog's turn."""
    registry = Registry.open(data, BASE)
    files = bundle_files(adapter)
    upload = send(registry.begin_upload(announce("chat", files)), files)
    folder = upload.folder
    upload.finish()
    digest = verify_folder(folder)
    bundle = Bundle(digest, {})
    Store(data / "store").commit(folder, bundle)
    registry.close()
    return bundle


def verify_folder(folder: Path) -> str:
    from veneer_registry.format import weights_digest

    return weights_digest(folder)


def test_a_first_publish_that_was_killed(data: Path, adapters: Adapters) -> None:
    bundle = commit_only(data, adapters(1))
    with Registry.open(data, BASE) as registry:
        assert len(registry) == 0
        assert push(registry, "chat", adapters(1)).record.ref.revision == bundle.revision
        assert registry.resolve("chat").weights_digest == bundle.weights


def test_either_side_of_a_fresh_folder_may_be_made_first(data: Path) -> None:
    Registry.open(data, BASE).close()
    remove(data)
    Registry.open(data, BASE).close()
    shutil.rmtree(data / "store")
    Registry.open(data, BASE).close()


@pytest.mark.parametrize("mark", ["id", "changes"])
@pytest.mark.parametrize("how", ["removed", "emptied", "flipped"])
def test_a_damaged_mark_says_nothing(filled: Path, mark: str, how: str) -> None:
    path = filled / "store" / mark
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.unlink()
    if how != "removed":
        path.write_bytes(b"" if how == "emptied" else bytes(content))
    for _ in range(2):
        with Registry.open(filled, BASE) as registry:
            assert len(registry) == 2


# ------------------------------------------------------------------- one adapter's


@pytest.mark.parametrize("kind", ["weights", "revisions"])
def test_lost_content_is_refused_until_it_is_back(
    filled: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with Registry.open(filled, BASE) as registry:
        code, alias = registry.resolve("code"), registry.resolve("chat/prod")
        before = {name: registry.revisions(name) for name in ("chat", "code")}
    gone = []
    for ref in (code, alias):
        digest = ref.weights_digest if kind == "weights" else ref.revision
        gone.append(filled / "store" / kind / digest)
        gone[-1].rename(filled / digest)
    for _ in range(2):
        with Registry.open(filled, BASE) as registry:
            for spec in ("code", "chat/prod", alias.short):
                with pytest.raises(AdapterCorrupt) as caught:
                    registry.acquire(spec)
                assert caught.value.code == "DATA_LOSS"
                assert "push" in caught.value.message
            registry.resolve("chat")
            assert registry.get("code").quarantined
            assert len(registry) == 2
    assert code.short in caplog.text
    for folder in gone:
        (filled / folder.name).rename(folder)
    with Registry.open(filled, BASE) as registry:
        assert {name: registry.revisions(name) for name in before} == before
        assert registry.resolve("chat/prod") == alias
        assert registry.resolve("code") == code


@pytest.mark.parametrize("kind", ["weights", "revisions"])
def test_a_push_brings_lost_content_back(filled: Path, adapters: Adapters, kind: str) -> None:
    with Registry.open(filled, BASE) as registry:
        code = registry.resolve("code")
    digest = code.weights_digest if kind == "weights" else code.revision
    shutil.rmtree(filled / "store" / kind / digest)
    with Registry.open(filled, BASE) as registry:
        published = push(registry, "code", adapters(3))
        assert registry.resolve("code") == code
        assert "repaired" in " ".join(published.warnings)
        assert registry.history("code")[0].event == "repaired"
    with Registry.open(filled, BASE) as registry:
        verify_weights(registry.weights_folder(registry.resolve("code")), code.weights_digest)


# ------------------------------------------------------------- what no row names


def leave_behind(data: Path, adapters: Adapters, number: int) -> Bundle:
    """Whole content that no row names."""
    return commit_only(data, adapters(number))


def test_whole_content_without_a_row_is_kept_in_quarantine(
    filled: Path, adapters: Adapters, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = leave_behind(filled, adapters, 7)
    with Registry.open(filled, BASE) as registry:
        unnamed = filled / "store" / "quarantine" / "unnamed"
        verify_weights(unnamed / f"w-{bundle.weights}", bundle.weights)
        assert (unnamed / f"r-{bundle.revision}" / "bundle.json").is_file()
        assert "moved 1 unreferenced weights and 1 revisions" in caplog.text
        assert push(registry, "again", adapters(7)).record.ref.weights_digest == bundle.weights
        assert registry.resolve("again").revision == bundle.revision
    with Registry.open(filled, BASE) as registry:
        registry.acquire("again").release()


def test_an_operators_own_files_are_left_alone(filled: Path) -> None:
    (filled / "store" / "weights" / "notes.txt").write_text("an operator's")
    Registry.open(filled, BASE).close()
    assert (filled / "store" / "weights" / "notes.txt").exists()


def test_quarantine_is_bounded_by_size_and_age(filled: Path, adapters: Adapters) -> None:
    for number in (7, 8, 9):
        leave_behind(filled, adapters, number)
        Registry.open(filled, BASE).close()
    with Registry.open(filled, BASE) as registry:
        held = filled / "store" / "quarantine" / "unnamed"
        assert registry.prune_quarantine(1 << 30, 3600) == []
        sizes = {p.name: sum(f.stat().st_size for f in p.iterdir()) for p in held.iterdir()}
        most = sum(sizes.values()) - 1
        removed = registry.prune_quarantine(most, 3600)
        assert sum(sizes.values()) - sum(size for _, size in removed) <= most
        assert len(removed) < len(sizes)
        assert {name for name, _ in removed} == sizes.keys() - {p.name for p in held.iterdir()}
        registry.prune_quarantine(1 << 30, 0)
        assert list(held.iterdir()) == []
        assert len(registry) == 2


def test_what_a_restored_catalog_names_comes_back_from_quarantine(
    filled: Path, adapters: Adapters
) -> None:
    """A start with a catalog that does not know it moves content; one that does takes it."""
    store = filled / "store"
    with Registry.open(filled, BASE) as registry:
        code = registry.resolve("code")
    unnamed = store / "quarantine" / "unnamed"
    unnamed.mkdir()
    (store / "weights" / code.weights_digest).rename(unnamed / f"w-{code.weights_digest}")
    (store / "revisions" / code.revision).rename(unnamed / f"r-{code.revision}")
    with Registry.open(filled, BASE) as registry:
        ref = registry.acquire("code").record.ref
        verify_weights(registry.weights_folder(ref), ref.weights_digest)


def test_only_unfinished_uploads_and_staging_are_deleted(
    filled: Path, tmp_path: Path, adapters: Adapters
) -> None:
    kept = tree(filled)
    with Registry.open(filled, BASE) as registry:
        upload = registry.begin_upload(
            announce("new", bundle_files(make_adapter(tmp_path / "n")))
        )
        upload.write("adapter_config.json", 0, b"{")
    (filled / "store" / "staging" / "left").mkdir()
    with Registry.open(filled, BASE) as registry:
        registry.sweep_uploads(0)
        registry.sweep()
    assert tree(filled) == kept
