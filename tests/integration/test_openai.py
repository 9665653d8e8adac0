"""The OpenAI-compatible gateway on the real base, driven by the `openai` SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2

from tests.server_harness import Server

pytestmark = [pytest.mark.real_base, pytest.mark.asyncio(loop_scope="session")]

BASE = "smollm2-135m"
PROMPT = "The capital of France is"
MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]


@pytest_asyncio.fixture(loop_scope="session")
async def sdk(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{server.openai}/v1",
        api_key="ignored",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


async def test_models_are_the_base_and_the_adapters(
    sdk: openai.AsyncOpenAI, real_adapters: dict[str, Any]
) -> None:
    models = [model async for model in await sdk.models.list()]
    names = [model.id for model in models]
    assert names[0] == BASE
    assert names[1:] == sorted(names[1:])
    assert set(real_adapters) <= set(names)
    one = await sdk.models.retrieve("rank-16")
    assert one.model_dump()["parent"] == BASE
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("rank-17")


async def test_a_chat_with_an_adapter_whole_and_streamed(
    server: Server, sdk: openai.AsyncOpenAI
) -> None:
    request = adapters_pb2.GetAdapterRequest(name="rank-16")
    adapter = (await server.adapters.GetAdapter(request)).adapter
    texts = {}
    for model in (BASE, "rank-16", f"rank-16@{adapter.revision[:12]}"):
        raw = await sdk.chat.completions.with_raw_response.create(
            model=model, messages=MESSAGES, temperature=0, max_tokens=12
        )
        whole = raw.parse()
        texts[model] = whole.choices[0].message.content
        assert raw.headers.get("veneer-revision") == (
            None if model == BASE else adapter.revision
        )
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 12
    assert texts[BASE] != texts["rank-16"] == texts[f"rank-16@{adapter.revision[:12]}"]

    stream = await sdk.chat.completions.create(
        model="rank-16",
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == texts["rank-16"]
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 12


async def test_completions_say_what_grpc_says(server: Server, sdk: openai.AsyncOpenAI) -> None:
    given = {"logprobs": True, "echo": True, "top_logprobs": 2}
    grpc = await server.generate(
        prompt=PROMPT, adapter="rank-16", output=given, stopping={"max_tokens": 8}
    )
    answer = await sdk.completions.create(
        model="rank-16", prompt=PROMPT, temperature=0, max_tokens=8, logprobs=2, echo=True
    )
    choice = answer.choices[0]
    assert choice.text == grpc.text
    assert choice.text.startswith(PROMPT)
    found = choice.logprobs
    assert found is not None
    expected = [entry.logprob for entry in (*grpc.prompt_logprobs, *grpc.logprobs)]
    assert found.token_logprobs is not None
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=0.05)
    assert found.tokens is not None
    assert "".join(found.tokens).removesuffix("<|im_end|>") == choice.text
    assert found.top_logprobs is not None
    assert all(2 <= len(tops) <= 3 for tops in found.top_logprobs[1:])

    ids = [4504, 3575, 282, 4649, 314]
    both = await sdk.completions.create(
        model=BASE, prompt=[ids, ids[:3]], temperature=0, max_tokens=4
    )
    assert [choice.index for choice in both.choices] == [0, 1]
    streamed = ["", ""]
    async for chunk in await sdk.completions.create(
        model=BASE, prompt=[ids, ids[:3]], temperature=0, max_tokens=4, stream=True
    ):
        for piece in chunk.choices:
            streamed[piece.index] += piece.text
    assert all(streamed)


async def test_chat_logprobs_samples_and_penalties(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model="rank-4",
        messages=MESSAGES,
        n=3,
        seed=5,
        temperature=1,
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"17": -100},
        extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 18
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 6
        for entry in choice.logprobs.content:
            tops = [top.logprob for top in entry.top_logprobs]
            assert len(tops) == 3
            assert tops == sorted(tops, reverse=True)
            assert entry.logprob <= tops[0]


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "warm": {"type": "boolean"},
    },
    "required": ["colour", "warm"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", [BASE, "rank-16"])
async def test_output_follows_a_schema_a_regex_and_a_choice(
    sdk: openai.AsyncOpenAI, model: str
) -> None:
    async def ask(**constraint: Any) -> str:
        answer = await sdk.chat.completions.create(
            model=model, messages=MESSAGES, seed=1, max_tokens=64, **constraint
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content or ""

    schema: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}
    as_json, by_regex, by_choice = await asyncio.gather(
        ask(response_format=schema),
        ask(extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}),
        ask(extra_body={"guided_choice": ["yes", "no"]}),
    )
    parsed = json.loads(as_json)
    assert set(parsed) == {"colour", "warm"}
    assert parsed["colour"] in ("red", "green", "blue")
    assert isinstance(parsed["warm"], bool)
    assert by_regex.isascii()
    assert by_regex.isdigit()
    assert len(by_regex) == 3
    assert by_choice in ("yes", "no")


async def test_errors_are_the_sdks_own(sdk: openai.AsyncOpenAI) -> None:
    async def ask(**fields: Any) -> None:
        given = {"model": BASE, "messages": MESSAGES, "max_tokens": 4, **fields}
        await sdk.chat.completions.create(**given)

    # Over HTTP an error has no metadata: the hint is in the message only.
    with pytest.raises(openai.NotFoundError, match="did you mean 'rank-") as missing:
        await ask(model="rank-61")
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    for fields, param in (
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await ask(**fields)
        assert refused.value.param == param
    with pytest.raises(openai.BadRequestError) as unknown:
        await ask(extra_body={"temprature": 1})
    assert "did you mean 'temperature'?" in str(unknown.value)
    raw = await sdk.chat.completions.with_raw_response.create(
        model=BASE, messages=MESSAGES, max_tokens=1, extra_body={"frob": 1}
    )
    assert raw.headers["veneer-ignored"] == "frob"


async def test_a_client_that_leaves_ends_its_work(
    server: Server, sdk: openai.AsyncOpenAI
) -> None:
    cancelled = 'finish_reason="cancelled"'
    before = (await server.metric("veneer_requests_total")).get(cancelled, 0)

    async def begin(max_tokens: int) -> tuple[Any, Any]:
        stream = await sdk.completions.create(
            model="rank-16",
            prompt=PROMPT,
            max_tokens=max_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = aiter(stream)
        await anext(chunks)
        return stream, chunks

    async def ended_and_running() -> tuple[float, float]:
        ended = (await server.metric("veneer_requests_total")).get(cancelled, 0)
        running = (await server.metric("veneer_num_requests_running"))[""]
        return ended - before, running

    leaves, _ = await begin(2000)
    stays, chunks = await begin(200)
    await leaves.close()
    # Only the other one is left, and long before its end: else this has no next chunk.
    while await ended_and_running() != (1, 1):
        await anext(chunks)
    await stays.close()
