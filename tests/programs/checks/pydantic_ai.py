"""pydantic-ai: agents whose answers have a type."""

from __future__ import annotations

from typing import Any

from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.programs.kit import (
    ASK,
    CALLER,
    COLOURS,
    HELLO,
    KEY,
    MODEL,
    PAINT,
    URL,
    City,
    Colour,
)

SETTINGS: Any = {"temperature": 0, "max_tokens": 48}
SHORT: Any = {"temperature": 0, "max_tokens": 8}


def model(name: str = MODEL) -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=OpenAIProvider(base_url=URL, api_key=KEY))


async def check_run_and_run_stream_say_the_same() -> None:
    agent = Agent(model(), model_settings=SHORT)
    whole = (await agent.run(HELLO)).output
    assert whole
    async with agent.run_stream(HELLO) as stream:
        assert "".join([piece async for piece in stream.stream_text(delta=True)]) == whole


async def check_a_type_by_its_default_a_forced_call() -> None:
    answer = await Agent(model(), output_type=City, model_settings=SETTINGS).run(ASK)
    assert isinstance(answer.output, City)


async def check_a_type_streamed() -> None:
    agent = Agent(model(), output_type=City, model_settings=SETTINGS)
    async with agent.run_stream(ASK) as stream:
        assert isinstance(await stream.get_output(), City)


async def check_a_type_by_schema() -> None:
    agent = Agent(model(), output_type=NativeOutput(City), model_settings=SETTINGS)
    assert isinstance((await agent.run(ASK)).output, City)


async def check_an_agent_calls_its_tool_and_answers() -> None:
    agent = Agent(model(CALLER), model_settings=SETTINGS)
    called = list[str]()

    @agent.tool_plain
    def paint(colour: Colour) -> str:
        """Paint the wall."""
        called.append(colour)
        return f"It is {colour} now."

    answer = await agent.run(PAINT)
    assert called
    assert set(called) <= set(COLOURS)
    assert answer.output
    called.clear()
    async with agent.run_stream(PAINT) as stream:
        assert await stream.get_output()
    assert called
