"""Limits on generate requests as callers meet them, over gRPC and HTTP sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import httpx
import openai
import pytest
from veneer_client import AsyncClient, Text, aio_connection
from veneer_proto.v1 import inference_pb2, inference_pb2_grpc
from veneer_registry.errors import QuotaExceeded, RateLimitExceeded
from veneer_server.access.edit_keys import revoke_key

from tests.refused import refused
from tests.unit.server.quotas.kit import BASE, Caller, Limited
from tests.unit.server.rpc.front_harness import failure, prompt, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

MINUTE = "x-ratelimit-{}-{}"
FOUR = {"prompt": "Hello there", "max_tokens": 4}


def ids(count: int, new: int = 4, **fields: Any) -> Any:
    """A request of so many prompt tokens and new ones."""
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=range(100, 100 + count)),
        stopping=inference_pb2.StoppingOptions(max_tokens=new),
        **fields,
    )


def left(headers: Any, what: str = "requests") -> tuple[str, str, str]:
    kinds = ("limit", "remaining", "reset")
    return tuple(headers[MINUTE.format(kind, what)] for kind in kinds)  # type: ignore[return-value]


@pytest.mark.push
async def test_requests_a_minute(limited: Limited) -> None:
    caller = limited.caller(requests_per_minute=3)
    assert left(await caller.trailing(prompt())) == ("3", "2", "20s")
    answer = await caller.post(FOUR)
    assert answer.status_code == 200
    assert left(answer.headers) == ("3", "1", "40s")
    assert left(await caller.trailing(prompt())) == ("3", "0", "1m0s")

    failed = await failure(caller.generate(prompt()))
    assert (failed.code, failed.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "RATE_LIMIT_EXCEEDED",
    )
    (over,) = failed.details["QuotaFailure"].violations
    assert (over.subject, over.quota_metric, over.quota_value) == (
        f"key:{caller.id}",
        "requests_per_minute",
        3,
    )
    assert failed.details["RetryInfo"].retry_delay.ToSeconds() == 20
    assert failed.trailing["grpc-retry-pushback-ms"] == "20000"
    assert left(failed.trailing) == ("3", "0", "1m0s")

    answer = await caller.post(FOUR)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (
        429,
        "rate_limit_exceeded",
        "requests",
    )
    assert answer.headers["retry-after"] == "20"
    assert answer.headers["x-should-retry"] == "true"
    assert left(answer.headers) == ("3", "0", "1m0s")
    assert "token" not in {name.rpartition("-")[2] for name in answer.headers}

    limited.clock.now += 20.0
    stream = caller.front.inference.GenerateStream(prompt(), metadata=caller.metadata)
    async for _ in stream:
        pass
    assert left(dict(await stream.trailing_metadata())) == ("3", "0", "1m0s")
    stream = caller.front.inference.GenerateStream(prompt(), metadata=caller.metadata)
    assert left((await failure(stream)).trailing) == ("3", "0", "1m0s")


async def test_tokens_a_minute(limited: Limited) -> None:
    caller = limited.caller(tokens_per_minute=60)
    found = await caller.trailing(ids(30, 10))
    assert left(found, "tokens") == ("60", "20", "40s")
    assert MINUTE.format("limit", "requests") not in found
    failed = await failure(caller.generate(ids(21)))
    assert failed.metadata["limit"] == "tokens_per_minute"
    assert failed.details["RetryInfo"].retry_delay.ToSeconds() == 1
    answer = await caller.post({"prompt": list(range(100, 121)), "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "tokens")
    # What was asked for may be more than is left: the answer is not cut short.
    assert left(await caller.trailing(ids(20, 40)), "tokens") == ("60", "0", "1m40s")
    limited.clock.now += 41.0
    assert left(await caller.trailing(ids(1, 1)), "tokens")[1] == "0"


async def test_a_prompt_that_never_fits_is_told_so_once(limited: Limited) -> None:
    caller = limited.caller(tokens_per_minute=20)
    failed = await failure(caller.generate(ids(21)))
    assert (failed.reason, "RetryInfo" in failed.details) == ("QUOTA_EXCEEDED", False)
    assert "grpc-retry-pushback-ms" not in failed.trailing
    (over,) = failed.details["QuotaFailure"].violations
    assert (over.quota_metric, over.quota_value) == ("tokens_per_minute", 20)
    answer = await caller.post({"prompt": list(range(100, 121)), "max_tokens": 1})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (
        429,
        "insufficient_quota",
        "insufficient_quota",
    )
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert left(await caller.trailing(ids(16)), "tokens")[1] == "0"  # nothing was taken


async def test_running_and_waiting_requests(limited: Limited) -> None:
    engine = limited.front.engine
    caller = limited.caller(running_requests=3, waiting_requests=2)
    engine.pace = asyncio.Semaphore(0)
    streams = [
        limited.front.inference.GenerateStream(prompt(), metadata=caller.metadata)
        for _ in range(2)
    ]
    await until(lambda: engine.in_flight == 2)
    failed = await failure(caller.generate(prompt()))
    assert (failed.reason, failed.metadata["limit"]) == (
        "RATE_LIMIT_EXCEEDED",
        "waiting_requests",
    )
    assert failed.details["RetryInfo"].retry_delay.ToSeconds() == 1
    for _ in streams:
        engine.pace.release()
    for stream in streams:
        assert (await stream.read()).token_ids
    streams.append(limited.front.inference.GenerateStream(prompt(), metadata=caller.metadata))
    await until(lambda: engine.in_flight == 3)
    answer = await caller.post(FOUR)
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    failed = await failure(caller.generate(prompt()))
    assert failed.metadata["limit"] == "running_requests"
    assert (await limited.caller().post({"model": "none", "prompt": "x"})).status_code == 404
    streams.pop().cancel()  # while it waits
    await until(lambda: engine.in_flight == 2)
    engine.pace = None
    await caller.generate(prompt())
    engine_pace = asyncio.Semaphore(100)
    for stream in streams:
        stream.cancel()
    engine.pace = engine_pace
    await until(lambda: engine.in_flight == 0)


async def test_samples_run_each_and_are_one_request(limited: Limited) -> None:
    caller = limited.caller(running_requests=15, requests_per_minute=2, tokens_per_minute=400)
    many = ids(10, 4, output=inference_pb2.OutputOptions(n=16))
    failed = await failure(caller.generate(many))
    assert (failed.reason, failed.metadata["allowed"]) == ("QUOTA_EXCEEDED", "15")
    many.output.n = 15
    found = await caller.trailing(many)
    assert left(found)[1] == "1"
    assert left(found, "tokens")[1] == str(400 - 10 - 15 * 4)


async def test_several_prompts_are_one_request(limited: Limited) -> None:
    caller = limited.caller(requests_per_minute=9, tokens_per_minute=100, running_requests=4)
    body = {"prompt": [list(range(100, 110))] * 3, "max_tokens": 2}
    answer = await caller.post(body)
    assert left(answer.headers)[1] == "8"
    # Headers are sent with the whole answer.
    assert left(answer.headers, "tokens")[1] == str(100 - 3 * 12)
    assert (await caller.post({**body, "n": 2})).status_code == 429  # 6 at once
    many = {"prompt": [list(range(100, 121))] * 4, "max_tokens": 2}
    refused = await caller.post(many)  # none of them begins
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    many["prompt"] = [list(range(100, 126))] * 4
    never = await limited.caller(tokens_per_minute=100).post(many)
    assert never.json()["error"]["code"] == "insufficient_quota"
    assert left((await caller.post(body)).headers, "tokens")[1] == str(100 - 6 * 12)


async def test_a_refused_or_failed_call_gives_back(limited: Limited) -> None:
    engine = limited.front.engine
    caller = limited.caller(requests_per_minute=2, tokens_per_minute=1000, running_requests=1)
    missing = prompt(adapter="none")
    for _ in range(3):
        assert (await failure(caller.generate(missing))).reason == "ADAPTER_NOT_FOUND"
        assert (await failure(caller.generate(ids(60, 60)))).reason == "CONTEXT_TOO_LONG"
        assert (await caller.post({"model": "none", "prompt": "x"})).status_code == 404
        engine.script = [QuotaExceeded("FAKE failure of the engine")]
        await failure(caller.generate(ids(30)))
        engine.script = None
    found = await caller.trailing(ids(10, 4))
    assert (left(found)[1], left(found, "tokens")[1]) == ("1", str(1000 - 14))


async def test_a_stream_that_is_cut_counts_what_came(limited: Limited) -> None:
    engine = limited.front.engine
    caller = limited.caller(role="admin", tokens_per_minute=1000)
    engine.pace = asyncio.Semaphore(0)
    stream = limited.front.inference.GenerateStream(ids(10, 20), metadata=caller.metadata)
    for _ in range(3):
        engine.pace.release()
        assert len((await stream.read()).token_ids) == 1
    stream.cancel()
    await until(lambda: engine.in_flight == 0)
    engine.pace = None
    url = f"http://{limited.front.addresses['openai']}/v1/completions"
    body = {"model": BASE, "prompt": list(range(100, 110)), "max_tokens": 20, "stream": True}
    engine.pace = asyncio.Semaphore(2)
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as http,
        http.stream("POST", url, json=body, headers=caller.headers) as answer,
    ):
        assert left(answer.headers, "tokens")[1] == str(1000 - 13 - 11)
        lines = answer.aiter_lines()
        while not (await anext(lines)).startswith("data"):
            pass
    await until(lambda: engine.in_flight == 0)
    engine.pace = None
    (used,) = (await caller.usage()).tenants
    assert (used.requests, used.prompt_tokens, used.generated_tokens) == (2, 20, 5)
    found = await caller.trailing(ids(1, 1))
    assert left(found, "tokens")[1] == str(1000 - 25 - 2)


@pytest.mark.push
@pytest.mark.parametrize("door", ["grpc", "http"])
async def test_of_a_thousand_at_once_exactly_as_many_as_allowed(
    limited: Limited, door: str
) -> None:
    caller = limited.caller(requests_per_minute=37)
    one = ids(4, 1)

    async def call(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> bool:
        if door == "grpc":
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Generate(one, metadata=caller.metadata)
            code = await call.code()
            allowed = (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert code in allowed, await call.details()
            return bool(code is grpc.StatusCode.OK)
        body = {"model": BASE, "prompt": [100, 101], "max_tokens": 1}
        url = f"http://{limited.front.addresses['openai']}/v1/completions"
        answer = await http.post(url, json=body, headers=caller.headers)
        assert answer.status_code in (200, 429)
        return answer.status_code == 200

    limits = httpx.Limits(max_connections=20)
    address = limited.front.addresses["grpc"]
    apart = [("grpc.use_local_subchannel_pool", 1)]  # each has a connection of its own
    channels = [grpc.aio.insecure_channel(address, options=apart) for _ in range(5)]
    async with httpx.AsyncClient(trust_env=False, timeout=120, limits=limits) as http:
        count = 1000 if door == "grpc" else 200
        told = await asyncio.gather(*(call(http, channels[n % 5]) for n in range(count)))
    for channel in channels:
        await channel.close()
    assert sum(told) == 37


async def test_one_connection_with_many_requests(limited: Limited) -> None:
    caller = limited.caller(requests_per_minute=5)
    url = f"http://{limited.front.addresses['openai']}/v1/completions"
    body = {"model": BASE, "prompt": "Hi", "max_tokens": 1}
    rest = []
    async with httpx.AsyncClient(trust_env=False) as http:
        for _ in range(7):
            answer = await http.post(url, json=body, headers=caller.headers)
            rest.append(
                (answer.status_code, answer.headers[MINUTE.format("remaining", "requests")])
            )
        other = limited.caller()
        answer = await http.post(url, json=body, headers=other.headers)
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
        models = await http.get(url.replace("completions", "models"), headers=caller.headers)
        assert models.status_code == 200, "only requests that generate count"
    assert rest == [(200, str(n)) for n in (4, 3, 2, 1, 0)] + [(429, "0")] * 2


async def test_the_file_is_followed_while_it_is_served(limited: Limited) -> None:
    caller = limited.caller(requests_per_minute=4)
    await caller.generate(prompt())
    await caller.generate(prompt())
    text = limited.file.read_text()
    lower = text.replace("requests_per_minute = 4}", "requests_per_minute = 2}")
    assert lower != text
    limited.file.write_text(lower)
    failed = await failure(caller.generate(prompt()))
    assert (failed.metadata["allowed"], failed.metadata["used"]) == ("2", "2")
    limited.file.write_text(text.replace("requests_per_minute = 4}", "rpm = 2}"))
    failed = await failure(caller.generate(prompt()))  # not valid: the last one stays
    assert failed.metadata["allowed"] == "2"
    limited.file.write_text(text)
    await caller.generate(prompt())
    limited.file.write_text(text.replace("limits = {requests_per_minute = 4}\n", ""))
    assert await caller.trailing(prompt()) == {}


async def test_limits_of_a_tenant_are_shared_by_its_keys(limited: Limited) -> None:
    one = limited.caller(requests_per_minute=10)
    two = limited.caller(tenant=one.tenant)
    limited.append(f"[tenants.{one.tenant}.limits]\nrequests_per_minute = 3\n")
    assert left(await one.trailing(prompt())) == ("3", "2", "20s")
    await two.generate(prompt())
    await two.generate(prompt())
    for caller in (one, two):
        failed = await failure(caller.generate(prompt()))
        assert failed.metadata["account"] == f"tenant:{one.tenant}"
    other = limited.caller()
    assert await other.trailing(prompt()) == {}


async def test_a_key_made_again_begins_anew_and_its_tenant_does_not(limited: Limited) -> None:
    one = limited.caller(requests_per_minute=1)
    limited.append(f"[tenants.{one.tenant}.limits]\nrequests_per_minute = 2\n")
    await one.generate(prompt())
    revoke_key(limited.file, one.id)
    assert (await failure(one.generate(prompt()))).reason == "UNAUTHENTICATED"
    two = limited.caller(tenant=one.tenant, requests_per_minute=1)
    await two.generate(prompt())
    three = limited.caller(tenant=one.tenant)
    failed = await failure(three.generate(prompt()))
    assert failed.metadata["account"] == f"tenant:{one.tenant}"


async def test_defaults_are_for_those_without_limits_of_their_own(limited: Limited) -> None:
    text = limited.file.read_text()
    limited.file.write_text(f"[limits]\nrequests_per_minute = 1\n{text}")
    try:
        plain, own = limited.caller(), limited.caller(requests_per_minute=5)
        free = limited.caller(requests_per_minute="none")
        assert left(await plain.trailing(prompt()))[0] == "1"
        assert left(await own.trailing(prompt()))[0] == "5"
        assert await free.trailing(prompt()) == {}
        await failure(plain.generate(prompt()))
        await limited.caller().generate(prompt())  # each has a limit of its own
    finally:
        limited.file.write_text(text)


async def sdk(limited: Limited, caller: Caller) -> AsyncClient:
    return AsyncClient(limited.front.addresses["grpc"], api_key=caller.key)


async def test_our_client_waits_as_it_is_told(
    limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, waits = limited.caller(requests_per_minute=60), []

    async def sleep(seconds: float) -> None:
        """FAKE sleep: the server's clock goes on."""
        waits.append(seconds)
        limited.clock.now += seconds

    monkeypatch.setattr(aio_connection, "sleep", sleep)
    for _ in range(60):
        await caller.generate(ids(1, 1))
    async with await sdk(limited, caller) as client:
        assert (await client.generate(Text("Hi"), max_tokens=1)).usage.completion_tokens == 1
    assert len(waits) == 1
    assert 1.0 <= waits[0] <= 1.25  # as told, and a little more


async def test_our_client_gives_up_where_waiting_is_long_or_no_use(
    limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleep(seconds: float) -> None:
        pytest.fail("it must not wait")

    monkeypatch.setattr(aio_connection, "sleep", sleep)
    slow, small = limited.caller(requests_per_minute=1), limited.caller(tokens_per_minute=1)
    await slow.generate(prompt())
    async with await sdk(limited, slow) as client:
        with refused(RateLimitExceeded, limit="requests_per_minute") as caught:
            await client.generate(Text("Hi"), max_tokens=1)
        assert caught.value.retry_after_s == 60
    async with await sdk(limited, small) as client:
        with refused(QuotaExceeded, limit="tokens_per_minute"):
            await client.generate(Text("Hello there, you"), max_tokens=1)


async def test_openais_client_knows_what_it_is_told(limited: Limited) -> None:
    rate, quota = limited.caller(requests_per_minute=1), limited.caller(tokens_per_minute=1)
    url = f"http://{limited.front.addresses['openai']}/v1"

    def client(caller: Caller) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(trust_env=False)
        return openai.AsyncOpenAI(
            base_url=url, api_key=caller.key, max_retries=0, http_client=http
        )

    async with client(rate) as sdk_, client(quota) as other:
        raw = await sdk_.completions.with_raw_response.create(model=BASE, prompt="Hi")
        assert left(raw.headers) == ("1", "0", "1m0s")
        with pytest.raises(openai.RateLimitError) as caught:
            await sdk_.completions.create(model=BASE, prompt="Hi")
        assert caught.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.RateLimitError) as caught:
            await other.completions.create(model=BASE, prompt="Hello there, you")
        assert caught.value.code == "insufficient_quota"
