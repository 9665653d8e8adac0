"""Sends cases whole, streamed and as a chat, and compares."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from veneer_server.text.tokenizer import TextTokenizer

from tests.response_fuzz.cases import MODELS, Case, cases
from tests.unit.server.openai.endpoints.response_kit import (
    assembled,
    respond,
    same,
    shape,
    streamed,
)
from tests.unit.server.openai.kit import ok
from tests.unit.server.rpc.front_harness import Front, make_adapter


async def push_models(front: Front, folder: Path) -> None:
    """Publish an adapter for each template."""
    for name, template in MODELS.items():
        if template:
            await front.push(make_adapter(folder / name, template=template), name)


async def check_responses(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, seed: int, count: int
) -> Counter[str]:
    """Check so many cases. Returns what was seen in them.

    Raises:
        AssertionError: an answer differs; it says which.
    """
    rng, seen = random.Random(seed), Counter[str]()
    for number, case in zip(range(count), cases(rng, tokenizer), strict=False):
        try:
            await _check(front, http, rng, case, seen)
        except AssertionError as error:
            asked = json.dumps(case.response, ensure_ascii=False)
            written = tokenizer.decode(case.written.tokens)
            raise AssertionError(
                f"seed {seed}, case {number}: {asked}\nthe model writes {written!r}, then "
                f"{case.written.finish}\n{error}"
            ) from error
    return seen


async def _check(
    front: Front, http: httpx.AsyncClient, rng: random.Random, case: Case, seen: Counter[str]
) -> None:
    def again() -> None:
        front.engine.script = list(case.written.outputs(rng))

    again()
    whole = await respond(http, **case.response)
    again()
    events = await streamed(http, **case.response)
    again()
    chat = await ok(http, case.chat)
    first, second, third = front.engine.submitted[-3:]
    assert first.prompt == second.prompt == third.prompt, "prompts"
    assert first.constraint == second.constraint == third.constraint, "constraints"
    assert same(events[-1]["response"]) == same(whole), "streamed"
    items = assembled(events)
    assert [(item["type"], item["text"]) for item in items] == shape(whole), "deltas"
    for item, made in zip(whole["output"], items, strict=True):
        if item["type"] == "message":
            assert made["logprobs"] == item["content"][0]["logprobs"], "scores"
    for problem in _problems(whole, chat):
        raise AssertionError(problem)
    seen[whole["status"]] += 1
    seen.update(item["type"] for item in whole["output"])


def _problems(response: dict[str, Any], chat: dict[str, Any]) -> Iterator[str]:
    """Where a response says something else than a chat."""
    [choice] = chat["choices"]
    message = choice["message"]
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    ]
    text = message["content"] or ""
    if calls and not text.strip():
        text = ""  # blanks between thinking and calls are no item
    kinds = {kind: _texts(response, kind) for kind in ("message", "reasoning", "function_call")}
    if "".join(kinds["message"]) != text:
        yield f"text is {kinds['message']!r}, not {text!r}"
    thought = message.get("reasoning_content", "")
    if "".join(kinds["reasoning"]) != thought:
        yield f"thinking is {kinds['reasoning']!r}, not {thought!r}"
    names = [item["name"] for item in response["output"] if item["type"] == "function_call"]
    if list(zip(names, kinds["function_call"], strict=True)) != calls:
        yield f"calls are {names}, {kinds['function_call']}, not {calls}"
    if (response["status"] == "incomplete") != (choice["finish_reason"] == "length"):
        yield f"{response['status']} after {choice['finish_reason']}"
    if _usage(response["usage"]) != _chat_usage(chat["usage"]):
        yield f"usage is {response['usage']}, not {chat['usage']}"
    yield from _scores(response, choice)


def _texts(response: dict[str, Any], kind: str) -> list[str]:
    return [text for each, text in shape(response) if each == kind]


def _usage(usage: dict[str, Any]) -> list[int]:
    return [
        usage["input_tokens"],
        usage["output_tokens"],
        usage["total_tokens"],
        usage["input_tokens_details"]["cached_tokens"],
        usage["output_tokens_details"]["reasoning_tokens"],
    ]


def _chat_usage(usage: dict[str, Any]) -> list[int]:
    return [
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage["total_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["completion_tokens_details"]["reasoning_tokens"],
    ]


def _scores(response: dict[str, Any], choice: dict[str, Any]) -> Iterator[str]:
    """A response has the scores of its text; a chat those of all tokens."""
    given = [
        score
        for item in response["output"]
        if item["type"] == "message"
        for score in item["content"][0]["logprobs"]
    ]
    if choice["logprobs"] is None:
        if given:
            yield "scores that nobody asked for"
        return
    every = iter(choice["logprobs"]["content"])
    for score in given:
        if not any(_alike(score, other) for other in every):
            yield f"a score that the chat has not, or in another order: {score}"
            return
    data = b"".join(bytes(score["bytes"]) for score in given)
    for text in _texts(response, "message"):
        # A token may hold the end of a closing tag and characters that begin a stop string.
        if "\ufffd" not in text and text[2:].encode() not in data:
            yield f"the scores' tokens are {data!r}, but the text {text!r}"


def _alike(score: dict[str, Any], other: dict[str, Any]) -> bool:
    return (score["token"], score["logprob"], len(score["top_logprobs"])) == (
        other["token"],
        other["logprob"],
        len(other["top_logprobs"]),
    )
