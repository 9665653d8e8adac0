"""The bash session that runs a page's commands finds failures and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.docs.check import check_page
from tests.docs.pages import REPOSITORY, Block
from tests.docs.session import Session


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    with Session(tmp_path, tmp_path / "cache") as opened:
        yield opened


def sh(text: str) -> Block:
    return Block(1, "sh", text)


def test_blocks_share_a_shell_and_a_copy_of_the_repository(session: Session) -> None:
    assert session.run(sh("cd docs\nx=1\n"), 20).failures == []
    ran = session.run(sh("echo $x > README.md; cat README.md; pwd; echo wrong >&2\n"), 20)
    first, where, wrong = ran.printed.splitlines()
    assert (first, wrong) == ("1", "wrong")
    assert Path(where) != REPOSITORY / "docs"
    assert len((REPOSITORY / "README.md").read_text()) > 1000


def test_each_command_that_fails_is_told_and_the_rest_goes_on(session: Session) -> None:
    ran = session.run(sh("false\nno-such-program || true\necho on\n(exit 3)\n"), 20)
    assert ran.failures == ["line 1: exit 1: false", "line 4: exit 3: ( exit 3 )"]
    assert ran.printed.endswith("on\n")
    assert session.run(sh("if fi\n"), 20).failures != []
    assert session.run(Block(1, "python", "raise SystemExit(2)\n"), 20).failures != []
    assert session.run(sh("echo fine\n"), 20).failures == []


def test_a_block_that_does_not_end_is_ended(session: Session) -> None:
    (told,) = session.run(sh("cat < /dev/zero > /dev/null\n"), 1).failures
    assert "not ended after 1 s" in told


def test_a_block_that_ends_the_shell_is_told(session: Session) -> None:
    (told,) = session.run(sh("exit 0\n"), 20).failures
    assert "ended the shell" in told


def test_what_a_page_leaves_running_ends_with_it(tmp_path: Path) -> None:
    with Session(tmp_path, tmp_path / "cache") as session:
        ran = session.run(sh("tail -f /dev/null &\necho $!\n"), 20)
        left = psutil.Process(int(ran.printed))
        assert left.is_running()
    assert not left.is_running()


def test_a_page_that_is_untrue_is_told_with_its_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\nveneer --version\n```\n\n```text\nVeneer of another name\n```\n\n"
        "```sh\ntrue\nveneer no-such-command\n```\n\n<!-- slow: no -->\n```sh\nfalse\n```\n"
    )
    untrue = "\n".join(check_page(page, tmp_path / "cache"))
    assert "page.md: output of the block at line 2" in untrue
    assert "Veneerofanothername" in untrue, "white space counts for nothing"
    assert "page.md: block at line 10: line 2: exit 2: veneer no-such-command" in untrue
    assert "false" not in untrue
    assert "exit 1: false" in "\n".join(check_page(page, tmp_path / "cache", slow=True))
