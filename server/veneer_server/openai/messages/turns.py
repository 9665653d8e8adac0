"""Turns of a conversation as messages for a chat template, and tools.

A turn of the user may hold results of tools, which are messages of their own for a template.
Members that say something about caches or citations are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from veneer_server.openai.messages.fields import ToolChoice
from veneer_server.serving.checks import check_json_size, invalid, refuse
from veneer_server.serving.tools.history import (
    MAX_ARGUMENT_BYTES,
    History,
    PastCall,
    check_calls,
)
from veneer_server.serving.tools.use import MAX_TOOLS, Choice, Tool, ToolUse, check_tool

__all__ = ["messages_of", "tools_of"]

_CHOICES: Final = {"auto": Choice.AUTO, "any": Choice.REQUIRED, "tool": Choice.NAMED}
_LONGEST_ID: Final = 256
_IGNORED: Final = frozenset({"type", "cache_control", "citations", "signature", "caller"})


def messages_of(
    turns: Sequence[Mapping[str, Any]], system: str | Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ...]:
    """The messages, the system's first. Raises InvalidField."""
    history, made = History(), list[Mapping[str, Any]]()
    if system:
        made.append(history.message("system", _text_of("system", system), field="system"))
    for at, turn in enumerate(turns):
        where = f"messages[{at}]"
        _check_members(where, turn, {"role", "content"})
        match turn.get("role"):
            case "user":
                made += _of_user(history, where, turn.get("content"))
            case "assistant":
                made.append(_of_assistant(history, where, turn.get("content")))
            case _:
                raise invalid(f"{where}.role", "must be user or assistant")
    return tuple(made)


def _of_user(history: History, where: str, content: object) -> Iterator[Mapping[str, Any]]:
    """Results come first, as a template expects them right after the calls."""
    texts: list[str] = []
    for at, block in _blocks(f"{where}.content", content):
        if block["type"] == "text":
            texts.append(_member(at, block, "text"))
        elif block["type"] == "tool_result":
            _check_members(at, block, {"tool_use_id", "content", "is_error"})
            text = _text_of(f"{at}.content", block.get("content") or "")
            call = _id(at, block, "tool_use_id")
            yield history.message("tool", text, call_id=call, field=where)
        else:
            raise _unserved(at, block["type"])
    if texts:
        yield history.message("user", "".join(texts), field=where)


def _of_assistant(history: History, where: str, content: object) -> Mapping[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[PastCall] = []
    for at, block in _blocks(f"{where}.content", content):
        match block["type"]:
            case "text":
                texts.append(_member(at, block, "text"))
            case "thinking":
                _check_members(at, block, {"thinking"})
                thoughts.append(_member(at, block, "thinking"))
            case "redacted_thinking":  # says nothing that a template could use
                continue
            case "tool_use":
                _check_members(at, block, {"id", "name", "input"})
                given = block.get("input")
                if not isinstance(given, dict):
                    raise invalid(f"{at}.input", "must be an object")
                check_json_size(f"{at}.input", given, MAX_ARGUMENT_BYTES)
                text = json.dumps(given, ensure_ascii=False)
                calls.append(PastCall(_id(at, block, "id"), _member(at, block, "name"), text))
                check_calls(len(calls), where)
            case kind:
                raise _unserved(at, kind)
    return history.message(
        "assistant", "".join(texts), calls, reasoning="".join(thoughts), field=where
    )


def tools_of(given: Sequence[Mapping[str, Any]], choice: ToolChoice) -> ToolUse | None:
    """The tools that the answer may or must use; None if it may use none. Raises
    InvalidField."""
    if len(given) > MAX_TOOLS:
        refuse("tools", f"has {len(given)} entries: send at most {MAX_TOOLS}")
    tools = tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(given))
    if not tools and choice.type in ("any", "tool"):
        raise invalid("tool_choice", "needs tools: send them")
    if not tools or choice.type == "none":
        return None
    named = choice.name if choice.type == "tool" else ""
    parallel = not choice.disable_parallel_tool_use
    return ToolUse(tools, _CHOICES[choice.type], named, parallel)


def _tool(given: Mapping[str, Any], where: str) -> Tool:
    if given.get("type") not in (None, "custom"):
        raise _unserved(where, given["type"])
    function: dict[str, Any] = {"name": _member(where, given, "name")}
    if given.get("description") is not None:
        function["description"] = _member(where, given, "description")
    if given.get("input_schema") is not None:
        function["parameters"] = given["input_schema"]
    if given.get("strict") is True:
        function["strict"] = True
    check_tool(made := Tool(function), where)
    return made


def _blocks(where: str, content: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each block with its name in errors. A text is one block."""
    if isinstance(content, str):
        yield where, {"type": "text", "text": content}
        return
    if not isinstance(content, list) or not content:
        raise invalid(where, "must be a string or a list of blocks")
    for at, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise invalid(f"{where}[{at}]", "must be an object with a type, such as text")
        yield f"{where}[{at}]", block


def _text_of(where: str, content: object) -> str:
    texts = []
    for at, block in _blocks(where, content):
        if block["type"] != "text":
            raise _unserved(at, block["type"])
        texts.append(_member(at, block, "text"))
    return "".join(texts)


def _member(where: str, block: Mapping[str, Any], name: str) -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise invalid(f"{where}.{name}", "must be a string")
    return text


def _id(where: str, block: Mapping[str, Any], name: str) -> str:
    if len(text := _member(where, block, name)) > _LONGEST_ID:
        raise invalid(f"{where}.{name}", f"has more than {_LONGEST_ID} characters")
    return text


def _check_members(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for name, value in given.items():
        if name not in known and name not in _IGNORED and value is not None:
            raise invalid(f"{where}.{name[:60]}", "is not a known field: leave it out")


def _unserved(where: str, kind: object) -> Exception:
    shown = repr(kind[:40]) if isinstance(kind, str) else "unknown"
    return invalid(f"{where}.type", f"is {shown}: only text and your own tools are supported")
