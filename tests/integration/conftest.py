"""One real server, shared by the tests that do not break it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from tests.peft_adapters import make_adapters
from tests.server_harness import Server, running_server


@pytest.fixture(scope="session")
def real_adapters(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Eleven adapters of all kinds, saved by PEFT over the real base; the first worker of a run
    that needs them makes them for all."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "real-adapters"
    with own.with_name("real-adapters.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            from transformers import AutoModelForCausalLM

            model: Any = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
            # Strong ones: told apart by a few tokens, through bfloat16 rounding.
            make_adapters(model, own / "real-adapters.part", scale=0.1)
            (own / "real-adapters.part").rename(folder)
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(
    base_folder: Path,
    cache_dir: Path,
    real_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Server]:
    """The server, with every real adapter published under its name."""
    folder = tmp_path_factory.mktemp("server") / "data"
    async with running_server(folder, cache_dir, "--max-queue", "64") as server:
        for name, path in real_adapters.items():
            await server.push(path, name)
        yield server
