"""Two values of a header that says who calls: a proxy may read one, this server the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from veneer_registry.errors import InvalidField
from veneer_server.access.authenticate import Credentials

from tests.refused import refused
from tests.unit.server.access.tenants_kit import Shared, shared
from tests.unit.server.rpc.front_harness import failure, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")

TWICE = (
    "authorization",
    "x-api-key",
    "api-key",
    "veneer-tenant",
    "x-llm-d-inference-fairness-id",
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    async with shared(base_folder, front_cache, tmp_path_factory.mktemp("repeated")) as found:
        yield found


def cases(mine: str, other: str) -> list[tuple[tuple[str, str], ...]]:
    """Metadata with two values of something; each is that of a valid caller."""
    me = ("authorization", f"Bearer {mine}")
    return [
        (me, me),
        (me, ("authorization", f"Bearer {other}")),
        (("authorization", f"Bearer {mine}, Bearer {other}"),),
        (("authorization", f"Bearer {mine},{other}"),),
        (("x-api-key", mine), ("x-api-key", other)),
        (("x-api-key", f"{mine}, {other}"),),
        (me, ("x-api-key", other)),
        (("api-key", mine), ("api-key", other)),
        (("api-key", f"{mine}, {other}"),),
        (me, ("api-key", other)),
        (("x-api-key", mine), ("api-key", other)),
        (me, ("veneer-tenant", "team-a"), ("veneer-tenant", "team-a")),
        (me, ("veneer-tenant", "team-a, team-b")),
        (me, ("veneer-tenant", "team-a"), ("x-veneer-tenant", "team-b")),
        (me, ("x-llm-d-inference-fairness-id", "a"), ("x-llm-d-inference-fairness-id", "b")),
        (me, ("x-gateway-inference-objective", "a"), ("x-gateway-inference-objective", "a")),
    ]


@pytest.mark.push
async def test_both_doors_refuse_two_values(both: Shared) -> None:
    mine, other = both.caller("team-a", "operator"), both.caller("team-b", "admin")
    front = both.front
    url = f"http://{front.addresses['openai']}/v1/models"
    for given in cases(mine.key, other.key):
        found = await failure(front.inference.Generate(prompt(), metadata=given))
        assert found.code is grpc.StatusCode.INVALID_ARGUMENT, given
        assert found.reason == "INVALID_FIELD"
        assert found.metadata["field"] in {name for name, _ in given}
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.get(url, headers=list(given))
            assert answer.status_code == 400, (given, answer.text)
            assert mine.key not in answer.text
        async with httpx.AsyncClient(trust_env=False) as http:
            metrics = f"http://{front.addresses['metrics']}/metrics"
            assert (await http.get(metrics, headers=list(given))).status_code == 400, given


async def test_what_is_said_twice_in_the_same_words_by_two_headers_is_taken(
    both: Shared,
) -> None:
    mine: Any = both.caller("team-a", "operator")
    given = (
        ("authorization", f"Bearer {mine.key}"),
        ("x-api-key", mine.key),
        ("api-key", mine.key),
        ("veneer-tenant", "team-a"),
        ("x-veneer-tenant", "team-a"),
        ("x-llm-d-inference-fairness-id", "a, b"),
        ("x-gateway-inference-fairness-id", "c"),
    )
    await both.front.inference.Generate(prompt(), metadata=given)
    url = f"http://{both.front.addresses['openai']}/v1/models"
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(url, headers=list(given))
        assert answer.status_code == 200, answer.text


async def test_a_scheme_of_its_own_may_have_commas() -> None:
    """It is no key; a server without keys does not read it."""
    found = Credentials.of_headers({"authorization": 'Digest username="a", realm="b"'})
    assert not found.secret
    with refused(InvalidField, field="authorization"):
        Credentials.of_headers({"authorization": "bearer a,b"})
