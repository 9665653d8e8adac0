"""The three tiers of the suite: which tests run when.

========  ===========================  ====================================================
tier      runs in                      what belongs there
========  ===========================  ====================================================
test      ``make test``                everything without a mark
push      ``.ci/run`` (``make          ``@pytest.mark.push``: what every push must prove, but
          test-push``)                 too slow for a person who waits
verify    ``make verify``              ``@pytest.mark.verify``: long forms and controls that
                                       plant bugs, run before a release
========  ===========================  ====================================================

A mark stands on a test, or on a whole file as ``pytestmark``; then a run of another tier does
not import the file. ``pytest FILE`` without ``--tier`` runs every test of the file.
``python -m tests.tiers`` lists the files and tests that have a mark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.places import REPOSITORY

DEFAULT: Final = "test"
MARKED: Final = ("push", "verify")
NAMES: Final = (DEFAULT, *MARKED)

_WHOLE_FILE: Final = re.compile(
    r"^pytestmark = (?:\[[^\]]*?|)pytest\.mark\.(push|verify)\b", re.MULTILINE
)
_ONE_TEST: Final = re.compile(
    r"^ *@pytest\.mark\.(push|verify)\b.*\n(?:.*\n)*?^ *(?:async )?def (test_\w+)", re.MULTILINE
)


def of(item: pytest.Item) -> str:
    """The tier of a test; of two marks (a file's and its own), the later tier."""
    marks = [name for name in MARKED if item.get_closest_marker(name) is not None]
    return marks[-1] if marks else DEFAULT


def may_hold(file: Path, tier: str) -> bool:
    """Return False if a file's ``pytestmark`` says that it has no test of the tier."""
    if not file.name.startswith("test_"):
        return True
    text = file.read_text("utf-8")
    whole = _WHOLE_FILE.search(text)
    if whole is not None:
        return tier == whole[1] or (tier == "verify" and "mark.verify" in text)
    return tier == DEFAULT or f"pytest.mark.{tier}" in text


def marked(tier: str) -> Iterator[str]:
    """Files (``tests/...py``) and tests (``tests/...py::name``) of a marked tier, sorted."""
    for file in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        text, name = file.read_text("utf-8"), str(file.relative_to(REPOSITORY))
        whole = _WHOLE_FILE.search(text)
        if whole is not None and whole[1] == tier:
            yield name
        for found in _ONE_TEST.finditer(text):
            if found[1] == tier:
                yield f"{name}::{found[2]}"


if __name__ == "__main__":
    for tier in MARKED:
        print(f"{tier}:", *marked(tier), sep="\n  ", file=sys.stdout)
