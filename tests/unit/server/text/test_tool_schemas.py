"""Schemas of forced calls: they accept the calls of the request's tools and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from veneer_server.constraints.grammar import compile_matcher, library_limits, load_tokenizer
from veneer_server.serving.tool_use import (
    MAX_FORCED_CALLS,
    CallChoice,
    Tool,
    ToolUse,
    arguments_schema,
)
from veneer_server.wire.messages import ConstraintLimits

PLACE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "in": {"$ref": "#/$defs/place"}},
    "required": ["name"],
    "additionalProperties": False,
}
OTHER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS = (
    Tool(
        {
            "name": "go",
            "parameters": {
                "type": "object",
                "properties": {"to": {"$ref": "#/$defs/place"}, "$ref": {"const": "#/x"}},
                "required": ["to"],
                "$defs": {"place": PLACE},
            },
        }
    ),
    Tool(
        {
            "name": "count",
            "parameters": {
                "type": "object",
                "properties": {"place": {"$ref": "#/$defs/place"}},
                "required": ["place"],
                "$defs": {"place": OTHER},  # the same name for something else
            },
        }
    ),
    Tool({"name": "clock"}),
)
GO = {"name": "go", "arguments": {"to": {"name": "x", "in": {"name": "y"}}}}
COUNT = {"name": "count", "arguments": {"place": {"n": 3}}}
CLOCK: dict[str, Any] = {"name": "clock", "arguments": {}}
GOOD: list[Any] = [[GO], [COUNT], [CLOCK], [CLOCK, COUNT, GO]]
BAD: list[Any] = [
    [],
    {},
    [{"name": "go", "arguments": {"to": {"n": 3}}}],
    [{"name": "count", "arguments": {"place": {"name": "x"}}}],
    [{"name": "clock", "arguments": {"x": 1}}],
    [{"name": "clock"}],
    [{"name": "fly", "arguments": {}}],
    [{"arguments": {}, "name": 3}],
]


def schema(**options: Any) -> str:
    constraint = ToolUse(TOOLS, CallChoice.REQUIRED, **options).constraint()
    assert constraint is not None
    return constraint.text


def valid(calls: Any, **options: Any) -> bool:
    import jsonschema  # a second of every worker

    checked: bool = jsonschema.Draft202012Validator(json.loads(schema(**options))).is_valid(
        calls
    )
    return checked


@pytest.mark.parametrize("calls", GOOD)
def test_calls_of_the_tools(calls: Any) -> None:
    assert valid(calls)


@pytest.mark.parametrize("calls", BAD)
def test_nothing_else(calls: Any) -> None:
    assert not valid(calls)


def test_a_list_of_calls_ends() -> None:
    assert valid([CLOCK] * MAX_FORCED_CALLS)
    assert not valid([CLOCK] * (MAX_FORCED_CALLS + 1))


def test_one_call_where_several_are_not_wanted() -> None:
    assert not valid([CLOCK, CLOCK], parallel=False)


@pytest.fixture(scope="module")
def accepts(base_folder: Path) -> Any:
    """Whether the library that constrains the output agrees."""
    tokenizer = load_tokenizer(str(base_folder / "tokenizer.json"), 49152, [0])
    constraint = ToolUse(TOOLS, CallChoice.REQUIRED).constraint()
    assert constraint is not None

    def accept(calls: Any) -> bool:
        matcher = compile_matcher(tokenizer, constraint, library_limits(ConstraintLimits()))
        tokens = tokenizer.tokenize_str(json.dumps(calls))
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return accept


def test_the_library_follows_the_schema(accepts: Any) -> None:
    assert [accepts(calls) for calls in GOOD] == [True] * len(GOOD)
    assert [accepts(calls) for calls in BAD] == [False] * len(BAD)


def test_a_tool_takes_what_it_says() -> None:
    assert arguments_schema(None) == {"type": "object", "additionalProperties": False}
    assert arguments_schema({"properties": {}})["additionalProperties"] is False
    for more in ({"additionalProperties": True}, {"anyOf": []}, {"$ref": "#/$defs/x"}):
        assert arguments_schema(more) == {"type": "object", **more}
