"""langchain-openai: a chat model with tools and structured output."""

from __future__ import annotations

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

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


@tool
def paint(colour: Colour) -> str:
    """Paint the wall."""
    return f"It is {colour} now."


def chat(model: str = MODEL, limit: int = 48) -> ChatOpenAI:
    return ChatOpenAI(base_url=URL, api_key=KEY, model=model, temperature=0, max_tokens=limit)


def check_invoke_and_stream_say_the_same() -> None:
    whole = chat(limit=8).invoke(HELLO)
    assert whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] <= 8
    assert "".join(str(piece.content) for piece in chat(limit=8).stream(HELLO)) == whole.content


def check_structured_output_by_schema_and_by_call() -> None:
    assert isinstance(chat().with_structured_output(City).invoke(ASK), City)
    by_call = chat().with_structured_output(City, method="function_calling")
    assert isinstance(by_call.invoke(ASK), City)


def check_a_forced_call() -> None:
    answer = chat().bind_tools([paint], tool_choice="any").invoke(PAINT)
    assert answer.tool_calls
    assert all(call["args"]["colour"] in COLOURS for call in answer.tool_calls)


def check_bind_tools_calls_and_goes_on() -> None:
    bound = chat(CALLER).bind_tools([paint])
    messages = [HumanMessage(PAINT)]
    answer = bound.invoke(messages)
    [call] = answer.tool_calls
    result = paint.invoke(call)
    assert isinstance(result, ToolMessage)
    last = bound.invoke([*messages, answer, result])
    assert last.content
    assert not last.tool_calls


def check_a_streamed_call_is_the_whole_one() -> None:
    bound = chat(CALLER).bind_tools([paint])
    whole = bound.invoke(PAINT).tool_calls
    joined: AIMessageChunk | None = None
    for piece in bound.stream(PAINT):
        joined = piece if joined is None else joined + piece
    assert joined is not None
    assert [(each["name"], each["args"]) for each in joined.tool_calls] == [
        (each["name"], each["args"]) for each in whole
    ]
