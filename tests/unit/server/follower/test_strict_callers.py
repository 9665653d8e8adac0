"""Callers, and operators, who take names from a view of at most so much age."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from veneer_client import AsyncClient
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_registry.errors import InvalidField

from tests.refused import refused
from tests.unit.server.follower.pair import Pair, pair, until
from tests.unit.server.rpc.front_harness import failure, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")

LAG = "veneer-max-registry-lag"
NEVER = "0.0000001"
"""Seconds that no view is younger than."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    tmp = tmp_path_factory.mktemp("strict")
    http = {"openai_listen": "127.0.0.1:0"}
    async with pair(base_folder, front_cache, tmp, **http) as found:
        await found.push("one", 1)
        await found.agreed()
        yield found


async def ask(both: Pair, most: str, adapter: str = "one") -> Any:
    request = prompt(adapter=adapter)
    return await both.follower.inference.Generate(request, metadata=((LAG, most),))


async def test_a_call_that_takes_no_view_as_old_is_refused(both: Pair) -> None:
    await ask(both, "60")
    why = await failure(ask(both, NEVER))
    assert (why.code, why.metadata["cause"]) == (grpc.StatusCode.UNAVAILABLE, "registry_lag")
    assert float(why.metadata["lag_s"]) >= 0
    assert why.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    for look in (
        both.follower.adapters.GetAdapter(
            pb.GetAdapterRequest(name="one"), metadata=((LAG, NEVER),)
        ),
        both.follower.adapters.ListAdapters(pb.ListAdaptersRequest(), metadata=((LAG, NEVER),)),
        ask(both, NEVER, "unknown"),
    ):
        assert (await failure(look)).metadata["cause"] == "registry_lag"
    await ask(both, NEVER, "")  # the base is nobody's publication


async def test_a_cut_off_follower_answers_only_who_takes_its_view(both: Pair) -> None:
    both.proxy.refuse()

    async def old() -> bool:
        return (await both.facts()).lag.ToTimedelta().total_seconds() > 1

    await until(old)
    await ask(both, "60")
    assert (await failure(ask(both, "1"))).metadata["limit_s"] == "1"
    both.proxy.heal()
    await both.agreed()
    await ask(both, "60")


async def test_by_http(both: Pair) -> None:
    url = f"http://{both.follower.addresses['openai']}"
    body = {"model": "one", "prompt": "Hello", "max_tokens": 2}
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:

        async def post(most: str) -> httpx.Response:
            return await http.post("/v1/completions", json=body, headers={f"x-{LAG}": most})

        assert (await post("60")).status_code == 200
        late = await post(NEVER)
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) >= 1
        wrong = await post("soon")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, LAG)


@pytest.mark.parametrize("most", ["soon", "-1", "nan", "inf", "1e999"])
async def test_what_is_no_time(both: Pair, most: str) -> None:
    for server in (both.follower, both.registry):
        look = server.adapters.GetAdapter(
            pb.GetAdapterRequest(name="one"), metadata=((LAG, most),)
        )
        why = await failure(look)
        assert (why.code, why.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, LAG)


async def test_the_client_asks_for_it(both: Pair) -> None:
    address = both.follower.addresses["grpc"]
    async with AsyncClient(address, max_registry_lag_s=60) as client:
        assert (await client.get("one")).adapter.name == "one"
    async with AsyncClient(both.registry.addresses["grpc"], max_registry_lag_s=0) as client:
        assert (await client.get("one")).adapter.name == "one", "it is the registry's own"
    with refused(InvalidField, field="max_registry_lag_s"):
        AsyncClient(address, max_registry_lag_s=-1)


@pytest.mark.push
async def test_an_operator_may_ask_for_all_callers(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with pair(base_folder, front_cache, tmp_path, max_registry_lag=NEVER) as both:
        await both.push("one", 1)
        await both.agreed()  # the server itself takes any view
        why = await failure(both.follower.inference.Generate(prompt(adapter="one")))
        assert why.metadata["cause"] == "registry_lag"
        why = await failure(ask(both, "60"))
        assert why.metadata["cause"] == "registry_lag", "a caller may only ask for less"
        # What is passed on asks the registry, whose names are never old.
        await both.follower.push(both.adapter(2), "two")
