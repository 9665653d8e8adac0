"""``/pause?mode=keep`` and ``/resume``: nothing ends, nothing runs."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.unit.server.openai.kit import TEXT, error_of, post
from tests.unit.server.rpc.front_harness import Front, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_requests_wait_and_are_answered_after(
    front: Front, http: httpx.AsyncClient
) -> None:
    whole = (await post(http, TEXT, seed=1, max_tokens=6)).json()["choices"]
    gate = front.engine.pace = asyncio.Semaphore(2)
    running = asyncio.create_task(post(http, TEXT, seed=1, max_tokens=6))
    await until(lambda: front.engine.in_flight == 1)
    paused = await http.post("/pause", params={"mode": "keep", "clear_cache": "true"})
    assert (paused.status_code, paused.json()) == (200, {"status": "paused"})
    assert (await http.get("/is_paused")).json() == {"is_paused": True}
    for _ in range(100):
        gate.release()
    new = asyncio.create_task(post(http, TEXT, seed=1, max_tokens=6))
    await until(lambda: front.engine.in_flight == 2)
    assert (await http.get("/health")).status_code == 200
    again = await http.post("/pause", params={"mode": "keep"})
    assert again.json() == {"status": "paused"}
    assert not running.done()
    assert not new.done()
    resumed = await http.post("/resume")
    assert (resumed.status_code, resumed.json()) == (200, {"status": "resumed"})
    for answer in await asyncio.gather(running, new):
        assert answer.json()["choices"] == whole
    assert (await http.get("/is_paused")).json() == {"is_paused": False}


@pytest.mark.parametrize("query", ["", "?mode=abort", "?mode=wait", "?mode=", "?mode=KEEP"])
async def test_other_modes_are_refused(
    front: Front, http: httpx.AsyncClient, query: str
) -> None:
    answer = await http.post(f"/pause{query}")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "mode")
    assert not front.engine.paused
