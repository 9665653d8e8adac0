"""anthropic: Anthropic's SDK, over ``/v1/messages``."""

from __future__ import annotations

from typing import Any

from anthropic import Anthropic, BadRequestError, beta_tool

from tests.programs.kit import ASK, CALLER, COLOURS, HELLO, KEY, MODEL, PAINT, URL, City

SDK = Anthropic(base_url=URL.removesuffix("/v1"), api_key=KEY)
TOOL: Any = {
    "name": "paint",
    "description": "Paint the wall.",
    "input_schema": {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": list(COLOURS)}},
        "required": ["colour"],
    },
}


def asked(text: str = HELLO, model: str = MODEL, **more: Any) -> dict[str, Any]:
    """The SDK has no temperature since its version 2."""
    turns = [{"role": "user", "content": text}]
    greedy = {"temperature": 0}
    return {"model": model, "max_tokens": 48, "messages": turns, "extra_body": greedy, **more}


def check_create_and_stream_say_the_same() -> None:
    whole = SDK.messages.create(**asked(max_tokens=8, system="Be brief."))
    assert whole.content[0].text
    assert whole.stop_reason in ("max_tokens", "end_turn")
    with SDK.messages.stream(**asked(max_tokens=8, system="Be brief.")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    counted = final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)
    assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert final.usage.output_tokens == whole.usage.output_tokens > 0


def check_a_tool_is_called_and_its_result_read() -> None:
    given = asked(PAINT, CALLER, tools=[TOOL])
    called = SDK.messages.create(**given)
    with SDK.messages.stream(**given) as stream:
        streamed = stream.get_final_message()
    for message in (called, streamed):
        assert message.stop_reason == "tool_use"
        *_, call = message.content
        assert call.type == "tool_use"
        assert call.input["colour"] in COLOURS
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Done."}
        turns = [
            *given["messages"],
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        answer = SDK.messages.create(**{**given, "messages": turns})
        assert answer.content[0].type == "text"
        assert answer.content[0].text


def check_the_tool_runner_calls_and_goes_on() -> None:
    """It asks for a thread on the server first, and does without where there is none."""
    for streamed in (False, True):
        called = list[str]()

        @beta_tool
        def paint(colour: str) -> str:
            """Paint the wall."""
            called.append(colour)  # noqa: B023 - it is called in this iteration only
            return f"It is {colour} now."

        given: Any = asked(PAINT, CALLER, tools=[paint])
        if streamed:
            for stream in SDK.beta.messages.tool_runner(**given, stream=True):
                last = stream.get_final_message()
        else:
            last = SDK.beta.messages.tool_runner(**given).until_done()
        assert called
        assert set(called) <= set(COLOURS)
        assert last.content[0].type == "text"
        assert last.content[0].text


def check_a_forced_call_of_the_base() -> None:
    choice = {"type": "tool", "name": "paint"}
    message = SDK.messages.create(**asked(PAINT, tools=[TOOL], tool_choice=choice))
    [call] = message.content
    assert call.type == "tool_use"
    assert call.input["colour"] in COLOURS


def check_tokens_are_counted_and_models_listed() -> None:
    given = asked(ASK, system="Be brief.", tools=[TOOL])
    usage = SDK.messages.create(**given).usage
    prompt = {name: given[name] for name in ("model", "messages", "system", "tools")}
    counted = SDK.messages.count_tokens(**prompt).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    models = {model.id: model for model in SDK.models.list()}
    assert {MODEL, CALLER} <= models.keys()
    assert models[MODEL].display_name == MODEL
    assert models[MODEL].created_at.year > 2000
    assert SDK.models.retrieve(CALLER).id == CALLER


def check_parse_a_type() -> None:
    message = SDK.messages.parse(**asked(ASK), output_format=City)
    assert isinstance(message.parsed_output, City)


def check_an_error_names_the_field() -> None:
    picture = {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}
    said = ""
    try:
        SDK.messages.create(**asked(messages=[{"role": "user", "content": [picture]}]))
    except BadRequestError as error:
        said = str(error)
    assert "messages[0].content[0].type" in said
