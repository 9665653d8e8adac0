"""openai: the SDK that most of the others are built on."""

from __future__ import annotations

import json
from typing import Any

import openai

from tests.programs.kit import ASK, CALLER, COLOURS, HELLO, KEY, MODEL, PAINT, URL, City

sdk = openai.OpenAI(base_url=URL, api_key=KEY)
ASKED: Any = [{"role": "user", "content": ASK}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint the wall.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": list(COLOURS)}},
            "required": ["colour"],
        },
    },
}


def check_parse_fills_a_pydantic_model() -> None:
    answer = sdk.chat.completions.parse(
        model=MODEL, messages=ASKED, response_format=City, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def check_a_stream_ends_with_the_pydantic_model() -> None:
    with sdk.chat.completions.stream(
        model=MODEL, messages=ASKED, response_format=City, temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(answer.choices[0].message.parsed, City)


def check_responses_whole_parsed_and_streamed() -> None:
    given: Any = {"model": MODEL, "input": HELLO, "max_output_tokens": 8, "temperature": 0}
    whole = sdk.responses.create(**given)
    assert whole.output_text
    text = ""
    with sdk.responses.stream(**given) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
    # `get_final_response` takes an end by max_output_tokens for none.
    assert event.type == f"response.{whole.status}"
    assert text == event.response.output_text == whole.output_text
    parsed = sdk.responses.parse(model=MODEL, input=ASK, text_format=City, temperature=0)
    assert isinstance(parsed.output_parsed, City)


def check_tools_are_called_and_their_results_answered() -> None:
    messages: Any = [{"role": "user", "content": PAINT}]
    first = sdk.chat.completions.create(
        model=CALLER, messages=messages, tools=[TOOL], temperature=0, max_tokens=48
    ).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.tool_calls
    [call] = first.message.tool_calls
    assert call.type == "function"
    assert json.loads(call.function.arguments)["colour"] in COLOURS
    # As the documentation has it: the SDK's message goes back as it came.
    messages += [
        first.message,
        {"role": "tool", "tool_call_id": call.id, "content": "It is painted."},
    ]
    second = sdk.chat.completions.create(
        model=CALLER, messages=messages, tools=[TOOL], temperature=0, max_tokens=12
    ).choices[0]
    assert second.message.content
    assert not second.message.tool_calls


def check_a_stream_of_calls_ends_with_parsed_arguments() -> None:
    with sdk.chat.completions.stream(
        model=CALLER,
        messages=[{"role": "user", "content": PAINT}],
        tools=[TOOL],
        temperature=0,
        max_tokens=48,
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion().choices[0]
    assert {
        "tool_calls.function.arguments.delta",
        "tool_calls.function.arguments.done",
    } <= kinds
    assert answer.message.tool_calls
    assert json.loads(answer.message.tool_calls[0].function.arguments)["colour"] in COLOURS


def check_azures_client() -> None:
    endpoint, given = URL.removesuffix("/v1"), {"max_tokens": 8, "temperature": 0}
    expected = sdk.completions.create(model=MODEL, prompt=HELLO, **given).choices[0].text
    named = openai.AzureOpenAI(azure_endpoint=endpoint, api_version="2024-10-21", api_key=KEY)
    fixed = openai.AzureOpenAI(
        azure_endpoint=endpoint,
        azure_deployment=MODEL,
        api_version="2024-10-21",
        api_key=KEY,
    )
    for azure, model in ((named, MODEL), (fixed, "gpt-4o")):
        answer = azure.completions.create(model=model, prompt=HELLO, **given)
        assert (answer.model, answer.choices[0].text) == (MODEL, expected)
        chat = azure.chat.completions.create(model=model, messages=ASKED, **given, stream=True)
        assert any(chunk.choices[0].delta.content for chunk in chat)
        assert {MODEL, CALLER} <= {each.id for each in azure.models.list()}
    said = ""
    try:
        named.embeddings.create(model=MODEL, input="Hi")
    except openai.NotFoundError as error:
        said = str(error)
    assert "no embeddings" in said
