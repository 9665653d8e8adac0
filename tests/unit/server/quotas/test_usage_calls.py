"""Who is told what about usage, over sockets, by the rpc, the client and the command."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import CliRunner
from veneer_client.cli.main import cli
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import NonFiniteOutput

from tests.unit.server.quotas.kit import BASE, Caller, Limited
from tests.unit.server.quotas.test_generate_limits import ids
from tests.unit.server.rpc.front_harness import failure, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def numbers(answer: Any) -> dict[str, tuple[int, int, int, int]]:
    return {
        each.tenant: (
            each.requests,
            each.prompt_tokens,
            each.cached_prompt_tokens,
            each.generated_tokens,
        )
        for each in answer.tenants
    }


async def test_each_tenant_sees_its_own_and_an_operator_all(limited: Limited) -> None:
    one, two = (limited.caller(role="admin") for _ in range(2))
    operator = limited.caller(role="operator")
    await one.generate(ids(10, 4))
    await one.generate(ids(20, 2, output=inference_pb2.OutputOptions(n=3)))
    await two.post({"prompt": [list(range(100, 130))] * 2, "max_tokens": 1})
    # The fake engine says of each prompt that it had 16 tokens of it.
    mine, other = {one.tenant: (2, 30, 32, 10)}, {two.tenant: (1, 60, 32, 2)}
    assert numbers(await one.usage()) == numbers(await one.usage(one.tenant)) == mine
    assert (await failure(one.usage(two.tenant))).reason == "PERMISSION_DENIED"
    assert (await failure(one.usage("nobody"))).reason == "PERMISSION_DENIED"
    assert numbers(await operator.usage(two.tenant)) == other
    assert numbers(await operator.usage("nobody")) == {}
    everybody = numbers(await operator.usage())
    assert mine.items() | other.items() <= everybody.items()


async def test_what_is_refused_or_fails_is_not_charged(limited: Limited) -> None:
    caller = limited.caller(role="admin", requests_per_minute=1)
    await failure(caller.generate(ids(60, 60)))
    await failure(caller.generate(inference_pb2.GenerateRequest(prompt="x", adapter="none")))
    await caller.generate(ids(5, 1))
    for _ in range(5):
        await failure(caller.generate(ids(5, 1)))
    assert numbers(await caller.usage()) == {caller.tenant: (1, 5, 16, 1)}


async def test_a_prompt_is_charged_as_it_is_computed_also_if_its_caller_leaves(
    limited: Limited,
) -> None:
    """And nothing twice: not what is computed again after a preemption."""
    caller, engine = limited.caller(role="admin"), limited.front.engine
    engine.pace = asyncio.Semaphore(0)
    try:
        call = caller.generate(ids(40, 4))
        await until(lambda: engine.in_flight == 1)
        counts = engine.counted[-1]
        assert numbers(await caller.usage()) == {}
        counts.prefilled(16, 0)
        assert numbers(await caller.usage()) == {caller.tenant: (1, 16, 0, 0)}
        for again in (8, 16, 24):
            counts.prefilled(again, 0)
        call.cancel()
        await until(lambda: engine.in_flight == 0)
        # The engine had begun the next part when it was told.
        counts.prefilled(32, 0)
        assert numbers(await caller.usage()) == {caller.tenant: (1, 32, 0, 0)}
        call = caller.generate(ids(40, 4))
        await until(lambda: engine.in_flight == 1)
        engine.counted[-1].prefilled(24, 8)
        for _ in range(4):
            engine.pace.release()
        await call
        assert numbers(await caller.usage()) == {caller.tenant: (2, 72, 8, 4)}
    finally:
        engine.pace = None


async def test_what_was_computed_for_a_call_that_fails_is_charged(limited: Limited) -> None:
    """Of its limits, too: the rest is given back."""
    caller = limited.caller(role="admin", requests_per_minute=2, tokens_per_minute=100)
    engine = limited.front.engine
    engine.pace = asyncio.Semaphore(0)
    engine.script = [NonFiniteOutput("not finite: check the adapter")]
    try:
        call = asyncio.ensure_future(failure(caller.generate(ids(60, 4))))
        await until(lambda: engine.in_flight == 1)
        engine.counted[-1].prefilled(50, 0)
        engine.pace.release()
        assert (await call).reason == "NON_FINITE_OUTPUT"
        assert numbers(await caller.usage()) == {caller.tenant: (1, 50, 0, 0)}
        engine.pace = engine.script = None
        assert (await failure(caller.generate(ids(51, 4)))).reason == "RATE_LIMIT_EXCEEDED"
        await caller.generate(ids(46, 4))
    finally:
        engine.pace = engine.script = None


async def test_a_period_is_of_whole_hours(limited: Limited) -> None:
    caller = limited.caller(role="admin")
    await caller.generate(ids(5, 1))
    now = int(time.time())
    hour = now - now % 3600

    async def told(start: int | None, end: int | None) -> Any:
        period = {
            name: Timestamp(seconds=at)
            for name, at in (("start", start), ("end", end))
            if at is not None
        }
        return await caller.usage(**period)

    answer = await told(hour + 1800, hour + 3 * 3600)
    # The hour may have passed while it was asked.
    assert numbers(answer) in ({caller.tenant: (1, 5, 16, 1)}, {})
    assert (answer.start.ToSeconds(), answer.end.ToSeconds()) == (hour, hour + 3 * 3600)
    assert numbers(await told(0, hour - 3600)) == {}
    answer = await told(None, None)
    assert numbers(answer) == {caller.tenant: (1, 5, 16, 1)}
    assert hour - 3600 < answer.start.ToSeconds() <= answer.end.ToSeconds()
    for start, end in ((hour, hour), (hour + 3600 * 5, hour), (hour + 10, hour + 20)):
        assert (await failure(told(start, end))).metadata["field"] == "start"
    bad = Timestamp(seconds=1, nanos=-5)
    assert (await failure(caller.usage(end=bad))).metadata["field"] == "end"


async def _run(caller: Caller, *arguments: str) -> Any:
    env = {"VENEER_API_KEY": caller.key, "VENEER_SERVER": caller.front.addresses["grpc"]}
    command = ["usage", *arguments]
    return await asyncio.to_thread(CliRunner().invoke, cli, command, env=env)


async def test_the_command(limited: Limited) -> None:
    caller = limited.caller(role="admin")
    await caller.generate(ids(5, 3))
    found = json.loads((await _run(caller, "--json")).stdout)
    assert [
        (each["tenant"], each["requests"], each["prompt_tokens"], each["generated_tokens"])
        for each in found["tenants"]
    ] == [(caller.tenant, 1, 5, 3)]
    assert found["start"] < found["end"]
    table = (await _run(caller, "--start", "2001-01-01", "--end", "2999-01-01T00:00Z")).stdout
    assert "2001-01-01 00:00 to 2999-01-01 00:00 UTC" in table
    assert caller.tenant in table
    assert "generated" not in (await _run(caller, "--end", "2001-02-01")).stdout
    wrong = await _run(caller, "--start", "yesterday")
    assert (wrong.exit_code, "--start" in wrong.stderr) == (1, True)
    other = await _run(caller, "--tenant", "someone")
    assert (other.exit_code, "operator" in other.stderr) == (1, True)
    reader = await _run(limited.caller(), "--json")
    assert reader.exit_code == 1


async def test_metrics_by_tenant(limited: Limited) -> None:
    caller, operator = limited.caller(), limited.caller(role="operator")
    await caller.generate(ids(7, 2))
    page = await operator.metrics()
    label = f'{{tenant="{caller.tenant}"}}'
    for name, value in (
        ("requests", 1),
        ("prompt_tokens", 7),
        ("cached_prompt_tokens", 16),
        ("generation_tokens", 2),
        ("adapter_byte_seconds", 0),
    ):
        assert f"veneer_tenant_{name}_total{label} {value}.0" in page
    assert 'veneer_tenant_adapter_bytes{tenant="default"}' in page


async def test_a_refusal_is_in_the_audit_log_and_metrics(limited: Limited) -> None:
    caller, operator = limited.caller(requests_per_minute=1), limited.caller(role="operator")
    await caller.generate(ids(1, 1))
    await failure(caller.generate(ids(1, 1)))
    async with httpx.AsyncClient(trust_env=False) as http:
        url = f"http://{caller.front.addresses['openai']}/v1/completions"
        body = {"model": BASE, "prompt": "x"}
        assert (await http.post(url, json=body, headers=caller.headers)).status_code == 429
    page = await operator.metrics()
    assert 'veneer_request_failures_total{reason="RATE_LIMIT_EXCEEDED"}' in page

    def mine() -> list[dict[str, str]]:
        text = (limited.front.data_dir / "audit.refused.jsonl").read_text("utf-8")
        whole = text[: text.rfind("\n") + 1].splitlines()
        found = [json.loads(line) for line in whole]
        return [each for each in found if each.get("tenant") == caller.tenant]

    await until(lambda: len(mine()) == 2)  # a thread writes it
    assert [(each["outcome"], each["reason"]) for each in mine()] == [
        ("RESOURCE_EXHAUSTED", "RATE_LIMIT_EXCEEDED")
    ] * 2
