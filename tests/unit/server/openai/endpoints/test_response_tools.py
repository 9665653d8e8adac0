"""Tools and thinking in ``/v1/responses``: items and events, by OpenAI's own client too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from pydantic import BaseModel
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.openai.endpoints.response_kit import (
    ASK,
    assembled,
    respond,
    same,
    shape,
    streamed,
)
from tests.unit.server.openai.kit import CHAT, error_of, ok
from tests.unit.server.openai.tool_kit import (
    CLOCK,
    TEMPLATES,
    WEATHER,
    long_context,
    outputs,
)
from tests.unit.server.rpc.front_harness import Front, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOOLS = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]
GIVEN: dict[str, Any] = {"tools": TOOLS, "max_output_tokens": None}
SHOWN = [{"description": None, "parameters": None, **tool, "strict": False} for tool in TOOLS]
PARIS = '{"city": "Paris"}'
BOTH = [("function_call", PARIS), ("function_call", "{}")]
CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
WRITTEN = {
    "hermes": CALLS,
    "llama3_json": '{"name": "weather", "parameters": {"city": "Paris"}}; '
    '{"name": "clock", "parameters": {}}',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, '
    '{"name": "clock", "arguments": {}}]',
}
FORCED = f'[{{"name": "weather", "arguments": {PARIS}}},{{"name": "clock", "arguments": {{}}}}]'
THINKS = (
    "{{ tools | tojson if tools }}<tool_call><think>{% for m in messages %}<{{ m.role }}>"
    "{{ m.reasoning_content }}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "{{ m.tool_call_id }}{% endfor %}"
)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _long(front: Front) -> AsyncIterator[None]:
    async with long_context(front):
        yield


def says(front: Front, tokenizer: TextTokenizer, text: str, finish: str = "stop") -> None:
    front.engine.script = list(outputs(tokenizer, text, finish))


async def both(http: httpx.AsyncClient, **given: Any) -> dict[str, Any]:
    """A response that is the same whole and streamed."""
    whole = await respond(http, **given)
    events = await streamed(http, **given)
    assert same(events[-1]["response"]) == same(whole)
    made = [(item["type"], item["text"]) for item in assembled(events)]
    assert made == shape(whole)
    return whole


@pytest.mark.parametrize("family", WRITTEN)
async def test_calls_are_items(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path, family: str
) -> None:
    await front.push(make_adapter(tmp_path, template=TEMPLATES[family]), "fam")
    given = {**GIVEN, "model": "fam"}
    says(front, tokenizer, WRITTEN[family])
    response = await both(http, **given)
    assert (response["status"], shape(response)) == ("completed", BOTH)
    assert [item["name"] for item in response["output"]] == ["weather", "clock"]
    assert len({item["call_id"] for item in response["output"]}) == 2
    assert {item["status"] for item in response["output"]} == {"completed"}
    assert response["tools"] == SHOWN
    only = await both(http, **given, parallel_tool_calls=False)
    assert shape(only) == BOTH[:1]
    assert only["parallel_tool_calls"] is False
    await respond(http, **{**given, "max_output_tokens": 1}, tool_choice="none")
    assert "weather" not in tokenizer.decode(front.engine.submitted[-1].prompt)


async def test_the_template_sees_tools_as_in_a_chat(
    front: Front, http: httpx.AsyncClient
) -> None:
    await ok(http, CHAT, tools=[WEATHER, CLOCK])
    expected = front.engine.submitted[-1].prompt
    await respond(http, tools=[{**tool, "strict": None} for tool in TOOLS])
    assert front.engine.submitted[-1].prompt == expected


@pytest.mark.parametrize(
    ("choice", "written", "expected"),
    [
        ("required", FORCED, BOTH),
        ({"type": "function", "name": "weather"}, PARIS, BOTH[:1]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "clock"}],
            },
            '[{"name": "clock", "arguments": {}}]',
            BOTH[1:],
        ),
    ],
)
async def test_a_call_can_be_forced(
    front: Front,
    http: httpx.AsyncClient,
    tokenizer: TextTokenizer,
    choice: Any,
    written: str,
    expected: list[tuple[str, str]],
) -> None:
    says(front, tokenizer, written)
    response = await both(http, **GIVEN, tool_choice=choice)
    assert (response["status"], shape(response)) == ("completed", expected)
    assert response["tool_choice"] == choice
    assert front.engine.submitted[-1].constraint is not None


async def test_an_answer_repeats_what_was_read_alone(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    """Several events of each stream repeat it."""
    much = {"x": "y" * 200_000}
    says(front, tokenizer, PARIS)
    choice = {"type": "function", "name": "weather"}
    tools = [{**tool, **much} for tool in TOOLS]
    response = await both(http, **{**GIVEN, "tools": tools}, tool_choice={**choice, **much})
    assert (response["tools"], response["tool_choice"]) == (SHOWN, choice)
    # A tool that is not shown to the model costs no tokens.
    long = {"name": "f", "description": "y" * (128 << 10)}
    for how in ("none", "auto"):
        given = {**ASK, "tools": [long], "tool_choice": how}
        answer = await http.post("/v1/responses", json=given)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "tools")


async def test_a_call_that_is_cut_is_incomplete(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    says(front, tokenizer, CALLS[:60], "length")
    response = await both(http, **GIVEN)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    [call] = response["output"]
    assert (call["type"], call["status"]) == ("function_call", "incomplete")
    assert PARIS.startswith(call["arguments"])


@pytest.mark.parametrize("answer", ["\n\n", "", "It is 😀.\n", "\n "])
async def test_thinking_text_and_calls_are_items_of_their_own(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path, answer: str
) -> None:
    await front.push(make_adapter(tmp_path, template=THINKS), "thinker")
    given = {**GIVEN, "model": "thinker"}
    thought = "\nHm… 😀\n"
    says(front, tokenizer, f"<think>{thought}</think>{answer}{CALLS}")
    response = await both(http, **given)
    texts = [("message", answer)] if answer.strip() else []
    assert shape(response) == [("reasoning", thought), *texts, *BOTH]
    ids = tokenizer.encode(thought, add_special_tokens=False)
    details = response["usage"]["output_tokens_details"]
    assert 0 < details["reasoning_tokens"] <= len(ids) + 3
    chat = await ok(http, {**CHAT, "model": "thinker", "max_tokens": None}, tools=[WEATHER])
    assert chat["usage"]["completion_tokens_details"] == details
    # Without calls, blanks are text.
    says(front, tokenizer, f"<think>{thought}</think>{answer}", "length")
    response = await both(http, **given)
    texts = [("message", answer)] if answer else []
    assert shape(response) == [("reasoning", thought), *texts]
    states = ["completed", "incomplete"] if answer else ["incomplete"]
    assert [item["status"] for item in response["output"]] == states
    hidden = await both(http, **given, include_reasoning=False)
    assert shape(hidden) == (texts or [("message", "")])
    assert hidden["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    says(front, tokenizer, "", "stop")


@pytest.mark.parametrize("together", [1, 2, 7])
@pytest.mark.parametrize("show", [True, False])
async def test_scores_are_of_the_text_alone(
    front: Front,
    http: httpx.AsyncClient,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    together: int,
    show: bool,
) -> None:
    await front.push(make_adapter(tmp_path, template=THINKS), "thinker")
    text = " It is 😀 warm."
    ids = tokenizer.encode(f"<think>Hm</think>{text}", add_special_tokens=False)
    outs = []
    for at in range(0, len(ids), together):
        tokens = ids[at : at + together]
        finish: Any = "stop" if at + together >= len(ids) else None
        scores = [-token / 1e5 for token in tokens]
        outs.append(SequenceOutput(1, tokens, logprobs=scores, finish=finish))
    front.engine.script = list(outs)
    include = ["message.output_text.logprobs"]
    given = {**GIVEN, "model": "thinker", "include": include, "include_reasoning": show}
    response = await both(http, **given)
    message = response["output"][-1]
    logprobs = message["content"][0]["logprobs"]
    data = b"".join(bytes(score["bytes"]) for score in logprobs)
    assert data.decode() == text
    events = await streamed(http, **given)
    assert assembled(events)[-1]["logprobs"] == logprobs


async def test_items_go_back_as_they_came(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path, template=THINKS), "thinker")
    says(front, tokenizer, f"<think>Hm</think>Look.{CALLS}")
    given = {**GIVEN, "model": "thinker"}
    said = (await respond(http, **given))["output"]
    calls = [item for item in said if item["type"] == "function_call"]
    ids = [call["call_id"] for call in calls]
    says(front, tokenizer, "Warm.")
    await respond(
        http,
        **given,
        input=[
            {"role": "user", "content": "Hi"},
            *said,
            {"type": "function_call_output", "call_id": ids[0], "output": "sunny"},
            {
                "type": "function_call_output",
                "call_id": ids[1],
                "output": [{"type": "input_text", "text": "noon"}],
            },
            {"role": "user", "content": "And?"},
        ],
    )
    prompt = front.engine.submitted[-1].prompt
    turn = {
        "role": "assistant",
        "content": "Look.",
        "reasoning_content": "Hm",
        "tool_calls": [
            {
                "id": call["call_id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in calls
        ],
    }
    chat = {**CHAT, "model": "thinker", "max_tokens": None, "tools": [WEATHER, CLOCK]}
    messages = [
        {"role": "user", "content": "Hi"},
        turn,
        {"role": "tool", "tool_call_id": ids[0], "content": "sunny"},
        {"role": "tool", "tool_call_id": ids[1], "content": "noon"},
        {"role": "user", "content": "And?"},
    ]
    await ok(http, chat, messages=messages)
    assert front.engine.submitted[-1].prompt == prompt
    assert "Hm" in tokenizer.decode(prompt)


async def test_effort_reaches_the_template(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    template = "{{ reasoning_effort }} {{ enable_thinking }} {{ x }}{{ messages[0].content }}"
    await front.push(make_adapter(tmp_path, template=template), "thinker")
    response = await respond(
        http,
        model="thinker",
        reasoning={"effort": "high", "summary": "auto"},
        chat_template_kwargs={"x": "y"},
    )
    assert tokenizer.decode(front.engine.submitted[-1].prompt) == "high True yHi"
    assert response["reasoning"] == {"effort": "high", "summary": None}


class Weather(BaseModel):
    """Weather at a place."""

    city: str


@pytest.mark.parametrize("strict", [False, True])
async def test_openais_client_calls_tools(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, strict: bool
) -> None:
    tool: Any = {**TOOLS[0], "strict": strict}
    if strict:
        tool = openai.pydantic_function_tool(Weather, name="weather")["function"]
        tool = {"type": "function", **tool}
    says(front, tokenizer, "Let me look.\n" + CALLS)
    async with AsyncOpenAI(
        base_url=f"http://{front.addresses['openai']}/v1",
        api_key="unused",
        max_retries=0,
        http_client=httpx.AsyncClient(trust_env=False),
    ) as client:
        whole = await client.responses.create(model=ASK["model"], input="Hi", tools=[tool])
        assert whole.output_text == "Let me look.\n"
        call = whole.output[1]
        assert call.type == "function_call"
        assert (call.name, call.arguments) == ("weather", PARIS)
        async with client.responses.stream(
            model=ASK["model"], input="Hi", tools=[tool]
        ) as stream:
            arguments = [
                event.delta
                async for event in stream
                if event.type == "response.function_call_arguments.delta"
                and event.output_index == 1
            ]
            final = await stream.get_final_response()
        assert "".join(arguments) == PARIS
        streamed_call = final.output[1]
        assert streamed_call.type == "function_call"
        assert streamed_call.arguments == PARIS
        parsed = {"city": "Paris"} if strict else None
        assert streamed_call.parsed_arguments == parsed
        history: list[Any] = [{"role": "user", "content": "Hi"}]
        history += [item.model_dump() for item in whole.output]
        history.append(
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        )
        says(front, tokenizer, "Sunny.")
        again = await client.responses.create(model=ASK["model"], input=history, tools=[tool])
        assert again.output_text == "Sunny."
        assert "sunny" in tokenizer.decode(front.engine.submitted[-1].prompt)
