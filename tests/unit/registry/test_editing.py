"""Aliases, rollback, labels, retention, quarantine, and the history of all that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from veneer_registry import rebuild
from veneer_registry.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    EtagMismatch,
    FailedPrecondition,
    InvalidField,
)
from veneer_registry.publishing import Staged
from veneer_registry.registry import Registry
from veneer_registry.rows import Who
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.weights import WEIGHTS_FILE

from tests.refused import refused
from tests.unit.registry.kit import BASE, announce, bundle_files, push, send

everywhere = pytest.mark.usefixtures("anywhere")
Adapters = Callable[[int], Path]
ANNA = Who("anna@laptop", "ipv4:10.0.0.7")


@pytest.fixture
def revisions(registry: Registry, adapters: Adapters) -> list[str]:
    """Three revisions of chat, oldest first; the last is current."""
    return [
        push(registry, "chat", adapters(n), allow_replace=True).record.ref.revision
        for n in (1, 2, 3)
    ]


def events(registry: Registry, name: str = "chat") -> list[str]:
    return [line.event for line in registry.history(name)]


# ----------------------------------------------------------------------- aliases


@pytest.mark.push
@everywhere
def test_an_alias_moves_and_rolls_back(registry: Registry, revisions: list[str]) -> None:
    old, new = revisions[0], revisions[1]
    made = registry.set_alias("chat/prod", [(old[:12], 1)], who=ANNA)
    assert made.before == ()
    assert registry.resolve("chat/prod").revision == old
    assert registry.resolve("chat").revision == revisions[2], "the plain name is as it was"
    registry.set_alias("chat/prod", [(new, 1)])
    assert registry.resolve("chat/prod").revision == new
    back = registry.rollback_alias("chat/prod", who=ANNA)
    assert registry.resolve("chat/prod").revision == old
    assert back.before == ((new, 1),)
    assert registry.rollback_alias("chat/prod").alias.targets == ((new, 1),), "and forth"
    assert [a.alias for a in registry.aliases("chat")] == ["prod"]
    line = registry.history("chat")[1]
    assert (line.event, line.who, line.revision) == ("alias_set", ANNA, old)
    assert new in line.detail


def test_weights_are_asked_for_by_current_names_and_aliases_alone(
    registry: Registry, revisions: list[str], adapters: Adapters
) -> None:
    """A replaced name still has its old revision, and callers no longer get it."""
    old, _, current = (record.ref.weights_digest for record in registry.revisions("chat")[::-1])
    assert registry.asked_as(current) == ("chat",)
    assert registry.asked_as(old) == ()
    assert registry.names(old) == ("chat",)
    registry.set_alias("chat/prod", [(revisions[0], 9), (revisions[2], 1)])
    push(registry, "bot", adapters(1))
    assert registry.asked_as(old) == ("bot", "chat/prod")
    assert registry.asked_as(current) == ("chat", "chat/prod")
    registry.delete("chat")
    assert registry.asked_as(old) == ("bot",)


def test_moving_to_where_it_is_does_not_lose_the_way_back(
    registry: Registry, revisions: list[str]
) -> None:
    registry.set_alias("chat/prod", [(revisions[0], 1)])
    registry.set_alias("chat/prod", [(revisions[1], 1)])
    registry.set_alias("chat/prod", [(revisions[1], 1)])
    registry.rollback_alias("chat/prod")
    assert registry.resolve("chat/prod").revision == revisions[0]


def test_a_lease_by_alias_is_on_the_revision(registry: Registry, revisions: list[str]) -> None:
    registry.set_alias("chat/prod", [(revisions[0], 1)])
    with registry.acquire("chat/prod") as lease:
        registry.set_alias("chat/prod", [(revisions[1], 1)])
        assert lease.ref.revision == revisions[0]
        assert lease.record.aliases == ("prod",)


@everywhere
def test_aliases_outlive_a_restart(
    data: Path, registry: Registry, revisions: list[str]
) -> None:
    registry.set_alias("chat/prod", [(revisions[0], 1)])
    registry.set_alias("chat/prod", [(revisions[0], 90), (revisions[1], 10)])
    before = registry.aliases()
    registry.close()
    with Registry.open(data, BASE) as again:
        assert again.aliases() == again.aliases("chat") == before
        again.rollback_alias("chat/prod")
        assert again.resolve("chat/prod").revision == revisions[0]


def test_a_canary_gets_its_share_and_keys_stay_where_they_are(
    registry: Registry, revisions: list[str]
) -> None:
    registry.set_alias("chat/prod", [(revisions[0], 90), (revisions[1], 10)])
    keys = [f"user-{number}" for number in range(2000)]
    first = [registry.resolve("chat/prod", key).revision for key in keys]
    assert first == [registry.resolve("chat/prod", key).revision for key in keys]
    # 10 % of 2,000 is 200, its deviation 13: six of them either way.
    assert 120 < Counter(first)[revisions[1]] < 280
    # A larger canary: nobody goes back from it to the old one.
    registry.set_alias("chat/prod", [(revisions[1], 20), (revisions[0], 80)])
    registry.set_alias("chat/prod", [(revisions[0], 80), (revisions[1], 20)])
    second = [registry.resolve("chat/prod", key).revision for key in keys]
    assert not [
        k
        for k, a, b in zip(keys, first, second, strict=True)
        if (a, b) == (revisions[1], revisions[0])
    ]
    with refused(InvalidField, field="name", alias="chat/prod"):
        registry.get("chat/prod")
    keyless = Counter(registry.resolve("chat/prod").revision for _ in range(500))
    assert set(keyless) == {revisions[0], revisions[1]}


def test_bad_aliases(registry: Registry, revisions: list[str]) -> None:
    good = revisions[0]
    for spec in ("chat", "chat/", "chat/Prod", "chat/../x", "chat/a/b", "/prod", "chat@x/prod"):
        with pytest.raises(InvalidField):
            registry.set_alias(spec, [(good, 1)])
    for targets in ([], [(good, 0)], [(good, 10_001)], [(good, 1), (good, 2)], [("xyz", 1)]):
        with pytest.raises(InvalidField):
            registry.set_alias("chat/prod", targets)
    with refused(AdapterNotFound, revision="0" * 12):
        registry.set_alias("chat/prod", [("0" * 12, 1)])
    with pytest.raises(AdapterNotFound):
        registry.set_alias("nobody/prod", [(good, 1)])
    registry.set_alias("chat/prod", [(good, 1)])
    with refused(FailedPrecondition, alias="chat/prod", cause="no_previous"):
        registry.rollback_alias("chat/prod")
    with refused(AdapterNotFound, did_you_mean="chat/prod"):
        registry.resolve("chat/prud")


@everywhere
def test_an_etag_guards_an_alias(registry: Registry, revisions: list[str]) -> None:
    made = registry.set_alias("chat/prod", [(revisions[0], 1)]).alias
    moved = registry.set_alias(
        "chat/prod", [(revisions[1], 1)], etag=str(made.generation)
    ).alias
    for change in (
        lambda e: registry.set_alias("chat/prod", [(revisions[0], 1)], etag=e),
        lambda e: registry.rollback_alias("chat/prod", etag=e),
        lambda e: registry.remove_alias("chat/prod", etag=e),
    ):
        with refused(EtagMismatch, alias="chat/prod", etag=moved.generation):
            change(str(made.generation))
    registry.remove_alias("chat/prod", etag=str(moved.generation))
    with pytest.raises(AdapterNotFound):
        registry.resolve("chat/prod")
    assert events(registry)[0] == "alias_removed"


@pytest.mark.push
@everywhere
def test_what_an_alias_means_is_kept(
    registry: Registry, revisions: list[str], adapters: Adapters
) -> None:
    registry.set_alias("chat/prod", [(revisions[0], 1)])
    registry.set_alias("chat/prod", [(revisions[1], 1)])
    for number in range(4, 9):
        push(registry, "chat", adapters(number), allow_replace=True)
    kept = [record.ref.revision for record in registry.revisions("chat")]
    assert len(kept) == 5, "the current one, two superseded, what prod means and meant"
    with refused(FailedPrecondition, adapter="chat", alias="chat/prod"):
        registry.delete(f"chat@{revisions[1]}")
    registry.delete(f"chat@{revisions[0]}")  # nothing means it now
    with refused(FailedPrecondition, alias="chat/prod", cause="no_previous"):
        registry.rollback_alias("chat/prod")
    registry.delete("chat")
    assert registry.aliases() == ()


# --------------------------------------------------- rollback, labels, retention


@everywhere
def test_rollback_of_a_name(
    registry: Registry, revisions: list[str], adapters: Adapters, data: Path
) -> None:
    etag = registry.get("chat").etag
    record, dropped = registry.update(f"chat@{revisions[0]}", current=True, who=ANNA)
    assert record.current
    assert dropped == ()
    assert record.etag != etag
    assert registry.resolve("chat").revision == revisions[0]
    assert [r.current for r in registry.revisions("chat")] == [False, False, True]
    line = registry.history("chat")[0]
    assert (line.event, line.who) == ("made_current", ANNA)
    assert revisions[2] in line.detail
    registry.close()
    with Registry.open(data, BASE) as again:
        assert again.resolve("chat").revision == revisions[0]
        replaced = push(again, "chat", adapters(4), allow_replace=True)
        assert replaced.replaced
        assert len(again.revisions("chat")) == 3


@everywhere
def test_labels_are_set_and_removed(registry: Registry, adapters: Adapters) -> None:
    push(registry, "chat", adapters(1), labels={"team": "a", "tier": "x"})
    etag = registry.get("chat").etag
    record, _ = registry.update("chat", labels={"team": "b"}, remove_labels=["tier"])
    assert record.labels == {"team": "b"}
    assert record.etag != etag
    assert [r.ref.name for r in registry.list(labels={"team": "b"})] == ["chat"]
    assert registry.list(labels={"team": "a"}) == registry.list(labels={"tier": "x"}) == ()
    assert registry.history("chat")[0].detail == "team=b"
    same, _ = registry.update("chat", labels={"team": "b"})
    assert same.etag == record.etag, "nothing changed"
    with pytest.raises(InvalidField):
        registry.update("chat", labels={"bad key": "x"})
    with pytest.raises(EtagMismatch):
        registry.update("chat", labels={"team": "c"}, etag=etag)


@pytest.mark.push
@everywhere
def test_a_name_keeps_as_many_as_it_is_told(
    data: Path, registry: Registry, revisions: list[str], adapters: Adapters
) -> None:
    record, dropped = registry.update("chat", retain=0)
    assert {ref.revision for ref in dropped} == set(revisions[:2])
    assert record.retain == 0
    assert len(registry.revisions("chat")) == 1
    registry.update("chat", retain=5)
    for number in range(4, 8):
        push(registry, "chat", adapters(number), allow_replace=True)
    registry.close()
    with Registry.open(data, BASE) as again:
        assert len(again.revisions("chat")) == 5
        for number in range(8, 12):
            push(again, "chat", adapters(number), allow_replace=True)
        assert len(again.revisions("chat")) == 6
        assert again.get("chat").retain == 5
        with refused(InvalidField, field="retain"):
            again.update("chat", retain=1001)


@everywhere
def test_an_etag_guards_a_replace(registry: Registry, adapters: Adapters) -> None:
    seen = push(registry, "chat", adapters(1)).record.etag
    push(registry, "chat", adapters(2), allow_replace=True)
    with pytest.raises(EtagMismatch):
        push(registry, "chat", adapters(3), allow_replace=True, etag=seen)
    with refused(EtagMismatch, adapter="new", etag=""):
        push(registry, "new", adapters(3), etag=seen)
    etag = registry.get("chat").etag
    assert push(registry, "chat", adapters(3), allow_replace=True, etag=etag).published


# ------------------------------------------------------------------------ staged


def staged(registry: Registry, folder: Path, name: str = "chat", **options: Any) -> Staged:
    files = bundle_files(folder)
    return registry.stage(send(registry.begin_upload(announce(name, files, **options)), files))


@everywhere
def test_the_name_moves_with_the_commit_and_not_before(
    registry: Registry, adapters: Adapters
) -> None:
    old = push(registry, "chat", adapters(1)).record.ref
    upload = staged(registry, adapters(2), allow_replace=True)
    new = upload.record.ref
    assert (upload.current, registry.resolve("chat")) == (old, old)
    registry.sweep()
    verify_weights(registry.weights_folder(new), new.weights_digest)
    assert registry.commit(upload).record.ref == new
    assert registry.resolve("chat") == new
    upload.discard()
    registry.sweep()
    verify_weights(registry.weights_folder(new), new.weights_digest)


def test_of_what_is_discarded_nothing_is_left(
    registry: Registry, adapters: Adapters, data: Path
) -> None:
    old = push(registry, "chat", adapters(1)).record.ref
    for _ in range(2):
        upload = staged(registry, adapters(2), allow_replace=True)
        upload.discard()
        upload.discard()
        assert registry.resolve("chat") == old
        assert [path.name for path in (data / "store" / "weights").iterdir()] == [
            old.weights_digest
        ]
        assert registry.leases(upload.record.ref.weights_digest) == 0
    with pytest.raises(AssertionError):
        registry.commit(upload)
    assert push(registry, "chat", adapters(2), allow_replace=True).published


@everywhere
def test_content_that_is_staged_twice_stays_while_one_of_them_needs_it(
    registry: Registry, adapters: Adapters
) -> None:
    first, second = (staged(registry, adapters(1), name) for name in ("a", "b"))
    first.discard()
    ref = registry.commit(second).record.ref
    verify_weights(registry.weights_folder(ref), ref.weights_digest)


def test_a_recovery_finds_what_was_staged_twice_and_committed_once(
    registry: Registry, adapters: Adapters, data: Path
) -> None:
    first, second = (staged(registry, adapters(1)) for _ in range(2))
    first.discard()
    ref = registry.commit(second).record.ref
    registry.close()
    for path in data.glob("catalog.sqlite*"):
        path.unlink()
    rebuild.recover(data)
    with Registry.open(data, BASE) as again:
        assert again.resolve("chat") == ref


@everywhere
def test_who_was_faster_while_another_was_staged(
    registry: Registry, adapters: Adapters
) -> None:
    upload = staged(registry, adapters(1))
    push(registry, "chat", adapters(2))
    with pytest.raises(AdapterExists):
        registry.commit(upload)
    assert registry.leases(upload.record.ref.weights_digest) == 0
    assert not registry.weights_folder(upload.record.ref).exists()


# --------------------------------------------------------------------- quarantine


def test_damaged_weights_are_served_no_more_until_pushed_again(
    data: Path, registry: Registry, adapters: Adapters
) -> None:
    ref = push(registry, "chat", adapters(1)).record.ref
    push(registry, "twin", adapters(1))
    push(registry, "other", adapters(2))
    stored = registry.weights_folder(ref) / WEIGHTS_FILE
    rotten = bytearray(stored.read_bytes())
    rotten[-1] ^= 1
    stored.write_bytes(bytes(rotten))
    assert len(registry.quarantine(ref.weights_digest, "a bit flipped")) == 2
    assert registry.quarantine(ref.weights_digest, "again") == ()
    for name in ("chat", "twin", ref.short):
        for use in (registry.resolve, registry.acquire):
            with refused(AdapterCorrupt, why="a bit flipped"):
                use(name)
    registry.resolve("other")
    assert registry.get("chat").quarantined == "a bit flipped"
    assert (
        data / "store" / "quarantine" / ref.weights_digest / WEIGHTS_FILE
    ).read_bytes() == bytes(rotten)
    registry.close()
    with Registry.open(data, BASE) as again:
        with pytest.raises(AdapterCorrupt):
            again.resolve("chat")
        assert again.committed(announce("chat", bundle_files(adapters(1))))[WEIGHTS_FILE] == 0
        pushed = push(again, "twin", adapters(1))
        assert not pushed.published, "it holds that content, which is whole again"
        assert "this push repaired them" in " ".join(pushed.warnings)
        assert "repaired" not in " ".join(push(again, "twin", adapters(1)).warnings)
        assert again.resolve("chat") == ref
        verify_weights(again.weights_folder(ref), ref.weights_digest)
        assert events(again)[:2] == ["repaired", "quarantined"]


@everywhere
def test_a_deleted_adapter_takes_its_quarantine_along(
    registry: Registry, adapters: Adapters
) -> None:
    ref = push(registry, "chat", adapters(1)).record.ref
    registry.quarantine(ref.weights_digest, "rot")
    registry.delete("chat")
    push(registry, "chat", adapters(1))
    assert registry.resolve("chat").weights_digest == ref.weights_digest


# ------------------------------------------------------------------------ history


@everywhere
def test_history_tells_who_did_what(registry: Registry, adapters: Adapters) -> None:
    files = bundle_files(adapters(1))
    first = registry.publish(
        send(registry.begin_upload(announce("chat", files)), files), who=ANNA
    )
    push(registry, "chat", adapters(2), allow_replace=True)
    registry.note("pinned", first.record.ref, ANNA, "device")
    registry.update("chat", retain=0)
    registry.delete("chat", who=ANNA)
    lines = registry.history("chat")
    assert [line.event for line in lines] == [
        "deleted",
        "superseded",
        "retention",
        "pinned",
        "replaced",
        "published",
    ]
    assert [line.who for line in lines] == [ANNA, Who(), Who(), ANNA, Who(), ANNA]
    assert registry.history("nobody") == ()
    newest = registry.history(limit=2)
    older = registry.history(before=newest[-1].sequence)
    assert (*newest, *older) == lines
    with pytest.raises(InvalidField):
        registry.history(limit=0)


def test_history_of_a_name_is_bounded(registry: Registry, adapters: Adapters) -> None:
    ref = push(registry, "chat", adapters(1)).record.ref
    push(registry, "code", adapters(2))
    for number in range(1005):
        registry.note("pinned", ref, ANNA, str(number))
    lines = registry.history("chat", limit=1000)
    assert len(lines) == 1000
    assert lines[0].detail == "1004"
    assert registry.history("chat", before=lines[-1].sequence) == ()
    assert events(registry, "code") == ["published"]


def test_a_repair_whose_publish_failed_is_made_good_by_the_next(
    registry: Registry, adapters: Adapters
) -> None:
    ref = push(registry, "chat", adapters(1)).record.ref
    (registry.weights_folder(ref) / WEIGHTS_FILE).write_bytes(b"rotten")
    registry.quarantine(ref.weights_digest, "rot")
    staged(registry, adapters(1)).discard()
    push(registry, "chat", adapters(1))
    assert registry.resolve("chat") == ref
    verify_weights(registry.weights_folder(ref), ref.weights_digest)


def test_damage_that_comes_again_leaves_nothing_behind(
    data: Path, registry: Registry, adapters: Adapters
) -> None:
    for _ in range(2):
        ref = push(registry, "chat", adapters(1)).record.ref
        (registry.weights_folder(ref) / WEIGHTS_FILE).write_bytes(b"rotten")
        registry.quarantine(ref.weights_digest, "rot")
    assert list((data / "store" / "staging").iterdir()) == []
    assert len(list((data / "store" / "quarantine").iterdir())) == 1
