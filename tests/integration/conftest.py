"""One real server, shared by the tests that do not break it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from tests.peft_adapters import make_adapters
from tests.server_harness import Server, running_server


@pytest.fixture(scope="session")
def real_adapters(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Eleven adapters of all kinds, saved by PEFT over the real base."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    # Strong ones: told apart by a few tokens, through bfloat16 rounding.
    return make_adapters(model, tmp_path_factory.mktemp("adapters"), scale=0.1)


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
