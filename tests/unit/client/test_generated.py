"""The synchronous client equals its generator's output."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clients import generate_sync


def test_the_files_are_the_generators() -> None:
    for path, text in generate_sync.generated().items():
        assert path.read_text("utf-8") == text, f"{path}: run `make client-sync`"


@pytest.mark.parametrize("name", generate_sync.MODULES.values())
def test_nothing_of_asyncio_is_left(name: str) -> None:
    """Neither in code nor in what docstrings say."""
    head, _, text = (generate_sync.PACKAGE / f"{name}.py").read_text("utf-8").partition("\n")
    assert re.match(r"# Generated from aio\w*\.py by `make client-sync`", head)
    assert not re.findall(r"(?i)\w*async\w*|await\w*|\baio\w*|event loop", text)


def test_a_module_of_every_kind_of_line() -> None:
    source = '''"""The asyncio client."""
from aio_transport import begin
class _AsyncOne:
    # begin: async only
    def __del__(self): ...
    # end: async only
    async def __aenter__(self) -> AsyncIterator[int]:
        return [a async for a in (await self.b()).c] + await(d)
    async def __anext__(self):
        """Use an ``async with``; made by `AsyncOne`."""
        raise StopAsyncIteration  # of `_AsyncOne`
'''
    wanted = '''"""The synchronous client."""
from transport import begin
class _One:
    def __enter__(self) -> Iterator[int]:
        return [a for a in (self.b()).c] + (d)
    def __next__(self):
        """Use a ``with``; made by `One`."""
        raise StopIteration  # of `_One`
'''
    assert generate_sync.sync_source(source, set()) == wanted


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "clients/generate_sync.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_check_finds_an_edit_and_a_run_undoes_it(tmp_path: Path) -> None:
    root = generate_sync.PACKAGE.parent.parent
    shutil.copy(root / "pyproject.toml", tmp_path)
    shutil.copytree(root / "clients", tmp_path / "clients")
    assert _run(tmp_path, "--check").returncode == 0
    edited = tmp_path / "clients/veneer_client/connection.py"
    before = edited.read_text("utf-8")
    edited.write_text(before.replace("sleep(wait_s)", "sleep(2 * wait_s)"), "utf-8")
    failed = _run(tmp_path, "--check")
    assert failed.returncode == 1
    assert "connection.py" in failed.stderr
    assert "make client-sync" in failed.stderr
    assert edited.read_text("utf-8") != before
    assert _run(tmp_path).returncode == 0
    assert edited.read_text("utf-8") == before


def test_words_that_no_longer_occur_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate_sync.WORDS, "said nowhere", "")
    # A script of ours: the word that it names.
    with pytest.raises(SystemExit, match="said nowhere"):
        generate_sync.generated()
