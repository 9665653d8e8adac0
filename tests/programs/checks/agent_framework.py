"""Microsoft Agent Framework: agents over chats, and over its default, Responses."""

from __future__ import annotations

from typing import Any

from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient

from tests.programs.kit import CALLER, COLOURS, HELLO, KEY, MODEL, PAINT, URL, Colour

CALLED = list[str]()
KINDS: Any = {"chats": OpenAIChatCompletionClient, "responses": OpenAIChatClient}


def paint(colour: Colour) -> str:
    """Paint the wall."""
    CALLED.append(colour)
    return f"It is {colour} now."


def agent(kind: str, model: str = MODEL, **more: Any) -> Any:
    client = KINDS[kind](model=model, base_url=URL, api_key=KEY)
    options = {"temperature": 0, "max_tokens": 48}
    return client.as_agent(name="a", default_options=options, **more)


async def says(asked: Any, text: str) -> str:
    stream = asked.run(text, stream=True)
    assert [part async for part in stream]
    return str((await stream.get_final_response()).text)


async def check_whole_and_streamed_say_the_same() -> None:
    for kind in KINDS:
        whole = (await agent(kind).run(HELLO)).text
        assert whole
        assert await says(agent(kind), HELLO) == whole


async def check_a_tool_is_called_and_its_result_read() -> None:
    """Over Responses the result goes alone, with `previous_response_id`."""
    for kind in KINDS:
        CALLED.clear()
        assert (await agent(kind, CALLER, tools=[paint]).run(PAINT)).text
        assert CALLED
        assert set(CALLED) <= set(COLOURS)
        CALLED.clear()
        assert await says(agent(kind, CALLER, tools=[paint]), PAINT)
        assert CALLED


async def check_a_session_has_two_turns() -> None:
    for kind in KINDS:
        asked = agent(kind)
        session = asked.create_session()
        for text in (HELLO, "And again."):
            assert (await asked.run(text, session=session)).text
