"""Bugs planted as edits of source: where they apply, and that they are removed."""

from __future__ import annotations

from contextlib import suppress

import pytest
from veneer_server.engine.scheduling import pace, prefix_cache
from veneer_server.engine.scheduling.pace import StepPace

from tests.planted import planted
from tests.torture import at_rest_worker, planted_isolation
from tests.torture.rows import row_07_models

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
    made = StepPace(8)
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


PLANTS = {
    **{name: each.bug for name, each in planted_isolation.PLANTED.items()},
    **{name: plant for name, (_, plant) in row_07_models.PLANTED.items()},
    **at_rest_worker.PLANTED,
    "two exchanged": lambda: planted_isolation.two_exchanged("a" * 64, "b" * 64),
    "prefixes by name": planted_isolation.prefixes_by_name,
    "prefixes without scope": planted_isolation.prefixes_without_scope,
}


@pytest.mark.parametrize("name", PLANTS)
def test_what_the_torture_plants_fits_its_source(name: str) -> None:
    with PLANTS[name]():
        pass
