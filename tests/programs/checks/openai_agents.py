"""openai-agents: agents with tools and types, over chats and over its default, Responses."""

from __future__ import annotations

from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

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

set_tracing_disabled(True)
SDK = AsyncOpenAI(base_url=URL, api_key=KEY)
CALLED = list[str]()


@function_tool
def paint(colour: Colour) -> str:
    """Paint the wall."""
    CALLED.append(colour)
    return f"It is {colour} now."


def agent(name: str = MODEL, limit: int = 48, **more: Any) -> Agent[Any]:
    choice = more.pop("tool_choice", None)
    kind = more.pop("over", OpenAIChatCompletionsModel)
    return Agent(
        name="a",
        model=kind(model=name, openai_client=SDK),
        model_settings=ModelSettings(temperature=0, max_tokens=limit, tool_choice=choice),
        **more,
    )


async def check_run_and_run_streamed_say_the_same() -> None:
    asked = agent(limit=8)
    whole = (await Runner.run(asked, HELLO)).final_output
    assert whole
    streamed = Runner.run_streamed(asked, HELLO)
    assert [event async for event in streamed.stream_events()]
    assert streamed.final_output == whole


async def check_the_default_model_over_responses() -> None:
    """With a type: the agent takes an answer that `max_tokens` cut for an error."""
    asked = agent(over=OpenAIResponsesModel, output_type=City)
    assert isinstance((await Runner.run(asked, ASK)).final_output, City)
    streamed = Runner.run_streamed(asked, ASK)
    assert [event async for event in streamed.stream_events()]
    assert isinstance(streamed.final_output, City)


async def check_an_output_type() -> None:
    answer = await Runner.run(agent(output_type=City), ASK)
    assert isinstance(answer.final_output, City)


async def calls_and_answers(asked: Agent[Any]) -> None:
    CALLED.clear()
    answer = await Runner.run(asked, PAINT)
    assert CALLED
    assert set(CALLED) <= set(COLOURS)
    assert answer.final_output
    CALLED.clear()
    streamed = Runner.run_streamed(asked, PAINT)
    assert [event async for event in streamed.stream_events()]
    assert CALLED
    assert streamed.final_output


async def check_an_agent_calls_its_tool_and_answers() -> None:
    await calls_and_answers(agent(CALLER, tools=[paint]))


async def check_an_agent_over_responses_calls_its_tool_and_answers() -> None:
    """Its calls and results go back as items of a response."""
    await calls_and_answers(agent(CALLER, tools=[paint], over=OpenAIResponsesModel))


async def check_a_forced_call_of_the_base() -> None:
    CALLED.clear()
    asked = agent(tools=[paint], tool_choice="required", tool_use_behavior="stop_on_first_tool")
    answer = await Runner.run(asked, PAINT)
    assert answer.final_output == f"It is {CALLED[0]} now."
