"""Deletes, replaces and pushes while a row of the catalog is damaged: the content that the row
referred to stays in the store, and deleted adapters stay deleted."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry import rebuild
from veneer_registry.errors import AdapterCorrupt, AdapterNotFound
from veneer_registry.format import read_adapter
from veneer_registry.registry import Registry

from tests.unit.registry.kit import BASE, push

Adapters = Callable[[int], Path]


def spoil(data: Path, sql: str, *values: object) -> None:
    """Change a row behind its digest's back."""
    with sqlite3.connect(data / "catalog.sqlite") as db:
        assert db.execute(sql, values).rowcount
    db.close()


DAMAGE = {
    "its revision's row": "UPDATE revisions SET bytes = bytes + 1 WHERE name = 'one'",
    "its revision's digest": "UPDATE revisions SET revision = '" + "0" * 64 + "' "
    "WHERE name = 'one'",
    "its name's row": "UPDATE names SET generation = generation + 4 WHERE name = 'one'",
    "its name": "UPDATE names SET name = 'onf' WHERE name = 'one'",
}


@pytest.mark.parametrize("sql", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("change", ["delete", "replace", "drop"])
def test_content_that_a_damaged_row_shares_is_kept(
    data: Path, adapters: Adapters, sql: str, change: str
) -> None:
    with Registry.open(data, BASE) as registry:
        kept = push(registry, "one", adapters(1)).record.ref
        push(registry, "two", adapters(1))
        if change == "drop":
            push(registry, "two", adapters(2), allow_replace=True)
    spoil(data, sql)
    with Registry.open(data, BASE) as registry:
        with pytest.raises(AdapterCorrupt):
            registry.acquire("one")
        match change:
            case "delete":
                registry.delete("two")
            case "replace":
                registry.update("two", retain=0)
                push(registry, "two", adapters(3), allow_replace=True)
            case "drop":
                registry.update("two", retain=0)
    rebuild.recover(data)
    with Registry.open(data, BASE) as registry:
        with registry.acquire("one") as lease:
            assert lease.record.ref == kept
        assert ("two" in registry) == (change != "delete")


@pytest.mark.parametrize("sql", DAMAGE.values(), ids=DAMAGE)
def test_a_deleted_adapter_with_a_damaged_row_stays_deleted(
    data: Path, adapters: Adapters, sql: str
) -> None:
    with Registry.open(data, BASE) as registry:
        push(registry, "one", adapters(1))
        push(registry, "two", adapters(2))
    spoil(data, sql)
    with Registry.open(data, BASE) as registry:
        registry.delete("one")
        with pytest.raises(AdapterNotFound):
            registry.acquire("one")
    if "onf" in sql:  # a row that nobody can tell is about it is still damaged
        rebuild.recover(data)
    with Registry.open(data, BASE) as registry:
        assert [record.ref.name for record in registry.list()] == ["two"]
    rebuild.recover(data)
    with Registry.open(data, BASE) as registry:
        assert [record.ref.name for record in registry.list()] == ["two"]
        push(registry, "one", adapters(1))
        registry.acquire("one").release()


def test_one_of_two_revisions_is_damaged_and_the_name_is_deleted(
    data: Path, adapters: Adapters
) -> None:
    with Registry.open(data, BASE) as registry:
        old = push(registry, "one", adapters(1)).record.ref
        new = push(registry, "one", adapters(2), allow_replace=True).record.ref
    spoil(data, "UPDATE revisions SET bytes = 0 WHERE revision = ?", old.revision)
    with Registry.open(data, BASE) as registry:
        assert set(registry.delete("one")) == {old.revision, new.revision}
        assert {(line.event, line.revision) for line in registry.history("one")} >= {
            ("deleted", old.revision),
            ("deleted", new.revision),
        }
    with Registry.open(data, BASE) as registry:
        assert len(registry) == 0


def test_a_push_mends_what_it_writes_and_no_more(data: Path, adapters: Adapters) -> None:
    """An older revision of the name is still damaged: what it shares is still kept."""
    with Registry.open(data, BASE) as registry:
        old = push(registry, "one", adapters(1)).record.ref
        push(registry, "one", adapters(2), allow_replace=True)
        push(registry, "two", adapters(1))
    spoil(
        data, "UPDATE revisions SET bytes = 0 WHERE name = 'one' AND revision = ?", old.revision
    )
    with Registry.open(data, BASE) as registry:
        push(registry, "one", adapters(3), allow_replace=True)
        registry.delete("two")
    rebuild.recover(data)
    with Registry.open(data, BASE) as registry:
        registry.acquire(f"one@{old.revision}").release()


def test_what_no_damaged_row_can_mean_does_not_fill_the_disk(
    data: Path, adapters: Adapters
) -> None:
    """It goes to quarantine, which has bounds."""
    with Registry.open(data, BASE) as registry:
        push(registry, "one", adapters(1))
        two = push(registry, "two", adapters(2)).record.ref
    spoil(data, DAMAGE["its revision's row"])
    with Registry.open(data, BASE) as registry:
        registry.delete("two")
    store = data / "store"
    assert not (store / "weights" / two.weights_digest).exists()
    assert (store / "quarantine" / "unnamed" / f"w-{two.weights_digest}").exists()


def test_labels_that_are_searched_are_those_of_the_rows(data: Path, adapters: Adapters) -> None:
    """The table that is searched by label has no digests: it is made again at start."""
    with Registry.open(data, BASE) as registry:
        push(registry, "one", adapters(1), labels={"team": "red", "tier": "gold"})
        push(registry, "two", adapters(2), labels={"team": "blue"})
    spoil(data, "UPDATE labels SET value = 'blue' WHERE name = 'one' AND key = 'team'")

    def found(registry: Registry, **labels: str) -> list[str]:
        return [record.ref.name for record in registry.list(labels=labels)]

    with Registry.open(data, BASE) as registry:
        assert found(registry, team="red") == ["one"]
        assert found(registry, team="blue") == ["two"]
        spoil(data, "UPDATE labels SET value = 'blue' WHERE name = 'one' AND key = 'team'")
        assert found(registry, team="blue") == ["two"], "a row is shown as what it is not"
        assert found(registry, team="blue", tier="gold") == []


COLUMNS = {
    "revisions": ("name", "revision", "weights", "base", "created", "labels", "bytes"),
    "names": ("name", "current", "generation", "retain"),
}


@pytest.mark.push
def test_any_changes_beside_any_damaged_row(tmp_path: Path, adapters: Adapters) -> None:
    """What nobody deleted or replaced is there after a recovery; what was deleted is not."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = random.Random(seed)
    content = {"one": 1, "twin": 1, "two": 2, "pair": 2, "three": 3}
    whole = tmp_path / "whole"
    with Registry.open(whole, BASE) as registry:
        for name, number in content.items():
            push(registry, name, adapters(number))
    for number in range(40):
        data = tmp_path / f"case-{number}"
        shutil.copytree(whole, data)
        table = draw.choice(list(COLUMNS))
        column, victim = draw.choice(COLUMNS[table]), draw.choice(list(content))
        spoil(data, f"UPDATE {table} SET {column} = 'x' || {column} WHERE name = ?", victim)
        case = f"case {number}: {table}.{column} of {victim}"
        means = dict(content)
        with Registry.open(data, BASE) as registry:
            for name in draw.sample(list(content), 2):
                change = draw.choice(["delete", "push", "drop"])
                case += f", {change} {name}"
                try:
                    if change == "delete":
                        registry.delete(name)
                        del means[name]
                    else:
                        replacement = draw.randrange(4, 6)
                        push(registry, name, adapters(replacement), allow_replace=True)
                        means[name] = replacement
                        if change == "drop":
                            registry.update(name, retain=0)
                except AdapterCorrupt:  # its name's own row is the damaged one
                    assert name == victim, case
        rebuild.recover(data)
        with Registry.open(data, BASE) as registry:
            found = {record.ref.name: record.ref for record in registry.list()}
            assert found.keys() == means.keys(), case
            for name, kind in means.items():
                expected = read_adapter(adapters(kind), BASE).weights_digest
                assert found[name].weights_digest == expected, (case, name)
                registry.acquire(name).release()
        shutil.rmtree(data)
