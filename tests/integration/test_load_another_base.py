"""The load tester against a server whose base it has no folder of."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from veneer_loadtest.results import RunResult, read_result

from tests.server_harness import Server, running_server
from tests.tiny_llama import VOCABULARY, make_tiny_llama

pytestmark = pytest.mark.push


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    """A tiny base, which is not the bundled one."""
    folder = tmp_path_factory.mktemp("another-base")
    base = make_tiny_llama(folder / "tiny")
    flags = ("--base", str(base), "--kv-cache-bytes", "16MiB")
    async with running_server(folder / "data", cache_dir, *flags) as server:
        yield server


async def loadtest(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "veneer_loadtest.cli",
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.asyncio(loop_scope="module")
async def test_generated_adapters_are_for_the_base_that_is_served(
    serving: Server, tmp_path: Path
) -> None:
    """They are accepted, used, and prompts are token ids that the base knows."""
    file = tmp_path / "a.json"
    load = ("--generate", "2", "--rank", "2", "--streams", "2", "--requests", "6")
    load += ("--tokens", "4", "--popularity", "roundrobin", "--json", str(file))
    status, told = await loadtest("run", "--server", serving.address, *load)
    assert status == 0, told
    result = read_result(file)
    assert isinstance(result, RunResult)
    (level,) = result.levels
    assert (level.requests.ok, level.adapters) == (6, 2)
    assert not result.load.text
    assert result.load.vocab == VOCABULARY
    assert result.target["base_model"] == "tiny"


@pytest.mark.asyncio(loop_scope="module")
async def test_swap_and_prefix_make_theirs_for_it_too(serving: Server) -> None:
    """What these measure is tested elsewhere; here that they can."""
    at = ("--server", serving.address, "--rank", "2")
    status, told = await loadtest("swap", *at, "--samples", "1", "--churn", "0")
    assert status == 0, told
    prefix = ("--streams", "1", "--shared", "32", "--tokens", "2", "--repeat", "1")
    status, told = await loadtest("prefix", *at, *prefix)
    assert status == 0, told
