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

A mark stands on a test, or on a whole file as ``pytestmark``, and `FOLDERS` has those of whole
folders; a run of another tier does not import such files. ``pytest FILE`` without ``--tier``
runs every test of the file.
``python -m tests.tiers`` lists the files and tests that have a mark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.places import REPOSITORY

DEFAULT: Final = "test"
MARKED: Final = ("push", "verify")
NAMES: Final = (DEFAULT, *MARKED)

FOLDERS: Final[Mapping[str, str]] = {
    "tests/unit/loadtest": "verify",
    "tests/unit/server/cuda": "verify",
    "tests/unit/train": "verify",
}
"""Tiers of whole folders. ``.ci/run`` runs them where what they test has changed
(`tests.verify`)."""

_WHOLE_FILE: Final = re.compile(
    r"^pytestmark = (?:\[[^\]]*?|)pytest\.mark\.(push|verify)\b", re.MULTILINE
)
_ONE_TEST: Final = re.compile(
    r"^ *@pytest\.mark\.(push|verify)\b.*\n(?:.*\n)*?^ *(?:async )?def (test_\w+)", re.MULTILINE
)


def of(item: pytest.Item) -> str:
    """The tier of a test; of two marks (a file's and its own), the later tier."""
    if (tier := _folder(item.path)) is not None:
        return tier
    marks = [name for name in MARKED if item.get_closest_marker(name) is not None]
    return marks[-1] if marks else DEFAULT


def may_hold(path: Path, tier: str) -> bool:
    """Return False if the folder's or file's own mark says that it has no test of the tier."""
    if (folder := _folder(path)) is not None:
        return folder == tier
    if not path.name.startswith("test_") or path.suffix != ".py":
        return True
    text = path.read_text("utf-8")
    whole = _WHOLE_FILE.search(text)
    if whole is not None:
        return tier == whole[1] or (tier == "verify" and "mark.verify" in text)
    if tier == DEFAULT or f"pytest.mark.{tier}" in text:
        return True
    fixtures = path.with_name("conftest.py")  # whose parameters may have marks
    return fixtures.is_file() and f"pytest.mark.{tier}" in fixtures.read_text("utf-8")


def _folder(path: Path) -> str | None:
    if not path.is_relative_to(REPOSITORY):
        return None
    name = f"{path.relative_to(REPOSITORY)}/"
    return next(
        (tier for folder, tier in FOLDERS.items() if name.startswith(f"{folder}/")), None
    )


def marked(tier: str) -> Iterator[str]:
    """Folders, files and tests (``tests/...py::name``) of a marked tier, sorted."""
    yield from (f"{folder}/" for folder, each in FOLDERS.items() if each == tier)
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
