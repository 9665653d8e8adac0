"""Grammars of answers that may call tools: what they accept, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from veneer_server.constraints.grammar import compile_matcher, library_limits, load_tokenizer
from veneer_server.serving.tool_use import (
    MAX_FORCED_CALLS,
    Tool,
    ToolUse,
    auto_grammar,
    without_words,
)
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import Constraint, ConstraintLimits

WEATHER = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/place"}, "when": {"type": ["string", "null"]}},
    "required": ["place", "when"],
    "$defs": {"place": {"type": "string"}},
}
STRICT = Tool({"name": "météo", "parameters": WEATHER, "strict": True})
LOOSE = Tool({"name": "clock", "parameters": WEATHER})
ANSWER = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}


def call(name: str, arguments: Any) -> str:
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


GOOD = call("météo", {"place": "Paris </tool_call>", "when": None})
ANY = call("clock", {"x": {"y": [1, 2]}})
BAD = [
    call("météo", {"place": "Paris"}),
    call("météo", {"place": 3, "when": None}),
    call("météo", {"place": "Paris", "when": None, "x": 1}),
    call("clock", [1]),
    call("other", {}),
    "<tool_call>Paris</tool_call>",
]


class Accepts:
    """Whether a grammar accepts a text, and an end after it."""

    def __init__(self, folder: Path, constraint: Constraint, limits: ConstraintLimits) -> None:
        self._texts = TextTokenizer.from_folder(folder)
        tokens = load_tokenizer(str(folder / "tokenizer.json"), self._texts.vocab_size, [2])
        self._matcher = compile_matcher(tokens, constraint, library_limits(limits))

    def __call__(self, text: str) -> bool:
        matcher = self._matcher.deep_copy()
        ids = self._texts.encode(text, add_special_tokens=False)
        taken = matcher.try_consume_tokens(ids)
        return taken == len(ids) and bool(matcher.is_accepting())


@pytest.fixture
def limits() -> ConstraintLimits:
    return ConstraintLimits()


def test_text_is_free_and_calls_are_not(base_folder: Path, limits: ConstraintLimits) -> None:
    accepts = Accepts(base_folder, auto_grammar(ToolUse((STRICT, LOOSE))), limits)
    for text in (
        "",
        "Hello <b>{}</b> \n\n😀",
        "a <tool_cal",
        GOOD,
        ANY,
        f"Look.\n{GOOD}",
        f"<think>\nHm\n</think>\n{GOOD}\n{ANY}\n{GOOD} That is all.",
    ):
        assert accepts(text), text
    for text in BAD:
        assert not accepts(text), text
        assert not accepts(f"Look.\n{ANY}\n{text}"), text


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_or_an_answer(
    base_folder: Path, limits: ConstraintLimits, parallel: bool
) -> None:
    answer = Constraint("json_schema", json.dumps(ANSWER))
    use = ToolUse((STRICT, LOOSE), parallel=parallel)
    accepts = Accepts(base_folder, auto_grammar(use, answer), limits)
    assert accepts('{"a": true}')
    assert accepts(GOOD)
    assert accepts(f"{GOOD}\n{ANY}") is parallel
    assert accepts("\n".join([ANY] * MAX_FORCED_CALLS)) is parallel
    assert not accepts("\n".join([ANY] * (MAX_FORCED_CALLS + 1))), "small models go on for ever"
    for text in ("", "Hello", '{"a": 1}', f'{GOOD}\n{{"a": true}}', f"Look.\n{GOOD}", *BAD):
        assert not accepts(text), text


@pytest.mark.push
def test_any_schema_can_be_an_answer(base_folder: Path, limits: ConstraintLimits) -> None:
    for schema, text in (({}, "[1, 2]"), (True, '"x"'), ({"const": "a\n/é"}, '"a\\n/é"')):
        answer = Constraint("json_schema", json.dumps(schema))
        accepts = Accepts(base_folder, auto_grammar(ToolUse((LOOSE,)), answer), limits)
        assert accepts(text), schema
        assert accepts(ANY)


def test_words_for_people_are_left_out() -> None:
    """They count towards the size of a constraint, and agents' tools are full of them."""
    schema = {
        "title": "T",
        "description": "D",
        "properties": {
            "title": {"type": "string", "title": "T", "enum": ["description"]},
            "description": {"anyOf": [{"const": {"title": 1}}, {"description": "D"}]},
        },
        "$defs": {"title": {"examples": [1]}},
    }
    assert without_words(schema) == {
        "properties": {
            "title": {"type": "string", "enum": ["description"]},
            "description": {"anyOf": [{"const": {"title": 1}}, {}]},
        },
        "$defs": {"title": {}},
    }
    tool = Tool({"name": "f", "strict": True, "parameters": {"description": "D" * 99}})
    assert "DDD" not in auto_grammar(ToolUse((tool,))).text


def test_an_opening_tag_that_is_a_special_token(
    base_folder: Path, tmp_path: Path, limits: ConstraintLimits
) -> None:
    text = (base_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(
        text.replace('"<reponame>"', '"<tool_call>"'), encoding="utf-8"
    )
    accepts = Accepts(tmp_path, auto_grammar(ToolUse((STRICT, LOOSE)), special=True), limits)
    assert accepts("Hello")
    assert accepts(f"Look.\n{GOOD}\n{ANY}")
    for written in BAD:
        assert not accepts(f"Look.\n{written}"), written
