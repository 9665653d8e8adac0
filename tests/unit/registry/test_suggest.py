"""Suggestions, checked against all edits of all names, and as names come and go."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from veneer_registry.suggest import NearNames

ALPHABET = string.ascii_lowercase + string.digits + "._-"
words = st.text(alphabet="ab1-", min_size=3, max_size=8)


def one_edit_apart(one: str, other: str) -> bool:
    """A swap of neighbours, a letter more, less or another one; by trying all of them."""
    for at in range(len(one) + 1):
        head, tail = one[:at], one[at:]
        edits = {head + tail[1:], head + tail[1:2] + tail[:1] + tail[2:]}
        edits |= {head + letter + tail for letter in ALPHABET}
        edits |= {head + letter + tail[1:] for letter in ALPHABET if tail}
        if other in edits:
            return True
    return False


@example(names={"aaaaaaa"}, typed="aaaaaaaa")
@example(names={"abababab"}, typed="babababa")
@given(names=st.sets(words, min_size=1, max_size=30), typed=words)
def test_a_name_one_edit_away_is_found(names: set[str], typed: str) -> None:
    names.discard(typed)
    near = {name for name in names if one_edit_apart(typed, name)}
    found = NearNames(names).nearest(typed, names)
    assert found in near if near else found is None or found in names


def test_slips_of_every_kind_among_many() -> None:
    seed = 1
    print(f"seed {seed}")
    draw = random.Random(seed)
    names = {f"team-{n % 100:02}-adapter-{n // 100:04}" for n in range(0, 9000, 7)}
    near = NearNames(names)
    for name in draw.sample(sorted(names), 300):
        at = draw.randrange(1, len(name) - 1)
        for typed in (
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
            name[:at] + name[at + 1 :],
            name[:at] + "x" + name[at:],
            name[:at] + "x" + name[at + 1 :],
        ):
            if typed not in names:
                assert one_edit_apart(typed, near.nearest(typed, names) or ""), typed


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("sql-expert-v2", "sql-expert"),
        ("my-sql-expert", "sql-expert"),
        ("sql", None),  # too little of it
        ("sqll-expertt", None),
        ("b", "ab"),
        ("xy", None),
    ],
)
def test_names_further_away(typed: str, meant: str | None) -> None:
    names = {"sql-expert", "a", "ab"}
    assert NearNames(names).nearest(typed, names) == meant


def test_names_come_and_go() -> None:
    names = {"chat", "code"}
    near = NearNames(names)
    assert near.nearest("chta", names) == "chat"
    near.remove("chat")
    names.remove("chat")
    assert near.nearest("chta", names) is None
    near.add("chart")
    names.add("chart")
    assert near.nearest("chat", names) == "chart"
    near.remove("chart")
    near.remove("code")
    assert near.nearest("chat", set()) is None
