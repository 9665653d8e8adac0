"""litellm: one call for every provider; ours is its `openai/`."""

from __future__ import annotations

import json
from typing import Any

import litellm

from tests.programs.kit import ASK, CALLER, COLOURS, HELLO, KEY, MODEL, PAINT, URL, City

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint the wall.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": list(COLOURS)}},
            "required": ["colour"],
        },
    },
}


def given(text: str, model: str = MODEL, limit: int = 48) -> Any:
    return {
        "model": f"openai/{model}",
        "api_base": URL,
        "api_key": KEY,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": limit,
    }


def check_completion_and_stream_say_the_same() -> None:
    whole = litellm.completion(**given(HELLO, limit=8)).choices[0].message.content
    assert whole
    stream = litellm.completion(stream=True, **given(HELLO, limit=8))
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == whole


def check_a_pydantic_model() -> None:
    answer = litellm.completion(response_format=City, **given(ASK))
    City.model_validate_json(answer.choices[0].message.content)


def check_forced_calls() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "paint"}}):
        answer = litellm.completion(tools=[TOOL], tool_choice=choice, **given(PAINT))
        for call in answer.choices[0].message.tool_calls:
            assert json.loads(call.function.arguments)["colour"] in COLOURS


def check_a_call_whole_and_streamed_and_its_result() -> None:
    asked = given(PAINT, CALLER)
    message = litellm.completion(tools=[TOOL], **asked).choices[0].message
    [call] = message.tool_calls
    chunks = list(litellm.completion(tools=[TOOL], stream=True, **asked))
    built = litellm.stream_chunk_builder(chunks)
    [streamed] = built.choices[0].message.tool_calls
    assert streamed.function == call.function
    asked["messages"] += [
        message,
        {"role": "tool", "tool_call_id": call.id, "content": "It is painted."},
    ]
    last = litellm.completion(tools=[TOOL], **asked).choices[0].message
    assert last.content
    assert not last.tool_calls


def check_text_completion() -> None:
    asked = given(HELLO, limit=4)
    del asked["messages"]
    asked["model"] = f"text-completion-openai/{MODEL}"
    assert litellm.text_completion(prompt="The sea is", **asked).choices[0].text


def check_a_router_over_base_and_adapter() -> None:
    """An error of one model puts no other into its cool-down."""
    models = {"base": MODEL, "adapter": CALLER, "gone": "gone"}
    router = litellm.Router(
        model_list=[
            {
                "model_name": name,
                "litellm_params": {"model": f"openai/{of}", "api_base": URL, "api_key": KEY},
            }
            for name, of in models.items()
        ],
        num_retries=0,
    )
    asked: Any = {"messages": [{"role": "user", "content": HELLO}], "max_tokens": 4}
    try:
        router.completion(model="gone", **asked)
    except litellm.NotFoundError:
        pass
    else:
        raise AssertionError("a model that is not there has answered")
    for name in ("base", "adapter"):
        assert router.completion(model=name, **asked).choices[0].message.content
