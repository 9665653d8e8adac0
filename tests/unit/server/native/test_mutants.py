"""Every mutant of `tests.mutants` still mutates something. Whether tests notice it is checked
by ``make mutants``, which compiles it."""

from __future__ import annotations

from pathlib import Path

import pytest
import veneer_server

from tests.mutants.native import MUTANTS, Mutant

NATIVE = Path(veneer_server.__file__).parent / "backends" / "native"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_s_text_occurs_exactly_once(mutant: Mutant) -> None:
    text = (NATIVE / mutant.file).read_text("utf-8")
    assert mutant.applied(text) != text


@pytest.mark.parametrize("text", ["", "x = 1;\nx = 1;\n"])
def test_one_that_does_not_is_told(text: str) -> None:
    # The file is named.
    with pytest.raises(ValueError, match=r"\d times in a\.h"):
        Mutant("a mutant", "a.h", "x = 1;", "x = 2;").applied(text)


def test_names_tell_them_apart() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
