"""Tool calls and results of earlier turns, in the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from veneer_server.serving.checks import refuse

MAX_CALLS: Final = 128
"""Most tool calls in one message."""

MAX_ARGUMENT_BYTES: Final = 256 << 10
"""Most bytes of all calls' arguments in a request: they are parsed on the event loop."""

MAX_JSON_DEPTH: Final = 200


@dataclass(frozen=True, slots=True)
class PastCall:
    """A tool call that the model made.

    Attributes:
        arguments: the text that the model wrote, normally JSON.
    """

    id: str
    name: str
    arguments: str


def check_calls(count: int, field: str) -> None:
    """Raise InvalidField for a message with too many calls. Args: field: the field with
    them."""
    if count > MAX_CALLS:
        refuse(field, f"brings one turn's calls to more than {MAX_CALLS}: send fewer")


class History:
    """Builds the messages of one request for a chat template."""

    def __init__(self) -> None:
        self._bytes = 0

    def message(
        self,
        role: str,
        content: str,
        calls: Sequence[PastCall] = (),
        *,
        call_id: str = "",
        name: str = "",
        reasoning: str = "",
        field: str,
    ) -> dict[str, Any]:
        """Build one message.

        Args:
            calls: tool calls in an assistant's message; their number has been checked.
            call_id, name: for a tool's result: id of the call, and name.
            reasoning: the assistant's reasoning before the message. Templates know it under two
                names: DeepSeek's, and vLLM's newer one.
            field: the field with the calls, for errors.

        Raises:
            InvalidField: the arguments are too long.
        """
        made: dict[str, Any] = {"role": role, "content": content}
        if reasoning:
            made |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": self._arguments(call.arguments, field),
                    },
                }
                for call in calls
            ]
        if call_id:
            made["tool_call_id"] = call_id
        if name:
            made["name"] = name
        return made

    def _arguments(self, text: str, field: str) -> object:
        """Parse a call's arguments, as templates expect. A model may have written invalid JSON:
        that is passed on as text."""
        self._bytes += len(text.encode())
        if self._bytes > MAX_ARGUMENT_BYTES:
            refuse(
                field,
                f"brings the calls' arguments to more than {MAX_ARGUMENT_BYTES} bytes: leave "
                "older turns out",
            )
        try:
            return read_json(text) if text.strip() else {}
        except ValueError:
            return text


def read_json(text: str) -> object:
    """Parse a JSON text whose size has been checked.

    Raises:
        ValueError: it is not valid JSON, or nested too deeply.
    """
    try:
        value: object = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _deep(value):
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep: flatten it")
    if "\\u" in text:  # a lone surrogate is not a character: encoding it raises ValueError
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _deep(value: object) -> bool:
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            return True
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return False


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a valid JSON number")
