"""`veneer-server model prepare`: the real command, several at once on one cache folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.backends_ran import server_environment
from tests.places import cache_dir as suite_cache
from tests.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.push

SERVER = str(Path(sys.executable).with_name("veneer-server"))


class Command:
    """A running command, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[str] = []

    @classmethod
    async def start(cls, base: Path, cache: Path, *flags: str) -> Command:
        return cls(
            await asyncio.create_subprocess_exec(
                *(SERVER, "model", "prepare", "--base", str(base), "--cache-dir", str(cache)),
                *("--device", "cpu", *flags),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=server_environment(),
            )
        )

    async def says(self, words: str) -> None:
        """Wait until it has said something with these words; fail if it ends before."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said.append(line.decode())
            if words in self.said[-1]:
                return
        pytest.fail(f"it ended without {words!r}: {''.join(self.said)}")

    async def ends(self) -> str:
        """Its output; it must succeed."""
        out, rest = await self.process.communicate()
        self.said += rest.decode().splitlines(keepends=True)
        assert self.process.returncode == 0, "".join(self.said)
        return out.decode()

    @property
    def last(self) -> str:
        return self.said[-1].strip()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache, but for compiled kernels, which take a minute."""
    (tmp_path / "cache").mkdir(mode=0o700)
    kernels = suite_cache() / "native"
    if kernels.is_dir():
        shutil.copytree(kernels, tmp_path / "cache" / "native")
    return tmp_path / "cache"


def prepared(cache: Path) -> dict[str, int]:
    """Files of the prepared base, and their inodes: written again, they have others."""
    found = [p for name in ("packed", "quantized") for p in (cache / name).rglob("*")]
    return {str(path.relative_to(cache)): path.stat().st_ino for path in found}


async def test_one_prepares_and_others_wait_even_if_the_first_is_killed(
    base: Path, cache: Path
) -> None:
    first = await Command.start(base, cache, "--log-format", "json")
    await first.says("starting the engine")
    others = [await Command.start(base, cache) for _ in range(2)]
    for each in others:
        await each.says("waiting for another process")
    os.kill(first.process.pid, signal.SIGKILL)
    await first.process.wait()
    folders = await asyncio.gather(*(each.ends() for each in others))
    assert folders == [f"{base}\n"] * 2
    assert sorted(each.last for each in others) == [
        f"tiny is prepared in {cache}",
        f"tiny was prepared in {cache} before",
    ], "one did the work"
    made = prepared(cache)
    assert made
    assert not [name for name in made if "veneer-pack-" in name or "quantize-" in name]

    # An engine finds all that it would have written.
    for mark in (cache / "prepared").iterdir():
        mark.unlink()
    await (await Command.start(base, cache)).ends()
    assert prepared(cache) == made


async def test_a_registry_needs_no_engine(base: Path, cache: Path) -> None:
    # An init container has a server's flags, but not its Secrets.
    secrets = [f"--{flag}=/run/secrets/absent" for flag in ("keys-file", "tls-cert", "tls-key")]
    command = await Command.start(base, cache, "--role=registry", *secrets)
    await command.ends()
    assert command.last == f"tiny is in {cache}; a registry needs no more"
    assert prepared(cache) == {}
    assert list((cache / "fingerprints").iterdir())


async def test_a_folder_that_cannot_be_written_names_the_way_out(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    command = await Command.start(base, tmp_path / "file" / "cache")
    assert command.process.stderr is not None
    said = (await command.process.stderr.read()).decode()
    assert await command.process.wait() == 1
    assert f"--cache-dir {tmp_path}/file/cache cannot be written" in said
    assert f"let user {os.geteuid()} write to it" in said
