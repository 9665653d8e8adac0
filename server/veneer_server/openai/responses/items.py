"""The items of a conversation as messages for a chat template.

Answers of this server can be sent back as they came: ids and states of items are ignored. An
assistant's turn is one message of a chat, but several items: thinking, text and calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from veneer_registry.errors import InvalidField

from veneer_server.serving.checks import MAX_MESSAGES, invalid
from veneer_server.serving.tools.history import History, PastCall, check_calls

__all__ = ["messages_of"]

_ROLES: Final = ("user", "assistant", "system", "developer")
_TEXTS: Final = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are text, and the member that has it."""

_IGNORED_PARTS: Final = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})
_IGNORED: Final = frozenset({"id", "status", "phase", "type"})
_CALL: Final = frozenset({"call_id", "name", "arguments", "caller", "namespace", "async"})
_OUTPUT: Final = frozenset({"call_id", "name", "output", "caller", "namespace"})


def messages_of(
    given: str | list[Any], instructions: str | None
) -> tuple[Mapping[str, Any], ...]:
    """The messages of a conversation, instructions first.

    Raises:
        InvalidField: an item is not served, or malformed.
    """
    made = _Messages()
    if instructions:
        made.say("system", instructions, "instructions")
    if isinstance(given, str):
        made.say("user", given, "input")
        return tuple(made.messages)
    if len(given) > MAX_MESSAGES:
        raise invalid("input", f"has {len(given)} items: send at most {MAX_MESSAGES}")
    for at, item in enumerate(given):
        where = f"input[{at}]"
        if not isinstance(item, dict):
            raise invalid(where, "must be an object, such as a message")
        made.take(where, item)
    made.end_turn()
    if not made.messages:
        raise invalid("input", "is empty: send at least one message")
    return tuple(made.messages)


class _Messages:
    """Messages, and the turn of the assistant that is not one yet."""

    def __init__(self) -> None:
        self.messages: list[Mapping[str, Any]] = []
        self._history = History()
        self._reasoning: list[str] = []
        self._text: str | None = None
        self._calls: list[PastCall] = []
        self._where = ""
        """The first item of the turn."""

    def take(self, where: str, item: Mapping[str, Any]) -> None:
        """Add an item."""
        match item.get("type", "message"):
            case "message":
                self._message(where, item)
            case "reasoning":
                self._think(where, item)
            case "function_call":
                self._call(where, item)
            case "function_call_output":
                self._output(where, item)
            case kind:
                raise _unserved(where, kind)

    def say(
        self, role: str, text: str, where: str, *, call_id: str = "", name: str = ""
    ) -> None:
        """Add a message that is not the assistant's; see `History.message`."""
        self.end_turn()
        role = "system" if role == "developer" else role
        made = self._history.message(role, text, call_id=call_id, name=name, field=where)
        self.messages.append(made)

    def end_turn(self) -> None:
        """The assistant's turn has ended. Thinking without text or calls is left out, as
        templates leave that of earlier turns out."""
        if self._text is not None or self._calls:
            made = self._history.message(
                "assistant",
                self._text or "",
                self._calls,
                reasoning="".join(self._reasoning),
                field=self._where,
            )
            self.messages.append(made)
        self._reasoning, self._text, self._calls = [], None, []

    def _message(self, where: str, item: Mapping[str, Any]) -> None:
        _check_members(where, item, {"role", "content"})
        role = item.get("role")
        if role not in _ROLES:
            raise invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
        text = _text_of(f"{where}.content", item.get("content"))
        if role != "assistant":
            self.say(role, text, where)
            return
        if self._text is not None or self._calls:
            self.end_turn()
        self._text, self._where = text, where

    def _think(self, where: str, item: Mapping[str, Any]) -> None:
        """Its summary, and what is encrypted, say nothing that a template could use."""
        if self._text is not None or self._calls:
            self.end_turn()
        parts = item.get("content") or []
        if not isinstance(parts, list):
            raise invalid(f"{where}.content", "must be a list of parts")
        for at, part in enumerate(parts):
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str):
                raise invalid(f"{where}.content[{at}]", "must be a reasoning_text")
            self._reasoning.append(text)

    def _call(self, where: str, item: Mapping[str, Any]) -> None:
        _check_members(where, item, _CALL)
        if not self._calls and self._text is None:
            self._where = where
        call_id, name, arguments = (
            _string(where, item, member) for member in ("call_id", "name", "arguments")
        )
        self._calls.append(PastCall(call_id, name, arguments))
        check_calls(len(self._calls), where)

    def _output(self, where: str, item: Mapping[str, Any]) -> None:
        _check_members(where, item, _OUTPUT)
        text = _text_of(f"{where}.output", item.get("output"))
        name = item.get("name")
        named = name if isinstance(name, str) else ""
        self.say("tool", text, where, call_id=_string(where, item, "call_id"), name=named)


def _text_of(where: str, content: object) -> str:
    """A text, or a list of parts that are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, "must be a string or a list of parts")
    return "".join(_part(f"{where}[{at}]", part) for at, part in enumerate(content))


def _part(where: str, part: object) -> str:
    if not isinstance(part, dict):
        raise invalid(where, "must be an object, such as an input_text")
    kind = part.get("type")
    member = _TEXTS.get(kind) if isinstance(kind, str) else None
    if member is None:
        raise invalid(where, f"is of type {_shown(kind)}: only text is supported")
    _check_members(where, part, {member} | _IGNORED_PARTS)
    return _string(where, part, member)


def _string(where: str, item: Mapping[str, Any], member: str) -> str:
    text = item.get(member)
    if not isinstance(text, str):
        raise invalid(f"{where}.{member}", "must be a string")
    return text


def _unserved(where: str, kind: object) -> InvalidField:
    """The one place that says which items are not served."""
    if kind == "item_reference":
        why = "refers to an item, but this server stores none: send the item itself"
    else:
        why = f"is of type {_shown(kind)}: send messages and function calls"
    return invalid(where, why)


def _check_members(
    where: str, given: Mapping[str, Any], known: set[str] | frozenset[str]
) -> None:
    for name, value in given.items():
        if name not in known and name not in _IGNORED and value is not None:
            raise invalid(f"{where}.{name[:60]}", "is not a known field: leave it out")


def _shown(kind: object) -> str:
    return repr(kind[:40]) if isinstance(kind, str) else "unknown"
