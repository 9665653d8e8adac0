"""Names, prefixes, suggestions and reference counts, without a disk."""

from __future__ import annotations

import hashlib

import pytest
from veneer_registry.adapter import AdapterRef
from veneer_registry.entry import Entry
from veneer_registry.errors import AdapterNotFound, BaseModelMismatch, InvalidField
from veneer_registry.index import LOST, Index

from tests.refused import refused


def ref(name: str, number: int, weights: int | None = None) -> AdapterRef:
    digest = hashlib.sha256(b"w%d" % (number if weights is None else weights)).hexdigest()
    return AdapterRef(name, hashlib.sha256(b"r%d" % number).hexdigest(), digest)


def entry(*refs: AdapterRef, foreign: frozenset[str] = frozenset()) -> Entry:
    return Entry(refs[0], refs, 1, foreign)


def taken(index: Index) -> tuple[set[str], set[str]]:
    garbage = index.take_garbage()
    return garbage.weights, garbage.revisions


@pytest.fixture
def index() -> Index:
    return Index("tiny")


def test_resolve(index: Index) -> None:
    new, old = ref("chat", 2), ref("chat", 1)
    index.put("chat", entry(new, old))
    assert index.resolve("chat") == new
    assert index.resolve(f"chat@{old.revision}") == old
    assert index.resolve(f"chat@{old.revision[:12]}") == old


def test_holding_follows_every_change(index: Index) -> None:
    """All names and revisions that share weights, however entries come and go."""
    first, second = ref("chat", 1, weights=7), ref("chat", 2, weights=7)
    twin, other = ref("twin", 3, weights=7), ref("chat", 4)
    weights = first.weights_digest
    assert index.holding(weights) == ()
    index.put("chat", entry(first))
    index.put("twin", entry(twin))
    assert index.holding(weights) == (first, twin)
    index.put("chat", entry(second, first))
    assert set(index.holding(weights)) == {first, second, twin}
    index.put("chat", entry(other, second))
    assert index.holding(weights) == (second, twin)
    assert index.holding(other.weights_digest) == (other,)
    index.remove("chat")
    assert index.holding(weights) == (twin,)
    index.remove("twin")
    assert index.holding(weights) == ()


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "@",
        "Chat",
        "../x",
        "chat@",
        "chat@abc",
        "chat@" + "g" * 12,
        "chat@" + "A" * 12,
        "chat@" + "a" * 65,
        "chat@" + "a" * 12 + "@",
        "x" * 64,
        "é",
        "x" * 100_000,
    ],
)
def test_malformed(index: Index, spec: str) -> None:
    index.put("chat", entry(ref("chat", 1)))
    with pytest.raises(InvalidField) as caught:
        index.resolve(spec)
    assert len(caught.value.message) < 400


def test_unknown_revision_names_those_kept(index: Index) -> None:
    index.put("chat", entry(ref("chat", 1)))
    with refused(AdapterNotFound, kept=ref("chat", 1).revision[:12]):
        index.resolve("chat@" + "0" * 12)


def test_a_few_digits_do_where_no_other_revision_has_them(index: Index) -> None:
    one = AdapterRef("chat", "0e99" + "a" * 60, "1" * 64)
    two = AdapterRef("chat", "0e99" + "b" * 60, "1" * 64)
    index.put("chat", entry(one))
    assert index.resolve("chat@0e99") == one
    index.put("chat", entry(one, two))
    with refused(InvalidField, field="adapter", cause="ambiguous") as caught:
        index.resolve("chat@0e99")
    assert "0e99aaaaaaaa, 0e99bbbbbbbb" in str(caught.value)
    assert index.resolve("chat@0e99b") == two


def test_ambiguous_prefix(index: Index) -> None:
    one = AdapterRef("chat", "a" * 63 + "0", "1" * 64)
    two = AdapterRef("chat", "a" * 63 + "1", "1" * 64)
    index.put("chat", entry(one, two))
    with refused(InvalidField, field="adapter", cause="ambiguous"):
        index.resolve("chat@" + "a" * 12)
    assert index.resolve("chat@" + two.revision) == two


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hcat-bot", "chat-bot"),  # first letters swapped
        ("xchat-bot", "chat-bot"),  # one too many in front
        ("chat-bott", "chat-bot"),
        ("chat_bot", "chat-bot"),
        ("chat", "chat-bot"),  # the beginning of it
        ("sql-expert-v1", "sql-expert-v2"),
        ("zzzzzzzz", None),
    ],
)
def test_did_you_mean(index: Index, typed: str, meant: str | None) -> None:
    names = ["chat-bot", "sql-expert-v2", *(f"adapter-{n:05}" for n in range(1000))]
    index.load({name: entry(ref(name, 1)) for name in names})
    with pytest.raises(AdapterNotFound) as caught:
        index.resolve(typed)
    hint = {} if meant is None else {"did_you_mean": meant}
    assert caught.value.metadata == {"adapter": typed, **hint}
    if meant is not None:
        assert repr(meant) in caught.value.message


def test_foreign_revisions_are_found_but_not_served(index: Index) -> None:
    one = ref("chat", 1)
    index.put("chat", entry(one, foreign=frozenset({one.revision})))
    assert index.find("chat").ref == one
    for use in (index.resolve, index.acquire):
        with refused(BaseModelMismatch, adapter=one.short):
            use("chat")
    assert index.leases(one.weights_digest) == 0


def test_lost_content(index: Index) -> None:
    old = ref("chat", 1)
    index.put("chat", Entry(None, (old,), 3))
    with refused(AdapterNotFound, adapter="chat", why=LOST):
        index.resolve("chat")
    assert index.resolve("chat@" + old.revision[:12]) == old


def test_garbage_waits_for_names_and_leases(index: Index) -> None:
    one, other = ref("chat", 1), ref("code", 2, weights=1)  # the same weights
    index.put("chat", entry(one))
    index.put("code", entry(other))
    assert index.acquire("chat").ref == one
    index.acquire("chat")
    assert index.leases(one.weights_digest) == 2
    index.remove("chat")
    assert taken(index) == (set(), set())
    index.release(one)
    assert not index.has_garbage
    index.release(one)
    assert index.has_garbage
    assert taken(index) == (set(), {one.revision}), "code still has the weights"
    assert not index.has_garbage
    index.remove("code")
    assert taken(index) == ({one.weights_digest}, {other.revision})


def test_garbage_that_is_wanted_again_is_kept(index: Index) -> None:
    one = ref("chat", 1)
    index.put("chat", entry(one))
    index.remove("chat")
    index.put("chat", entry(one))
    assert taken(index) == (set(), set())


def test_a_replaced_revision_is_garbage(index: Index) -> None:
    one, two = ref("chat", 1), ref("chat", 2)
    index.put("chat", entry(one))
    index.put("chat", entry(two, one))
    assert not index.has_garbage
    index.put("chat", entry(two))
    assert taken(index) == ({one.weights_digest}, {one.revision})
    assert len(index) == 1
