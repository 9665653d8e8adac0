"""A front process with the gateway on, over a fake engine; see `front_harness`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2
from veneer_server.text.tokenizer import TextTokenizer

from tests.unit.server.rpc.front_harness import Front, running


@pytest.fixture(scope="session")
def front_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the base's fingerprint, so that only the first server hashes it."""
    return tmp_path_factory.mktemp("gateway-cache")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_front(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Front]:
    data = tmp_path_factory.mktemp("gateway")
    async with running(base_folder, front_cache, data, openai_listen="127.0.0.1:0") as front:
        yield front


@pytest_asyncio.fixture(loop_scope="module")
async def front(module_front: Front) -> Front:
    """A front in its initial state, although a module shares it."""
    listed = await module_front.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    for adapter in listed.adapters:
        request = adapters_pb2.DeleteAdapterRequest(name=adapter.name)
        await module_front.adapters.DeleteAdapter(request)
    module_front.engine.reset()
    return module_front


@pytest_asyncio.fixture(loop_scope="module")
async def http(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client of the gateway."""
    base = f"http://{front.addresses['openai']}"
    async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(base_folder)
