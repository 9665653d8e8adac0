"""Thinking is split off an answer, and streamed as a whole answer is taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from veneer_server.text.replies import (
    TAGS,
    THINK,
    Content,
    Reasoning,
    ReplyParser,
    ReplyPart,
    Thinking,
    ThinkingParser,
    ToolArguments,
    ToolCallBegun,
    reply_parser,
    tags_of,
    thinking_of,
)


def taken_apart(parser: ReplyParser, pieces: Sequence[str]) -> tuple[str, str, list[ReplyPart]]:
    """Reasoning, content, and what else there is."""
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + [*parser.finish()]
    kinds = [type(delta) for delta in deltas]
    if Content in kinds and Reasoning in kinds:
        assert len(kinds) - kinds[::-1].index(Reasoning) <= kinds.index(Content), "in order"
    return (
        "".join(d.text for d in deltas if isinstance(d, Reasoning)),
        "".join(d.text for d in deltas if isinstance(d, Content)),
        [d for d in deltas if not isinstance(d, Reasoning | Content)],
    )


@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "content"),
    [
        (False, "<think>\nhm\n</think>\n\nYes", "\nhm\n", "\n\nYes"),
        (False, "\n <think>hm</think>Yes", "hm", "Yes"),
        (False, "Yes", "", "Yes"),
        (False, "  Yes </think> no", "", "  Yes </think> no"),
        (False, "Yes <think>hm</think>", "", "Yes <think>hm</think>"),
        (False, "<thinking>", "", "<thinking>"),
        (False, "<thin", "", "<thin"),
        (False, "<think>cut off </th", "cut off </th", ""),
        (False, "<think></think>", "", ""),
        (False, "", "", ""),
        (True, "hm\n</think>\n\nYes", "hm\n", "\n\nYes"),
        (True, "hm", "hm", ""),
        (True, "</think>Yes <think>a</think>", "", "Yes <think>a</think>"),
        (True, "a < b </thin </think>Yes", "a < b </thin ", "Yes"),
    ],
)
def test_an_answer_is_taken_apart(
    opened: bool, text: str, reasoning: str, content: str
) -> None:
    for pieces in ([text], list(text)):
        found = taken_apart(ThinkingParser(opened=opened), pieces)
        assert found == (reasoning, content, [])


_PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", "th", " ", "\n", "é", "a<b"]),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(text=_PARTS, cuts=st.lists(st.integers(0, 80), max_size=8), opened=st.booleans())
def test_streamed_is_as_whole(text: str, cuts: list[int], opened: bool) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    whole = taken_apart(ThinkingParser(opened=opened), [text])
    assert taken_apart(ThinkingParser(opened=opened), pieces) == whole
    reasoning, content, _ = whole
    kept = reasoning + content
    assert kept in (text, text.replace("</think>", "", 1)) or text.lstrip().startswith(
        "<think>"
    )


def test_text_is_passed_on_as_early_as_it_is_certain() -> None:
    parser = ThinkingParser(opened=True)
    assert parser.feed("one </thi") == [Reasoning("one ")]
    assert parser.feed("s") == [Reasoning("</this"[:6])]
    assert parser.feed("</think>") == [Reasoning("")], "its end has been read"
    assert parser.feed("x</think") == [Content("x</think")]


@pytest.mark.parametrize(
    ("prompt", "begun", "expected"),
    [
        ("<|im_start|>assistant\n", "", Thinking.TAGGED),
        ("<|im_start|>assistant\n<think>\n", "", Thinking.OPENED),
        ("<think>\n\n</think>\n\n", "", Thinking.TAGGED),
        ("What is <think>?\nassistant: ", "", Thinking.TAGGED),
        ("assistant: The answer", "The answer", Thinking.NONE),
        ("assistant: <think>So", "<think>So", Thinking.OPENED),
        ("assistant: <think>So</think>It", "<think>So</think>It", Thinking.NONE),
    ],
)
def test_the_prompt_says_whether_the_tag_is_open(
    prompt: str, begun: str, expected: Thinking
) -> None:
    assert thinking_of(prompt, begun) is expected


class Calls:
    """A parser to whom ``!`` begins a call, with the rest as its arguments."""

    def __init__(self) -> None:
        self._begun = False

    def feed(self, text: str) -> Sequence[ReplyPart]:
        if self._begun:
            return [ToolArguments(0, text)]
        before, mark, after = text.partition("!")
        deltas: list[ReplyPart] = [Content(before)] if before else []
        if mark:
            self._begun = True
            deltas += [ToolCallBegun(0, "id", "f"), ToolArguments(0, after)]
        return deltas

    def finish(self) -> Sequence[ReplyPart]:
        return [ToolArguments(0, ".")] if self._begun else []


def test_a_template_names_its_tags() -> None:
    """Mistral's are in the default system prompt of its templates."""
    brackets = TAGS["mistral"]
    assert tags_of("{{ x }}<think>\n") == TAGS["think"] == THINK
    assert tags_of("your thoughts: [THINK]Draft[/THINK]Summary {{ x }}") == brackets
    assert tags_of("{{ messages }} <THINK>[think]") is tags_of("") is tags_of(None) is None
    assert thinking_of("[/INST]", "[THINK]So", brackets) is Thinking.OPENED
    assert thinking_of("[/INST][THINK]", "", brackets) is Thinking.OPENED
    assert thinking_of("[/INST]<think>", "", brackets) is Thinking.TAGGED
    parser = reply_parser(Thinking.TAGGED, Calls(), tags=brackets)
    assert parser is not None
    text = "[THINK]a [TH </think>!b[/THINK]c!d"
    reasoning, content, [call, *_] = taken_apart(parser, list(text))
    assert (reasoning, content) == ("a [TH </think>!b", "c")
    assert call == ToolCallBegun(0, "id", "f")


def test_another_parser_gets_what_is_left_beside_the_thinking() -> None:
    for pieces in (["<think>a!b</think>c!d"], list("<think>a!b</think>c!d")):
        parser = reply_parser(Thinking.TAGGED, Calls())
        assert parser is not None
        reasoning, content, calls = taken_apart(parser, pieces)
        assert (reasoning, content) == ("a!b", "c")
        assert calls[0] == ToolCallBegun(0, "id", "f")
        assert "".join(c.text for c in calls[1:] if isinstance(c, ToolArguments)) == "d."
    assert reply_parser(Thinking.NONE) is None
    assert isinstance(reply_parser(Thinking.NONE, Calls()), Calls)
