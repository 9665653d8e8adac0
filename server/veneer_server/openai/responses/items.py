"""The items of a conversation as messages of a chat.

Answers of this server can be sent back as they came: ids and states of items are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from veneer_registry.errors import InvalidField

from veneer_server.openai.fields import Message
from veneer_server.serving.checks import MAX_MESSAGES, invalid

__all__ = ["messages_of"]

_ROLES: Final = ("user", "assistant", "system", "developer")
_TEXTS: Final = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are text, and the member that has it."""

_IGNORED_PARTS: Final = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})
_IGNORED: Final = frozenset({"id", "status", "phase"})
_DROPPED: Final = "reasoning"
"""Items that templates leave out of earlier turns anyway."""


def messages_of(given: str | list[Any], instructions: str | None) -> list[Message]:
    """The messages of a conversation, instructions first.

    Raises:
        InvalidField: an item is not served, or malformed.
    """
    messages = []
    if instructions:
        messages.append(_message("system", instructions))
    if isinstance(given, str):
        return [*messages, _message("user", given)]
    if len(given) > MAX_MESSAGES:
        raise invalid("input", f"has {len(given)} items: send at most {MAX_MESSAGES}")
    for at, item in enumerate(given):
        where = f"input[{at}]"
        if not isinstance(item, dict):
            raise invalid(where, "must be an object, such as a message")
        if item.get("type") != _DROPPED:
            messages.append(_of_item(where, item))
    if not messages:
        raise invalid("input", "is empty: send at least one message")
    return messages


def _message(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def _of_item(where: str, item: Mapping[str, Any]) -> Message:
    kind = item.get("type", "message")
    if kind != "message":
        raise _unserved(where, kind)
    _check_members(where, item, {"type", "role", "content"} | _IGNORED)
    role = item.get("role")
    if role not in _ROLES:
        raise invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
    content = item.get("content")
    if isinstance(content, str):
        return _message(role, content)
    if not isinstance(content, list):
        raise invalid(f"{where}.content", "must be a text or a list of parts")
    parts = (_text(f"{where}.content[{at}]", part) for at, part in enumerate(content))
    return _message(role, "".join(parts))


def _text(where: str, part: object) -> str:
    if not isinstance(part, dict):
        raise invalid(where, "must be an object, such as an input_text")
    kind = part.get("type")
    member = _TEXTS.get(kind) if isinstance(kind, str) else None
    if member is None:
        raise invalid(where, f"is of type {_shown(kind)}: only text is served")
    _check_members(where, part, {"type", member} | _IGNORED_PARTS)
    text = part.get(member)
    if not isinstance(text, str):
        raise invalid(f"{where}.{member}", "must be a text")
    return text


def _unserved(where: str, kind: object) -> InvalidField:
    """The one place that says which items are not served."""
    if kind == "item_reference":
        why = "refers to an item, but this server stores none: send the item itself"
    elif kind in ("function_call", "function_call_output"):
        why = "is of a tool, and tools are not served here: use /v1/chat/completions"
    else:
        why = f"is of type {_shown(kind)}: send messages"
    return invalid(where, why)


def _check_members(
    where: str, given: Mapping[str, Any], known: set[str] | frozenset[str]
) -> None:
    for name, value in given.items():
        if name not in known and value is not None:
            raise invalid(f"{where}.{name[:60]}", "is not a known member: leave it out")


def _shown(kind: object) -> str:
    return repr(kind[:40]) if isinstance(kind, str) else "unknown"
