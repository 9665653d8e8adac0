"""The commands of README and docs, verbatim, against real servers (see `tests.docs`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.check import check_page
from tests.docs.pages import REPOSITORY, pages
from tests.docs.session import busy_ports

# A page may take minutes where other work takes the processors.
pytestmark = [pytest.mark.push, pytest.mark.real_base, pytest.mark.timeout(600)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_the_commands_of_the_page_do_what_it_says(
    page: Path, base_folder: Path, cache_dir: Path
) -> None:
    if busy := busy_ports():
        pytest.skip(f"ports {busy} are taken, and `unshare --net` does not work here")
    untrue = check_page(page, cache_dir)
    assert not untrue, "\n\n".join(untrue)
