"""Bugs planted as edits of source: where they go, and that they go away."""

from __future__ import annotations

from contextlib import suppress

import pytest
from veneer_server.engine.scheduling import pace, prefix_cache
from veneer_server.engine.scheduling.pace import Pace

from tests.planted import planted

PART = {"tokens": [1, 2], "block_size": 2, "digest": None}


def test_what_has_been_imported_runs_what_is_planted_until_the_end() -> None:
    def key(scope: str) -> bytes:
        keys: list[bytes] = []
        prefix_cache.extend_chain(keys, 1, scope=scope, **PART)  # type: ignore[arg-type]
        return keys[0]

    before = [key("a"), key("b")]
    assert before[0] != before[1]
    with planted(prefix_cache, "else _root(scope, digest)", 'else _root("", digest)'):
        assert key("a") == key("b")
    assert [key("a"), key("b")] == before


def test_a_method_and_an_error_within() -> None:
    made = Pace(8)
    made.observe(8, 1.0)
    with suppress(KeyError), planted(pace, "_MARGIN * tokens", "2 * tokens"):
        assert made.seconds(8) == 2.0
        raise KeyError
    assert made.seconds(8) == 0.75, "a margin, of a second"


@pytest.mark.parametrize(
    "old", ["no such text", "self", "_MARGIN: Final = 0.75"], ids=["absent", "often", "outside"]
)
def test_an_edit_that_does_not_fit_is_an_error(old: str) -> None:
    with pytest.raises(LookupError), planted(pace, old, ""):
        pass
