"""``veneer example``: the adapters of the repository, as a user without a clone gets them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from veneer_client.cli import example
from veneer_client.cli.example import Name

from tests.unit.client.fake_server import FakeServer

Run = Callable[..., Any]
ADAPTERS = Path(__file__).resolve().parents[3] / "examples" / "adapters"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", list(Name))
def test_it_is_copied_whole_and_the_next_command_works(name: str, here: Path, run: Run) -> None:
    done = run("example", name)
    assert done.exit_code == 0, done.stderr
    assert content(here / name) == content(ADAPTERS / name)
    assert [file.name for file in here.iterdir()] == [name]
    _, _, command = done.stdout.partition("next: veneer ")
    pushed = run(*shlex.split(command))
    assert pushed.exit_code == 0, pushed.stderr
    assert pushed.stdout.startswith("published: ")


def test_it_goes_where_it_is_told(here: Path, run: Run) -> None:
    done = run("example", "chat", "--out", "a folder/b")
    assert done.exit_code == 0, done.stderr
    assert content(here / "a folder" / "b") == content(ADAPTERS / "chat")
    assert "veneer adapter push 'a folder/b' --name chat" in done.stdout


def test_push_publishes_and_copies_nothing(here: Path, run: Run, server: FakeServer) -> None:
    done = run("example", "sql", "--push")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("published: sql@")
    assert list(here.iterdir()) == []
    _, _, command = done.stdout.partition("next: veneer ")
    assert run(*shlex.split(command)).exit_code == 0
    assert run("example", "sql", "--push").stdout.startswith("unchanged: sql@")


@pytest.mark.parametrize("there", ["a file", "a folder", "a broken link"])
def test_nothing_is_overwritten(there: str, here: Path, run: Run) -> None:
    mine = here / "chat"
    if there == "a file":
        mine.write_text("mine")
    elif there == "a folder":
        mine.mkdir()
    else:
        mine.symlink_to("nowhere")
    before = os.lstat(mine)
    refused = run("example", "chat")
    assert refused.exit_code == 1
    assert "chat already exists: give another folder with --out" in refused.stderr
    assert os.lstat(mine) == before
    assert list(here.iterdir()) == [mine]


def test_a_folder_that_cannot_be_made_is_said_in_one_line(here: Path, run: Run) -> None:
    (here / "file").touch()
    refused = run("example", "chat", "--out", "file/chat")
    assert refused.exit_code == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "file/chat cannot be written" in refused.stderr


def test_an_installation_without_them_says_so(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.veneer_client, "__file__", str(here / "a" / "b" / "c.py"))
    refused = run("example", "chat")
    assert refused.exit_code == 1
    assert "this installation has no example adapters: install" in refused.stderr


def test_an_unknown_one_names_those_that_there_are(here: Path, run: Run) -> None:
    refused = run("example", "poetry")
    assert refused.exit_code == 2
    assert all(name in refused.stderr for name in Name)
