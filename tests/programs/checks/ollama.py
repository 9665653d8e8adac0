"""ollama: Ollama's client, over ``/api/``."""

from __future__ import annotations

import json
from typing import Any

from ollama import AsyncClient, Client, ResponseError

from tests.programs.kit import ASK, CALLER, COLOURS, HELLO, MODEL, PAINT, URL, City

HOST = URL.removesuffix("/v1")
OLLAMA = Client(HOST)
FEW = {"num_predict": 8, "temperature": 0}


def paint(colour: str) -> str:
    """Paint the wall.

    Args:
        colour: red, blue or green
    """
    return f"It is {colour} now."


def asked(text: str = HELLO, model: str = MODEL, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}]
    return {"model": model, "messages": turns, "options": FEW, **more}


def check_chat_and_stream_say_the_same() -> None:
    whole = OLLAMA.chat(**asked())
    assert whole.message.role == "assistant"
    assert whole.message.content
    assert (whole.done, whole.done_reason) == (True, "length")
    assert whole.eval_count == FEW["num_predict"]
    assert whole.total_duration >= whole.eval_duration > 0
    *parts, last = OLLAMA.chat(**asked(), stream=True)
    assert len(parts) > 1
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert (last.done, last.prompt_eval_count) == (True, whole.prompt_eval_count)


async def check_asyncio() -> None:
    client = AsyncClient(HOST)
    whole = await client.chat(**asked())
    text = ""
    async for part in await client.chat(**asked(), stream=True):
        text += part.message.content
    assert text == whole.message.content


def check_generate() -> None:
    given: dict[str, Any] = {"model": f"{MODEL}:latest", "prompt": HELLO, "options": FEW}
    chat = OLLAMA.chat(**asked())
    whole = OLLAMA.generate(**given)
    assert whole.response == chat.message.content
    assert "".join(part.response for part in OLLAMA.generate(**given, stream=True)) == (
        whole.response
    )
    assert OLLAMA.generate(**given, raw=True).response
    assert OLLAMA.generate(model=MODEL).done_reason == "load"


def check_a_schema() -> None:
    given = asked(ASK, format=City.model_json_schema(), options={"temperature": 0})
    assert City.model_validate_json(OLLAMA.chat(**given).message.content)


def check_a_tool_is_called_and_its_result_read() -> None:
    given = asked(PAINT, CALLER, tools=[paint], options={"temperature": 0, "num_predict": 48})
    called = OLLAMA.chat(**given).message
    (streamed,) = [
        call
        for part in OLLAMA.chat(**given, stream=True)
        for call in part.message.tool_calls or ()
    ]
    (call,) = called.tool_calls
    assert (call.function.name, call.function.arguments) == (
        streamed.function.name,
        streamed.function.arguments,
    )
    colour = call.function.arguments["colour"]
    assert colour in COLOURS
    result = {"role": "tool", "tool_name": "paint", "content": paint(colour)}
    answer = OLLAMA.chat(**{**given, "messages": [*given["messages"], called, result]})
    assert answer.message.content


def check_models() -> None:
    names = [model.model for model in OLLAMA.list().models]
    assert {f"{MODEL}:latest", f"{CALLER}:latest"} <= set(names)
    for name in names:
        shown = OLLAMA.show(name)
        assert "completion" in shown.capabilities
        assert shown.modelinfo[f"{shown.details.family}.context_length"] > 0
    assert f"{MODEL}:latest" in [model.model for model in OLLAMA.ps().models]


def check_what_is_not_served_says_so() -> None:
    for call in (
        lambda: OLLAMA.embed(MODEL, "Hi"),
        lambda: OLLAMA.pull("llama3"),
        lambda: OLLAMA.create("mine", from_=MODEL),
        lambda: OLLAMA.copy(MODEL, "mine"),
        lambda: OLLAMA.delete(MODEL),
        lambda: OLLAMA.push("mine"),
    ):
        told = refusal(call)
        assert told.status_code == 404
        assert told.error.startswith(("this server", "models are not")), told.error
    missing = refusal(lambda: OLLAMA.chat(**asked(model="none")))
    assert (missing.status_code, "'none'" in missing.error) == (404, True)
    wrong = refusal(lambda: OLLAMA.chat(**asked(options={"mirostat": 2})))
    assert "mirostat" in wrong.error
    assert "\n" not in json.dumps(wrong.error)


def refusal(call: Any) -> ResponseError:
    try:
        call()
    except ResponseError as error:
        return error
    raise AssertionError("it was answered")
