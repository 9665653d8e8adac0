"""The catalog's transactions and the store's commits, each by itself."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pytest
from veneer_registry.bundle import Bundle
from veneer_registry.bundle_files import README_FILE
from veneer_registry.catalog import Catalog
from veneer_registry.errors import CatalogDamaged, DiskFull, FailedPrecondition, InternalError
from veneer_registry.format import weights_digest
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.rows import RevisionRow
from veneer_registry.store import Store
from veneer_registry.weights import WEIGHTS_FILE

from tests.refused import refused
from tests.unit.registry.kit import limit_pages, make_adapter


def row(name: str, number: int, **labels: str) -> RevisionRow:
    return RevisionRow(
        name, f"r{number}", f"w{number}", "base", f'{{"n":{number}}}', 1.5, labels, 7
    )


def publish(catalog: Catalog, new: RevisionRow) -> int:
    with catalog.change() as change:
        change.publish(new)
    return change.number


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "c.sqlite")


def test_publish_and_read(catalog: Catalog) -> None:
    first = publish(catalog, row("chat", 1, team="a"))
    second = publish(catalog, row("chat", 2))
    assert second > first
    newest, oldest = catalog.revisions("chat")
    assert (newest.revision, newest.current, oldest.revision, oldest.current) == (
        "r2",
        True,
        "r1",
        False,
    )
    assert newest.generation == oldest.generation == second
    assert oldest.labels == {"team": "a"}
    assert catalog.revision("chat", "r1") == oldest
    assert catalog.revision("chat", "r9") is None
    (name,) = catalog.names()
    assert (name.name, name.current, name.generation) == ("chat", "r2", second)
    assert name.revisions == (("r2", "w2", "base"), ("r1", "w1", "base"))


def test_pages_are_those_of_a_plain_search(catalog: Catalog) -> None:
    """Any prefix, place and labels, among names whose superseded revisions have others."""
    seed = 1
    print(f"seed {seed}")
    draw = random.Random(seed)
    values = {
        "stage": ["dev", "prod"],
        "team": ["a", "b", "c", "d"],
        "rare": ["no"] * 20 + ["x"],
    }
    now: dict[str, Mapping[str, str]] = {}
    for number in range(300):
        name = f"{draw.choice('ab')}-{draw.randrange(100):02}"
        labels = {key: draw.choice(some) for key, some in values.items() if draw.random() < 0.8}
        publish(catalog, row(name, number, **labels))
        now[name] = labels
    found = 0
    for _ in range(300):
        asked = {key: draw.choice(some) for key, some in values.items() if draw.random() < 0.4}
        prefix, after = draw.choice(["", "a", "b-1", "c"]), draw.choice(["", *now])
        limit = draw.choice([1, 5, 1000])
        wanted = [
            name
            for name in sorted(now)
            if name.startswith(prefix) and name > after and asked.items() <= now[name].items()
        ][:limit]
        rows = catalog.page(prefix, asked, after, limit)
        assert [(r.name, r.labels) for r in rows] == [(name, now[name]) for name in wanted]
        assert all(r.current for r in rows)
        found += len(rows)
    assert found > 500


def test_publishing_an_old_revision_again_makes_it_newest(catalog: Catalog) -> None:
    for number in (1, 2, 1):
        publish(catalog, row("chat", number))
    assert [r.revision for r in catalog.revisions("chat")] == ["r1", "r2"]
    assert catalog.revisions("chat")[0].current


def test_generation_never_repeats(catalog: Catalog) -> None:
    first = publish(catalog, row("chat", 1))
    with catalog.change() as change:
        change.delete_name("chat")
    assert catalog.revisions("chat") == ()
    assert publish(catalog, row("chat", 1)) > first


def test_losing_the_current_revision(catalog: Catalog) -> None:
    publish(catalog, row("chat", 1))
    publish(catalog, row("chat", 2))
    with catalog.change() as change:
        change.delete_revisions("chat", ["r2"])
    (name,) = catalog.names()
    assert name.current is None
    assert [r.current for r in catalog.revisions("chat")] == [False]
    assert catalog.page("", {}, "", 10) == ()


def test_dropping_superseded_keeps_the_current(catalog: Catalog) -> None:
    for number in (1, 2, 3):
        generation = publish(catalog, row("chat", number))
    with catalog.change() as change:
        change.forget("chat", ["r1"])
    (name,) = catalog.names()
    assert (name.current, name.generation) == ("r3", generation)
    assert [r for r, _, _ in name.revisions] == ["r3", "r2"]


def test_pages(catalog: Catalog) -> None:
    for number, name in enumerate(["a", "a.b", "ab", "b", "b_", "c"]):
        publish(catalog, row(name, number, odd=str(number % 2), all="x"))
    page = lambda *args: [r.name for r in catalog.page(*args)]  # noqa: E731
    assert page("", {}, "", 3) == ["a", "a.b", "ab"]
    assert page("", {}, "ab", 10) == ["b", "b_", "c"]
    assert page("a", {}, "", 10) == ["a", "a.b", "ab"]
    assert page("a", {}, "a", 1) == ["a.b"]
    assert page("", {"odd": "1", "all": "x"}, "", 10) == ["a.b", "b", "c"]
    assert page("", {"odd": "1", "all": "y"}, "", 10) == []
    assert page("%", {}, "", 10) == []


def test_labels_are_those_of_the_current_revision(catalog: Catalog) -> None:
    publish(catalog, row("chat", 1, team="a"))
    publish(catalog, row("chat", 2, team="b"))
    assert catalog.page("", {"team": "a"}, "", 10) == ()
    assert len(catalog.page("", {"team": "b"}, "", 10)) == 1


def test_a_failed_change_leaves_nothing(catalog: Catalog) -> None:
    publish(catalog, row("chat", 1))
    broken = RevisionRow("chat", "r2", "w2", "base", None, 1.0, {}, 1)  # type: ignore[arg-type]
    with pytest.raises(sqlite3.IntegrityError):
        publish(catalog, broken)
    assert [r.revision for r in catalog.revisions("chat")] == ["r1"]
    assert publish(catalog, row("chat", 2)) == 2


def test_survives_reopening(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c.sqlite")
    publish(catalog, row("chat", 1, team="é"))
    catalog.close()
    catalog = Catalog(tmp_path / "c.sqlite")
    assert catalog.revisions("chat")[0].labels == {"team": "é"}
    catalog.close()
    catalog.close()


def test_other_schema_and_damage(tmp_path: Path) -> None:
    Catalog(tmp_path / "c.sqlite").close()
    other = sqlite3.connect(tmp_path / "c.sqlite")
    other.execute("PRAGMA user_version=7")
    other.close()
    with refused(FailedPrecondition, schema=7):
        Catalog(tmp_path / "c.sqlite")
    (tmp_path / "d.sqlite").write_bytes(b"not a database" * 1000)
    with refused(CatalogDamaged, file="d.sqlite"):
        Catalog(tmp_path / "d.sqlite")


def test_full_database(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c.sqlite")
    limit_pages(catalog, 20)
    big = RevisionRow("chat", "r1", "w1", "base", "x" * 1_000_000, 1.0, {}, 1)
    with refused(DiskFull) as caught:
        publish(catalog, big)
    assert str(tmp_path) in str(caught.value)
    assert str(tmp_path) not in caught.value.message, "callers get this"
    assert catalog.revisions("chat") == ()
    publish(catalog, row("chat", 1))


# ------------------------------------------------------------------------- store


def stage(store: Store, adapter: Path, **files: bytes) -> tuple[Path, Bundle]:
    folder = store.new_staging()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).write_bytes((adapter / name).read_bytes())
    for name, data in files.items():
        (folder / name.replace("_md", ".md")).write_bytes(data)
    shas = {
        name.replace("_md", ".md"): hashlib.sha256(data).hexdigest()
        for name, data in files.items()
    }
    return folder, Bundle(weights_digest(folder), shas)


def test_revision_is_the_digest_of_the_document() -> None:
    one = Bundle("a" * 64, {"README.md": "b" * 64, "chat_template.jinja": "c" * 64})
    two = Bundle("a" * 64, dict(reversed(one.files.items())))
    assert one.revision == two.revision == hashlib.sha256(one.document).hexdigest()
    assert json.loads(one.document) == {"weights": "a" * 64, "files": dict(one.files)}
    assert one.revision != Bundle("a" * 64, {"README.md": "b" * 64}).revision


def test_commit_and_layout(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folder, bundle = stage(store, make_adapter(tmp_path / "a"), README_md=b"hello")
    store.commit(folder, bundle)
    store.drop_staging(folder)
    assert store.present() == ({bundle.weights}, {bundle.revision})
    weights = store.weights_folder(bundle.weights)
    assert {p.name for p in weights.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    revision = store.revision_folder(bundle.revision)
    assert (revision / "bundle.json").read_bytes() == bundle.document
    assert (revision / README_FILE).read_bytes() == b"hello"
    assert list((tmp_path / "store" / "staging").iterdir()) == []


def test_the_same_weights_are_stored_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    adapter = make_adapter(tmp_path / "a")
    folder, one = stage(store, adapter)
    store.commit(folder, one)
    inode = (store.weights_folder(one.weights) / WEIGHTS_FILE).stat().st_ino
    folder, two = stage(store, adapter, README_md=b"other")
    store.commit(folder, two)
    assert store.present() == ({one.weights}, {one.revision, two.revision})
    assert (store.weights_folder(one.weights) / WEIGHTS_FILE).stat().st_ino == inode


@pytest.mark.parametrize("what", ["weights", "revision", "truncated"])
def test_committing_again_repairs(tmp_path: Path, what: str) -> None:
    store = Store(tmp_path / "store")
    adapter = make_adapter(tmp_path / "a")
    folder, bundle = stage(store, adapter, README_md=b"hello")
    store.commit(folder, bundle)
    damaged = {
        "weights": store.weights_folder(bundle.weights) / WEIGHTS_FILE,
        "truncated": store.weights_folder(bundle.weights) / CONFIG_FILE,
        "revision": store.revision_folder(bundle.revision) / README_FILE,
    }[what]
    good = damaged.read_bytes()
    damaged.write_bytes(b"" if what == "truncated" else good[:-1] + bytes([good[-1] ^ 1]))
    folder, again = stage(store, adapter, README_md=b"hello")
    store.commit(folder, again)
    assert damaged.read_bytes() == good


def test_discard(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folder, bundle = stage(store, make_adapter(tmp_path / "a"))
    store.commit(folder, bundle)
    store.drop_staging(folder)
    trash = store.discard([bundle.weights, "0" * 64], [bundle.revision])
    assert store.present() == (set(), set())
    store.drop_staging(trash)
    store.drop_staging(trash)
    assert list((tmp_path / "store" / "staging").iterdir()) == []


def test_opening_empties_staging(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    (store.new_staging() / "x").write_bytes(b"x")
    (tmp_path / "store" / "staging" / "file").write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_bytes(b"x")
    (tmp_path / "store" / "staging" / "link").symlink_to(tmp_path / "outside")
    Store(tmp_path / "store")
    assert list((tmp_path / "store" / "staging").iterdir()) == []
    assert (tmp_path / "outside" / "precious").exists()


@pytest.mark.parametrize("digest", ["", "..", "../x", "a" * 63, "A" * 64, "a" * 64 + "/x"])
def test_paths_are_made_of_digests_only(tmp_path: Path, digest: str) -> None:
    store = Store(tmp_path / "store")
    for make in (store.weights_folder, store.revision_folder):
        with pytest.raises(InternalError):
            make(digest)
    with pytest.raises(InternalError):
        store.drop_staging(tmp_path)


def test_every_rename_comes_after_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order on which durability rests: files, their folder, rename, parent."""
    store = Store(tmp_path / "store")
    folder, bundle = stage(store, make_adapter(tmp_path / "a"))
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(fd: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real_sync(fd)

    def rename(self: Path, target: Path) -> Path:
        if target.parent.name in ("weights", "revisions"):
            events.append(f"rename {self.name} {target.parent.name}")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    store.commit(folder, bundle)
    ready = events[2].split()[1]
    assert events[:5] == [
        f"sync {CONFIG_FILE}",
        f"sync {WEIGHTS_FILE}",
        f"sync {ready}",
        f"rename {ready} weights",
        "sync weights",
    ]
    ready = events[6].split()[1]
    assert events[5:] == [
        "sync bundle.json",
        f"sync {ready}",
        f"rename {ready} revisions",
        "sync revisions",
    ]
