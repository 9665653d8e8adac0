"""The load tester's loads beside streams are loads from DISK."""

from __future__ import annotations

from pathlib import Path

import pytest
from veneer_client import AsyncClient
from veneer_loadtest import churn
from veneer_loadtest.workload import read_base_shape

from tests.server_harness import Server

pytestmark = [
    pytest.mark.push,
    pytest.mark.real_base,
    pytest.mark.asyncio(loop_scope="session"),
]

LOADS = "veneer_adapter_load_seconds_count"
FROM_DISK = 'source="disk",stage="read"'


async def test_each_activation_beside_streams_reads_from_disk(
    server: Server,
    real_adapters: dict[str, Path],
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(churn, "SETTLE_S", 0.1)
    monkeypatch.setattr(churn, "EVERY_S", 0.2)
    options = churn.ChurnOptions(
        base=read_base_shape(base_folder),
        adapters=tuple(real_adapters)[:2],
        rank=4,
        phase_s=0.5,
        phases=1,
        context=256,
        seed=1,
        streams=2,
        by="load",
    )
    async with AsyncClient(server.address) as client:
        for name in options.adapters:
            await client.activate(name)
        before = (await server.metric(LOADS)).get(FROM_DISK, 0.0)
        found = await churn.churn(client, options, tmp_path)
        after = (await server.metric(LOADS))[FROM_DISK]
        assert not [a async for a in client.list(name_prefix="churn-")]
    assert found is not None
    assert found.by == "load"
    assert found.publishes >= 1
    assert after - before == found.publishes


async def test_a_phase_without_two_tokens_is_made_longer(
    server: Server,
    real_adapters: dict[str, Path],
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a machine that does something else meanwhile."""
    monkeypatch.setattr(churn, "SETTLE_S", 0.0)
    options = churn.ChurnOptions(
        base=read_base_shape(base_folder),
        adapters=tuple(real_adapters)[:1],
        rank=4,
        phase_s=0.0001,
        phases=1,
        context=256,
        seed=2,
        streams=1,
        by="load",
    )
    async with AsyncClient(server.address) as client:
        await client.activate(options.adapters[0])
        found = await churn.churn(client, options, tmp_path)
    assert found is not None
    assert found.quiet_gaps
    assert found.inside_gaps
