"""`veneer-server store recover`: a catalog from the store and the rest of the old catalog."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from veneer_registry import rebuild
from veneer_registry.adapter import BaseFingerprint
from veneer_registry.bundle_files import TEMPLATE_FILE
from veneer_registry.errors import (
    AdapterCorrupt,
    BaseModelMismatch,
    FailedPrecondition,
    InvalidField,
    StoreLocked,
    StoreMismatch,
)
from veneer_registry.records import AdapterRecord
from veneer_registry.registry import Registry
from veneer_registry.weights import WEIGHTS_FILE

from tests.unit.registry.kit import BASE, make_adapter, make_older, push

Adapters = Callable[[int], Path]


@pytest.fixture
def filled(data: Path, adapters: Adapters, tmp_path: Path) -> Path:
    """Names with several revisions, labels, an alias, a shared content, a deleted adapter."""
    clock = iter(range(1000, 2000))
    templated = make_adapter(tmp_path / "templated", seed=1)
    (templated / TEMPLATE_FILE).write_text("{{ messages }}")
    with Registry.open(data, BASE, clock=lambda: float(next(clock))) as registry:
        first = push(registry, "chat", templated, labels={"team": "a"}).record.ref
        push(registry, "chat", adapters(2), allow_replace=True)
        push(registry, "code", adapters(3))
        push(registry, "twin", adapters(3))
        push(registry, "ended", adapters(3))
        push(registry, "gone", adapters(4))
        registry.set_alias("chat/prod", [(first.revision, 1)])
        registry.update("code", labels={"stage": "dev"})
        registry.delete("gone")
        registry.delete("ended")
    return data


def facts(record: AdapterRecord) -> AdapterRecord:
    """A record without what only the catalog knows."""
    return replace(record, etag="", aliases=(), retain=0)


def view(data: Path) -> dict[str, list[AdapterRecord]]:
    with Registry.open(data, BASE) as registry:
        for record in registry.list():
            registry.acquire(record.ref.name).release()
        names = [record.ref.name for record in registry.list()]
        return {name: list(map(facts, registry.revisions(name))) for name in names}


def drop_catalog(data: Path) -> None:
    for path in data.glob("catalog.sqlite*"):
        path.unlink()


def test_from_the_store_alone(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = view(filled)
    drop_catalog(filled)
    found = rebuild.recover(filled)
    assert found.changed
    assert (found.names, found.revisions) == (3, 4)
    assert set(found.current) == {"chat", "code", "twin"}
    assert found.current["chat"] == before["chat"][0].ref.revision, "the newest one"
    assert found.nameless == found.missing == []
    assert view(filled) == before
    with Registry.open(filled, BASE) as registry:
        assert registry.aliases() == ()
        assert registry.history("chat")[0].event == "recovered"


@pytest.mark.parametrize("how", ["junk", "emptied", "halved"])
def test_a_damaged_catalog_is_moved_aside(filled: Path, how: str) -> None:
    before = view(filled)
    catalog = filled / "catalog.sqlite"
    whole = catalog.read_bytes()
    content = {"junk": os.urandom(5000), "emptied": b"", "halved": whole[: len(whole) // 2]}[
        how
    ]
    catalog.write_bytes(content)
    found = rebuild.recover(filled)
    assert Path(found.aside).read_bytes() == content
    assert {name: {r.ref for r in records} for name, records in view(filled).items()} == {
        name: {r.ref for r in records} for name, records in before.items()
    }
    assert not rebuild.recover(filled).changed


def test_one_damaged_row_costs_nothing_else(filled: Path) -> None:
    before = view(filled)
    with Registry.open(filled, BASE) as registry:
        registry.update("chat", retain=7)
        aliases, history = registry.aliases(), registry.history("chat")
        etag = registry.get("twin").etag
    with sqlite3.connect(filled / "catalog.sqlite") as db:
        db.execute("UPDATE revisions SET weights = ? WHERE name = 'code'", ("0" * 64,))
    db.close()
    found = rebuild.recover(filled)
    assert (found.lost_rows, list(found.current)) == (1, ["code"])
    assert [spec.split("@")[0] for spec in found.from_store] == ["code"]
    assert view(filled) == before
    with Registry.open(filled, BASE) as registry:
        assert registry.aliases() == aliases
        assert registry.get("chat").retain == 7
        assert registry.get("twin").etag == etag
        strip = [replace(line, sequence=0) for line in registry.history("chat")]
        assert strip == [replace(line, sequence=0) for line in history]


def test_a_catalog_that_lacks_changes_gets_them_from_the_store(
    filled: Path, adapters: Adapters
) -> None:
    kept = (filled / "catalog.sqlite").read_bytes()
    with Registry.open(filled, BASE) as registry:
        push(registry, "chat", adapters(8), allow_replace=True)
        push(registry, "later", adapters(9))
    after = view(filled)
    (filled / "catalog.sqlite").write_bytes(kept)
    rebuild.recover(filled)
    found = view(filled)
    assert found.keys() == after.keys()
    assert found["chat"][0].ref == after["chat"][0].ref, "what was pushed last"
    with Registry.open(filled, BASE) as registry:
        assert registry.resolve("chat/prod")


def test_a_name_that_was_rolled_back_stays_so(filled: Path) -> None:
    with Registry.open(filled, BASE) as registry:
        old = registry.revisions("chat")[1].ref
        registry.update(old.short, current=True)
    with sqlite3.connect(filled / "catalog.sqlite") as db:
        db.execute("UPDATE revisions SET bytes = 1 WHERE name = 'twin'")
    db.close()
    rebuild.recover(filled)
    with Registry.open(filled, BASE) as registry:
        assert registry.resolve("chat") == old


def test_a_whole_folder_is_left_as_it_is(filled: Path) -> None:
    before = (filled / "catalog.sqlite").read_bytes()
    found = rebuild.recover(filled)
    assert not found.changed
    assert (found.names, found.aside) == (3, "")
    assert (filled / "catalog.sqlite").read_bytes() == before
    assert list(filled.glob("catalog.sqlite.*")) == []


@pytest.mark.parametrize("version", [1, 3])
def test_an_older_catalog_keeps_its_names(
    filled: Path, adapters: Adapters, version: int
) -> None:
    before = view(filled)
    make_older(filled / "catalog.sqlite", version)
    assert not rebuild.recover(filled).changed
    with sqlite3.connect(filled / "catalog.sqlite") as db:  # not what a name is, but malformed
        db.execute("UPDATE names SET current = NULL WHERE name = 'code'")
        db.execute("UPDATE revisions SET labels = '{' WHERE name = 'twin'")
    db.close()
    found = rebuild.recover(filled)
    assert (found.changed, found.lost_rows) == (True, 1)
    after = view(filled)
    assert after.keys() >= {"chat", "code"}
    assert [r.ref for r in after["chat"]] == [r.ref for r in before["chat"]]


def test_damaged_content_is_registered_and_refused(filled: Path, adapters: Adapters) -> None:
    with Registry.open(filled, BASE) as registry:
        code = registry.resolve("code")
        path = registry.weights_folder(code) / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    drop_catalog(filled)
    found = rebuild.recover(filled)
    assert list(found.damaged) == [code.weights_digest]
    with Registry.open(filled, BASE) as registry:
        for name in ("code", "twin"):
            with pytest.raises(AdapterCorrupt):
                registry.acquire(name)
        registry.acquire("chat").release()
        push(registry, "code", adapters(3))
        registry.acquire("twin").release()


def test_missing_weights_are_registered_and_refused(filled: Path) -> None:
    with Registry.open(filled, BASE) as registry:
        folder = registry.weights_folder(registry.resolve("code"))
    folder.rename(filled / "kept")
    drop_catalog(filled)
    assert len(rebuild.recover(filled).missing) == 2
    with Registry.open(filled, BASE) as registry, pytest.raises(AdapterCorrupt):
        registry.acquire("code")
    (filled / "kept").rename(folder)
    with Registry.open(filled, BASE) as registry:
        registry.acquire("code").release()


@pytest.mark.parametrize("how", ["an older veneer's", "damaged"])
def test_what_has_no_name_gets_one(filled: Path, how: str) -> None:
    """The name is not in the bundle; where no registration can be read it is made up."""
    with Registry.open(filled, BASE) as registry:
        code, chat = registry.get("code"), registry.get("chat/prod")
    if how == "damaged":
        for path in (filled / "store").glob("revisions/*/registered-*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    else:
        make_older(filled / "catalog.sqlite", 3)
    drop_catalog(filled)
    found = rebuild.recover(filled)
    assert len(found.nameless) == found.names == 3
    with Registry.open(filled, BASE) as registry:
        for record in (code, chat):
            again = registry.acquire(f"recovered-{record.ref.revision[:12]}").record
            assert again.manifest.chat_template == record.manifest.chat_template
            assert again.ref.weights_digest == record.ref.weights_digest
    other = replace(BASE, num_layers=1, fingerprint=BaseFingerprint("9" * 64, "8" * 64))
    drop_catalog(filled)
    rebuild.recover(filled)
    with Registry.open(filled, other) as registry, pytest.raises(BaseModelMismatch):
        registry.acquire(f"recovered-{code.ref.revision[:12]}")


def test_what_cannot_be_recovered_is_refused(filled: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidField):
        rebuild.recover(tmp_path / "nowhere")
    with Registry.open(filled, BASE), pytest.raises(StoreLocked):
        rebuild.recover(filled)
    before = (filled / "catalog.sqlite").read_bytes()
    (filled / "store").rename(filled / "elsewhere")
    with pytest.raises(StoreMismatch):
        rebuild.recover(filled)
    assert (filled / "catalog.sqlite").read_bytes() == before


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def dying_at(point: int) -> Iterator[list[int]]:
    """Ends at the ``point``-th rename, unlink or fsync."""
    count = [0]
    real = {name: getattr(os, name) for name in ("rename", "unlink", "fsync", "replace")}

    def around(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == point:
                raise Killed
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(os, name, around(name))
    try:
        yield count
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def test_interrupted_anywhere_it_can_be_run_again(filled: Path, tmp_path: Path) -> None:
    before = view(filled)
    catalog = filled / "catalog.sqlite"
    catalog.write_bytes(b"junk" * 500)
    (filled / "catalog.sqlite-wal").write_bytes(b"an old log")
    with dying_at(0) as count:
        shutil.copytree(filled, tmp_path / "whole")
        rebuild.recover(tmp_path / "whole")
    assert count[0] > 8
    for point in range(1, count[0] + 1):
        data = tmp_path / f"{point}"
        shutil.copytree(filled, data)
        with pytest.raises(Killed), dying_at(point):
            rebuild.recover(data)
        # A server that is started between the two runs refuses, or has all of it.
        with suppress(FailedPrecondition):
            assert view(data) == before, point
        rebuild.recover(data)
        assert view(data) == before, point
        assert len(list(data.glob("catalog.sqlite.before-recovery-*"))) <= 3
        aside = [p.read_bytes() for p in data.glob("catalog.sqlite.before-recovery-*")]
        assert b"junk" * 500 in aside
        shutil.rmtree(data)
