"""``/v1/responses``, by OpenAI's own client and over the wire."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAIError
from openai.types.responses import Response
from veneer_registry.errors import EngineFailed
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.openai.endpoints.response_kit import ASK, respond, same, streamed
from tests.unit.server.openai.kit import CHAT, error_of, ok
from tests.unit.server.rpc.fake_engine import CONTEXT
from tests.unit.server.rpc.front_harness import Front, make_adapter, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

LABELS = ("user", "safety_identifier", "prompt_cache_key")
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}


async def test_a_response_is_the_chats_answer(front: Front, http: httpx.AsyncClient) -> None:
    chat = await ok(http, CHAT, seed=3)
    prompt = front.engine.submitted[-1].prompt
    response = await respond(http, seed=3, metadata={"a": "b"}, store=True)
    assert front.engine.submitted[-1].prompt == prompt
    [item] = response["output"]
    [part] = item["content"]
    assert part["text"] == chat["choices"][0]["message"]["content"]
    assert (item["type"], item["role"], item["status"]) == (
        "message",
        "assistant",
        "incomplete",
    )
    assert (response["object"], response["status"]) == ("response", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"] == {
        "input_tokens": chat["usage"]["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": chat["usage"]["total_tokens"],
    }
    assert (response["metadata"], response["store"]) == ({"a": "b"}, True)
    front.engine.script = [SequenceOutput(1, [1000], finish="stop")]
    whole = await respond(http)
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)
    assert whole["output"][0]["status"] == "completed"


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("scores", [False, True])
async def test_a_stream_ends_with_the_whole_response(
    front: Front, http: httpx.AsyncClient, finish: Any, scores: bool
) -> None:
    more: dict[str, Any] = {"seed": 3, "instructions": "Be brief."}
    if scores:
        more |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    if finish == "stop":
        front.engine.script = [
            SequenceOutput(
                1,
                [1000 + at],
                logprobs=[-0.5] if scores else None,
                top_logprobs=[[(1000 + at, -0.5), (2000, -2.0)]] if scores else None,
                finish="stop" if at == 3 else None,
            )
            for at in range(4)
        ]
    whole = await respond(http, **more)
    events = await streamed(http, **more)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    state = "completed" if finish == "stop" else "incomplete"
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        state,
    ]
    last = events[-1]["response"]
    Response.model_validate(last)
    assert same(last) == same(whole)
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(event["delta"] for event in deltas) == text
    logprobs = [score for event in deltas for score in event["logprobs"]]
    assert logprobs == whole["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == (4 if scores else 0)
    created, part = events[0]["response"], events[3]["part"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert (part["type"], part["text"]) == ("output_text", "")
    done = {event["type"]: event for event in events}
    assert done["response.output_text.done"]["text"] == text
    assert done["response.output_item.done"]["item"] == last["output"][0]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1


async def test_items_are_messages(front: Front, http: httpx.AsyncClient) -> None:
    said = (await respond(http))["output"]
    text = said[0]["content"][0]["text"]
    await ok(
        http,
        CHAT,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "And?"},
        ],
    )
    expected = front.engine.submitted[-1].prompt
    await respond(
        http,
        instructions="Be brief.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            *said,
            {"type": "message", "role": "user", "content": "And?", "id": None},
        ],
    )
    assert front.engine.submitted[-1].prompt == expected


async def test_a_schema_is_a_constraint(front: Front, http: httpx.AsyncClient) -> None:
    shown = {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}
    response = await respond(http, text={"format": shown})
    constraint = front.engine.submitted[-1].constraint
    assert (constraint.kind, json.loads(constraint.text)) == ("json_schema", SCHEMA)
    assert response["text"]["format"] == shown
    await respond(http, text={"format": {"type": "json_object"}})
    assert json.loads(front.engine.submitted[-1].constraint.text) == {"type": "object"}
    await respond(http, text={"format": {"type": "text"}, "verbosity": "medium"})
    assert front.engine.submitted[-1].constraint is None


async def test_openais_client_streams_and_parses(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path / "a"), "style")
    async with AsyncOpenAI(
        base_url=f"http://{front.addresses['openai']}/v1",
        api_key="unused",
        max_retries=0,
        http_client=httpx.AsyncClient(trust_env=False),
    ) as client:
        whole = await client.responses.create(
            model="style", input="Hi", max_output_tokens=4, temperature=0.5, top_p=0.5
        )
        assert whole.output_text
        assert (whole.model, whole.temperature, whole.top_p) == ("style", 0.5, 0.5)
        raw = await client.responses.with_raw_response.create(
            model="style", input="Hi", max_output_tokens=4
        )
        assert raw.headers["veneer-revision"]
        front.engine.script = [
            SequenceOutput(1, [1000]),
            SequenceOutput(1, [1001], finish="stop"),
        ]
        async with client.responses.stream(
            model="style", input="Hi", max_output_tokens=4, store=False
        ) as stream:
            text = "".join(
                [e.delta async for e in stream if e.type == "response.output_text.delta"]
            )
            assert (await stream.get_final_response()).output_text == text
        front.engine.script = None
        # Its helper has no final response of one that was cut, also from OpenAI.
        async with client.responses.stream(
            model="style", input="Hi", max_output_tokens=4
        ) as stream:
            events = [event async for event in stream]
            assert events[-1].type == "response.incomplete"
            assert events[-1].response.output_text
            with pytest.raises(RuntimeError) as none:
                await stream.get_final_response()
            assert not isinstance(none.value, OpenAIError)
        with pytest.raises(NotFoundError) as missing:
            await client.responses.create(model="nosuch", input="Hi")
        assert missing.value.code == "model_not_found"


async def test_a_stream_that_fails_says_so(front: Front, http: httpx.AsyncClient) -> None:
    front.engine.script = [SequenceOutput(1, [1000]), EngineFailed("it ended; retry")]
    *_, delta, error, failed = await streamed(http)
    assert delta["type"] == "response.output_text.delta"
    assert (error["type"], error["code"]) == ("error", "engine_failed")
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    Response.model_validate(failed["response"])


def item(**members: Any) -> dict[str, Any]:
    return {"input": [members]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"input": [{"role": "user"}] * 4097}, "input"),
        (item(role="user"), "input[0].content"),
        (item(role="tool", content="x"), "input[0].role"),
        (item(role=["user"], content="x"), "input[0].role"),
        (item(role="user", content=[{"type": "input_image", "image_url": "x"}]), None),
        (item(role="user", content=[{"type": ["input_text"], "text": "x"}]), None),
        (item(role="user", content=[{"type": "input_text"}]), "input[0].content[0].text"),
        (item(type="item_reference", id=1), "input[0]"),
        (item(type="function_call_output", output="x"), "input[0].call_id"),
        (item(type="function_call_output", call_id="1", output=1), "input[0].output"),
        (item(type="function_call", call_id="1", name="f"), "input[0].arguments"),
        (item(type="function_call", call_id="1", name="f", arguments={}), "input[0].arguments"),
        (item(type="reasoning", content="x"), "input[0].content"),
        (item(type="reasoning", content=[{"type": "reasoning_text"}]), "input[0].content[0]"),
        (item(type="web_search_call", id="1"), "input[0]"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}},
            "tool_choice.type",
        ),
        ({"tools": [{"type": ["custom"], "name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"name": "f", "parameters": "{}"}]}, "tools[0].parameters"),
        ({"tools": [{"name": "f"}], "tool_choice": "every"}, "tool_choice"),
        ({"tools": [{"name": "f"}], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        (
            {"tools": [{"name": "f"}], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice",
        ),
        (
            {"tools": [{"name": "f"}], "tool_choice": {"type": "allowed_tools", "tools": []}},
            "tool_choice.mode",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"truncation": "some"}, "truncation"),
        ({"reasoning": {"effort": "very"}}, "reasoning.effort"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        (
            {"text": {"verbosity": "low"}, "chat_template_kwargs": {"verbosity": "high"}},
            "text.verbosity",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"metadata": {"x" * 65: "a"}}, "metadata"),
        ({"metadata": {str(at): "a" for at in range(17)}}, "metadata"),
        *(({name: "x" * 65}, name) for name in LABELS),
        ({"text": {"format": {"type": "text", "name": "x" * 65}}}, "text.format.name"),
        ({"text": {"format": {"description": "x" * 4097}}}, "text.format.description"),
        ({"max_tool_calls": 1 << 31}, "max_tool_calls"),
        ({"temperature": 1000}, "temperature"),
        ({"messages": [1]}, "messages"),
    ],
)
async def test_a_bad_field_is_named(
    front: Front, http: httpx.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    answer = await http.post("/v1/responses", json={**ASK, **fields})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == (param or "input[0].content[0]")
    assert not front.engine.submitted


async def test_what_a_response_repeats_is_short(front: Front, http: httpx.AsyncClient) -> None:
    """As long as OpenAI takes it; each event with a response has it."""
    given: dict[str, Any] = dict.fromkeys(LABELS, "é" * 64)
    given["metadata"] = {f"{at:064}": "é" * 512 for at in range(16)}
    response = await respond(http, **given)
    assert {name: response[name] for name in given} == given
    for event in await streamed(http, **given):
        if "response" in event:
            assert {name: event["response"][name] for name in given} == given


async def test_neutral_fields_pass(http: httpx.AsyncClient) -> None:
    """What SDKs send although it has no effect."""
    await respond(
        http,
        tools=[],
        tool_choice="auto",
        include=["reasoning.encrypted_content"],
        reasoning={"effort": None, "summary": "auto"},
        parallel_tool_calls=True,
        previous_response_id=None,
        truncation="disabled",
        background=False,
        text={"format": None},
        service_tier="auto",
        user="me",
        prompt_cache_key="x",
    )


async def test_a_conversation_that_is_too_long_loses_its_oldest_turns(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    said = [
        {"role": "user" if at % 2 == 0 else "assistant", "content": f"Say {at} again."}
        for at in range(7)
    ]
    long = {"instructions": "Be brief.", "input": said, "max_output_tokens": 4}
    refused = await http.post("/v1/responses", json={**ASK, **long})
    assert error_of(refused)["code"] == "context_length_exceeded"
    response = await respond(http, **long, truncation="auto")
    assert response["truncation"] == "auto"
    [request] = front.engine.submitted
    assert len(request.prompt) + 4 <= CONTEXT
    prompt = tokenizer.decode(request.prompt)
    assert "Be brief." in prompt
    assert "Say 6" in prompt
    assert "Say 0" not in prompt
    # As many of the latest turns as fit: with one more it would be refused.
    [first] = [at for at in range(0, 7, 2) if f"Say {at}" in prompt][:1]
    more = {**long, "input": said[first - 2 :]}
    refused = await http.post("/v1/responses", json={**ASK, **more})
    assert error_of(refused)["code"] == "context_length_exceeded"
    # One turn is not cut in two.
    alone = {**long, "input": "long " * CONTEXT, "truncation": "auto"}
    refused = await http.post("/v1/responses", json={**ASK, **alone})
    assert error_of(refused)["code"] == "context_length_exceeded"


async def test_one_that_is_too_long_is_refused(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/responses", json={**ASK, "input": "long " * CONTEXT})
    assert error_of(answer)["code"] == "context_length_exceeded"


async def test_a_reader_that_leaves_ends_it(front: Front, http: httpx.AsyncClient) -> None:
    front.engine.pace = asyncio.Semaphore(1)
    body = {**ASK, "stream": True}
    async with http.stream("POST", "/v1/responses", json=body) as answer:
        assert answer.status_code == 200
        async for _ in answer.aiter_lines():
            break
    await until(lambda: front.engine.in_flight == 0)
    assert front.engine.cancelled == 1
