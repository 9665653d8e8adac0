"""A front process that asks for keys with limits, and a clock that tests set."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2

from tests.unit.server.quotas.kit import Clock, Limited
from tests.unit.server.rpc.front_harness import running


@pytest.fixture(scope="session")
def front_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the base's fingerprint, so that only the first server hashes it."""
    return tmp_path_factory.mktemp("quotas-cache")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_limited(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Limited]:
    data, clock = tmp_path_factory.mktemp("limited"), Clock()
    file = data / "keys.toml"
    file.write_text("")
    file.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer_server.quotas.rates.monotonic", clock)
        async with running(
            base_folder,
            front_cache,
            data,
            openai_listen="127.0.0.1:0",
            keys_file=str(file),
        ) as front:
            yield Limited(front, file, clock)


@pytest_asyncio.fixture(loop_scope="module")
async def limited(module_limited: Limited) -> Limited:
    """The front without adapters, and with its engine as it was."""
    operator = module_limited.caller(role="operator")
    front = module_limited.front
    listed = await front.adapters.ListAdapters(
        adapters_pb2.ListAdaptersRequest(), metadata=operator.metadata
    )
    for adapter in listed.adapters:
        request = adapters_pb2.DeleteAdapterRequest(name=adapter.name)
        await front.adapters.DeleteAdapter(request, metadata=operator.metadata)
    front.engine.reset()
    return module_limited
