"""Every planted bug is an edit of a text that its source has, once, in a function.

The controls themselves run in `make verify` and `make torture-quick`; this finds at once what a
change of the source has made stale.
"""

from __future__ import annotations

import importlib

import pytest

from tests.attacks.__main__ import found_cases
from tests.attacks.case import Bug
from tests.planted import edited
from tests.torture import at_rest_worker, planted_isolation
from tests.torture.rows import row_07_models

pytestmark = pytest.mark.push

BUGS = {
    name: bug
    for name in found_cases()
    if (bug := getattr(importlib.import_module(f"tests.attacks.cases.{name}"), "BUG", None))
}
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


@pytest.mark.parametrize("name", BUGS)
def test_what_the_attacks_plant_fits_its_source(name: str) -> None:
    bug: Bug = BUGS[name]
    edited(importlib.import_module(bug.module), bug.old, bug.new)
