"""Tools for chat templates that do not know them.

The model gets them in its system message, in the words of the Hermes and Qwen templates, and
calls in their format; calls and results of earlier turns are written into messages likewise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

__all__ = ["in_words", "needs_words"]

_BEFORE: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER: Final = (
    "\n</tools>\n\nFor each function call, return a json object with function name and "
    "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def needs_words(
    messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether there is anything that a template without tools would leave out."""
    return bool(tools) or any(
        "tool_calls" in message or message["role"] == "tool" for message in messages
    )


def in_words(
    messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The chat with its tools, calls and results as text: messages of role and content."""
    said: list[dict[str, Any]] = []
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(message["content"])
            continue
        _say_results(said, results)
        said.append({"role": message["role"], "content": _with_calls(message)})
    _say_results(said, results)
    if tools:
        words = "".join([_BEFORE, *(f"\n{_json(tool)}" for tool in tools), _AFTER])
        if said and said[0]["role"] == "system":
            words = f"{said.pop(0)['content']}\n\n{words}"
        said.insert(0, {"role": "system", "content": words})
    return said


def _say_results(said: list[dict[str, Any]], results: list[str]) -> None:
    """As a user's message, as in Qwen's template: many templates know no other role."""
    if results:
        texts = [f"<tool_response>\n{each}\n</tool_response>" for each in results]
        said.append({"role": "user", "content": "\n".join(texts)})
        results.clear()


def _with_calls(message: Mapping[str, Any]) -> str:
    parts = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        written = {"name": function["name"], "arguments": function["arguments"]}
        parts.append(f"<tool_call>\n{_json(written)}\n</tool_call>")
    return "\n".join(parts)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
