"""Tags of calls that are special tokens: a parser sees them, the text for the user has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from veneer_registry.errors import InvalidField
from veneer_server.serving.samples import Sample
from veneer_server.serving.tool_use import AnswerPlan, ReplyReader, Tool, ToolUse
from veneer_server.text.prompts import Prompt, Prompts
from veneer_server.text.replies import ToolArguments, ToolCallBegun
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.text.tool_calls import CallFormat, markers
from veneer_server.wire.messages import SequenceOutput

from tests.refused import refused

USE = ToolUse((Tool({"name": "f"}),))
SPECIAL = {CallFormat.MISTRAL: "[TOOL_CALLS]", CallFormat.LLAMA3: "<|python_tag|>"}
AFTER = {
    CallFormat.MISTRAL: '[{"name": "f", "arguments": {"x": 1}}]',
    CallFormat.LLAMA3: '{"name": "f", "parameters": {"x": 1}}',
}


def with_special(folder: Path, name: str) -> TextTokenizer:
    """The base's tokenizer with one of its special tokens renamed."""
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    made = text.replace(json.dumps("<reponame>"), json.dumps(name))
    assert made != text
    return TextTokenizer(Tokenizer.from_str(made), json.loads(made))


@pytest.mark.parametrize("family", SPECIAL)
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_call_behind_a_special_token(
    base_folder: Path, family: CallFormat, step: int
) -> None:
    tokenizer = with_special(base_folder, SPECIAL[family])
    shown = tokenizer.special_ids(markers(family))
    [tag] = shown
    ids = [
        *tokenizer.encode("Hm. ", add_special_tokens=False),
        tag,
        *tokenizer.encode(AFTER[family], add_special_tokens=False),
    ]
    assert "[TOOL" not in tokenizer.decode(ids)
    reader = ReplyReader.of(
        tokenizer, Prompt("", [0]), AnswerPlan.of(USE, family, None, tokenizer)
    )
    sample = Sample(
        0,
        reader.tokens,
        stops=(),
        stop_token_ids=(),
        parser=reader.parser(),
        ends_with_calls=True,
    )
    deltas = []
    for at in range(0, len(ids), step):
        last = at + step >= len(ids)
        output = SequenceOutput(
            sequence=1, tokens=ids[at : at + step], finish="stop" if last else None
        )
        deltas.append(sample.delta(output))
    parts = [part for delta in deltas for part in delta.parts]
    assert "".join(delta.text for delta in deltas) == "Hm. "
    assert [part.name for part in parts if isinstance(part, ToolCallBegun)] == ["f"]
    arguments = "".join(part.text for part in parts if isinstance(part, ToolArguments))
    assert arguments == '{"x": 1}'
    assert deltas[-1].finish == "tool_calls"


KNOWS = "{% if tools %}[TOOL_CALLS]{% endif %}"
PLAIN = "{{ messages }}"


@pytest.mark.asyncio
async def test_the_flag_is_for_templates_that_know_tools(base_folder: Path) -> None:
    prompts = Prompts(base_folder)
    try:
        found = {
            flag: [prompts.family(template, flag) for template in (KNOWS, PLAIN, None)]
            for flag in ("auto", "llama3_json", "none")
        }
    finally:
        await prompts.close()
    assert found == {
        "auto": [CallFormat.MISTRAL, CallFormat.HERMES, CallFormat.HERMES],
        "llama3_json": [CallFormat.LLAMA3, CallFormat.HERMES, CallFormat.HERMES],
        "none": [None, None, None],
    }
    with refused(InvalidField, field="tool_choice"):
        USE.parser(None)
